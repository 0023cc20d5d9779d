"""Files as a Llama's language: how many of its samples are files, and what they keep of rare images, against pixels and codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxgen.data import make_source, pixels
from jaxgen.data.transforms import Preprocess
from jaxgen.metrics import detail, psnr
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes import claims
from jaxgen.recipes.byte_images import ByteImageConfig, CodecConfig
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.image_llama import ImageLlamaConfig

__all__ = ["compare_files", "in_pixels", "rarest"]


def in_pixels(config: ByteImageConfig) -> ByteImageConfig:
    """The same model and training on the bytes of pixels, of which there are as many as numbers."""
    size = config.codec.size or config.data.image_size
    codec = CodecConfig(kind="pixels", length=size * size * config.data.channels, size=config.codec.size)
    return dataclasses.replace(config, codec=codec)


def compare_files(
    config: ByteImageConfig,
    codes: ImageLlamaConfig,
    *,
    seeds: int,
    samples: int,
    log: Callable[[str], None],
) -> Claim:
    """JPEG bytes with and without their grammar, the bytes of pixels, and the codes of a VQ tokenizer, on the same Llama.

    Args:
      config: of JPEG bytes.
      codes: of the VQ baseline; its data, model and training are those of `config`.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
    """
    free = dataclasses.replace(config, constrained=False)
    systems = {"S016 JPEG-LM": config, "S016 JPEG-LM, unconstrained": free, "codes of a VQ tokenizer": codes}
    systems["bytes of pixels"] = in_pixels(config)
    title = "A Llama on JPEG bytes against the same on pixels and on VQ codes; equal blocks, data and updates"
    rare = rarest(config)

    def columns(recipe, params):
        return _columns(recipe, params, rare, samples)

    same = {"S016 JPEG-LM, unconstrained": "S016 JPEG-LM"}
    claim = claims.compare_generators(
        systems, seeds=seeds, samples=samples, log=log, columns=columns, same_weights=same, title=title
    )
    notes = (
        "`opens`: share of samples of the last seed that Pillow opens, which mends much; `valid`: whose every block and marker "
        "is there. Detail is the mean squared difference of neighbouring pixels, as a share of the real images'. Samples that "
        "are not valid count as grey pictures in all measures."
    )
    return claim._replace(notes=f"{claim.notes} {notes}")


def rarest(config: ByteImageConfig, share: float = 0.1) -> Float[np.ndarray, "n H W C"]:
    """The test images farthest from the mean of their class's training images, pixel by pixel."""
    data = config.data
    train, test = (_images(data, split) for split in ("train", "test"))
    means = {label: train[0][train[1] == label].mean(0) for label in set(train[1].tolist())}
    far = np.array([np.square(image - means[int(label)]).mean() for image, label in zip(*test)])
    return test[0][np.argsort(-far)[: max(1, round(share * len(far)))]]


def _images(data, split: str, limit: int = 5000):
    source, prepare = make_source(data, split), Preprocess(channels=data.channels, image_size=data.image_size)
    # Evenly over the whole: files have often one class after another.
    examples = [prepare(source[int(i)]) for i in np.linspace(0, len(source) - 1, min(len(source), limit)).round()]
    return np.asarray(pixels(np.stack([e["image"] for e in examples]))), np.array([e["label"] for e in examples])


def _columns(recipe: Recipe, params: dict, rare, samples: int) -> dict:
    config, labels = recipe.config, np.arange(samples, dtype=np.int32) % recipe.config.num_classes
    out = recipe.sample(params, jax.random.key(1), labels, cfg=0.0)
    tokenizer, variables = config.build_tokenizer(), modules(params).get("tokenizer", {})
    again = tokenizer.apply(variables, tokenizer.apply(variables, jnp.asarray(rare), method="encode"), method="decode")
    test = _images(config.data, "test")[0]
    row = {
        "PSNR of tokens, rarest tenth": round(float(psnr(jnp.asarray(rare), again).mean()), 2),
        "detail, share of real": round(detail(np.asarray(out["images"])) / detail(test), 3),
        "opens": "",
        "valid": "",
        "bytes a file": "",
    }
    if "valid" in out:
        codec = tokenizer.codec
        files = [tokenizer.file(tokens) for tokens in np.asarray(out["tokens"])]
        if hasattr(codec, "opens"):
            row["opens"] = round(float(np.mean([codec.opens(codec.file(data)) for data in files])), 4)
        row["valid"] = round(float(np.mean(np.asarray(out["valid"]))), 4)
        row["bytes a file"] = round(float(np.mean([len(data) for data in files])), 1)
    return row
