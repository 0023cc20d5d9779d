"""Measures of a model of captions: how much the right caption says of an image, and whether samples are what theirs say."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen.data import pixels
from jaxgen.data.text import decode_bytes
from jaxgen.data.world_captions import parse
from jaxgen.data.world_oracle import attribute_scores, perceive
from jaxgen.hosts import to_host
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.recipe import modules
from jaxgen.recipes.captions import CaptionLlamaConfig
from jaxgen.recipes.evaluation import held_out, measure_reconstruction, sample_many

__all__ = ["caption_likelihoods", "evaluate_captions", "world_agreement"]


def evaluate_captions(
    recipe,
    params: Mapping[str, Any],
    key,
    *,
    num: int,
    batch_size: int,
    settings: dict,
    limit: int = 1000,
    mesh: Mesh | None = None,
) -> tuple[dict, np.ndarray]:
    """Everything that can be measured of a trained model of captions, on captions of held-out images.

    Args:
      recipe: of a `CaptionLlamaConfig`.
      params: by stage.
      key: for the samples.
      num: samples, one a caption; captions come again where there are fewer.
      batch_size: of sampling.
      settings: of sampling.
      limit: images whose reconstructions and likelihoods are measured.
      mesh: where `params` lie and samples are made.

    Returns:
      ({"reconstruction": ..., "likelihood": ..., "generation": ...}, the samples [num, H, W, C]); with the world's data the
      oracle's "agreement" of samples, of the held-out images and of their reconstructions (see `world_agreement`) is part of
      "generation".
    """
    config, variables = recipe.config, modules(params)
    if num < 2:
        raise ValueError(f"num={num}: expected at least 2 samples, one a caption")
    parts = list(held_out(config.data, batch_size=64, limit=num))
    real, captions = (np.concatenate([part[name] for part in parts]) for name in ("image", "caption"))
    asked = np.resize(np.arange(len(captions)), num)
    images = sample_many(recipe, params, key, captions[asked], batch_size=min(batch_size, num), mesh=mesh, **settings)
    if mesh is not None:
        variables = to_host(variables)
    tokenizer = config.build_tokenizer()
    generation: dict[str, Any] = {"settings": dict(settings), "samples": num}
    if config.data.path == "world":
        texts = decode_bytes(captions, (captions > 0).sum(axis=1))
        copies = [_reconstruct(tokenizer, variables["tokenizer"], part["image"]) for part in parts]
        generation["agreement"] = {
            "samples": world_agreement(images, [texts[i] for i in asked]),
            "reconstructions": world_agreement(np.concatenate(copies), texts),
            "real": world_agreement(real, texts),
        }
    else:
        generation["note"] = "not judged: only of the world's pictures an oracle knows what captions say (data.path=world)"
    results = {
        "reconstruction": measure_reconstruction(tokenizer, variables["tokenizer"], config.data, limit=limit),
        "likelihood": caption_likelihoods(config, variables, limit=limit),
        "generation": generation,
    }
    return results, images


def world_agreement(images: np.ndarray, captions: Sequence[str]) -> dict[str, Any]:
    """How often pictures are what their captions say to the oracle, and what captions of other pictures say.

    Args:
      images: uint8, or floats in [-1, 1], [n, H, W, 3].
      captions: n of the world's grammar, in random order.

    Returns:
      "right" and "shuffled", the share of pictures of which the whole caption is true, with each picture's own and with the one
      after it, which is chance; and "attributes", the same for each of `attribute_scores` over the captions that say such a
      thing.

    Raises:
      ValueError: unequal numbers, fewer than two, or a caption outside the grammar.
    """
    if len(images) != len(captions) or len(images) < 2:
        raise ValueError(f"{len(images)} images and {len(captions)} captions: expected as many, and two at least")
    said = [parse(caption) for caption in captions]
    scenes = [perceive(np.asarray(image)) for image in images]
    pairs = {"right": said, "shuffled": [*said[1:], said[0]]}
    result: dict[str, Any] = {}
    attributes: dict[str, dict] = collections.defaultdict(dict)
    for name, others in pairs.items():
        result[name] = float(np.mean([caption.holds(scene) for caption, scene in zip(others, scenes)]))
        scores = [attribute_scores(caption, scene) for caption, scene in zip(others, scenes)]
        for kind in sorted(set().union(*scores)):
            values = [score[kind] for score in scores if kind in score]
            attributes[kind] |= {name: float(np.mean(values)), "captions": len(values)}
    return result | {"attributes": dict(attributes)}


def caption_likelihoods(config: CaptionLlamaConfig, variables: Mapping[str, Any], *, limit: int, batch_size: int = 64) -> dict:
    """Mean negative log-likelihood in nats a token of held-out images, with their captions and with those of other images.

    Args:
      config: whose data's test split is read.
      variables: by module.
      limit: images at most.
      batch_size: captions are exchanged within a batch.
    """
    totals, count = np.zeros(2), 0
    for batch in held_out(config.data, batch_size=batch_size, limit=limit):
        totals += np.asarray(_nll(config, variables, batch["image"], batch["caption"])) * len(batch["image"])
        count += len(batch["image"])
    return dict(zip(("nll", "nll_shuffled"), (totals / count).tolist())) | {"images": count}


@functools.partial(jax.jit, static_argnums=0)
def _nll(config: CaptionLlamaConfig, variables, images, captions):
    tokenizer, generator = config.build_tokenizer(), config.build_generator()
    tokens = tokenizer.apply(variables["tokenizer"], pixels(images), method="encode")

    def mean(captions):
        words = config.condition(variables, {"caption": captions})
        return cross_entropy(generator.apply(variables["generator"], words, tokens), tokens).mean()

    return jnp.stack([mean(captions), mean(jnp.roll(captions, 1, axis=0))])


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer, variables, images):
    return tokenizer.apply(variables, tokenizer.apply(variables, pixels(images), method="encode"), method="decode")
