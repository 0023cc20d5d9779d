"""S020 D-AR: a Llama of tokens whose prefixes are the steps of a diffusion; streaming previews."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgen.data import image_batches, pixels
from jaxgen.decoding import Settings
from jaxgen.generators.diffusion_sampler import DiffusionSampler
from jaxgen.metrics import psnr
from jaxgen.nn.perceptual import NO_PERCEPTUAL, load_perceptual, lpips
from jaxgen.objectives.alignment import cosine_distance
from jaxgen.optim import OptimConfig, adamw
from jaxgen.quantizers import CodebookState
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig, feature_stage, image_features
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.next_scale import RULES
from jaxgen.recipes.tokenizer import reviving
from jaxgen.tokenizers.diffusion import DiffusionTokenizer

__all__ = ["DiffusionTokenizerConfig", "DiffusionTokenizerTrainConfig", "DiffusionTokensConfig", "diffusion_tokenizer_stage"]


@dataclasses.dataclass(frozen=True)
class DiffusionTokenizerConfig:
    """Sizes of `DiffusionTokenizer`; channels come from the data."""

    side: int = 256
    patch: int = 16
    length: int = 256
    groups: int = 8
    vocab: int = 16384
    width: int = 8
    beta: float = 0.25
    codebook_init: float = 1.0
    hidden: int = 768
    heads: int = 12
    encoder_depth: int = 8
    causal_depth: int = 8
    decoder_depth: int = 12
    decoder_patch: int = 8
    std: float = 0.6
    shift: float = 2.0
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(side=1, patch=1, length=1, groups=1, vocab=1, width=1, hidden=1, heads=1)
        depths = dict(encoder_depth=1, causal_depth=1, decoder_depth=1, decoder_patch=1)
        check_fields("tokenizer", self, **sizes, **depths, beta=0, std=1e-3, shift=1e-3)
        check_dtype("tokenizer", self.dtype)
        try:
            self.build(3)
        except ValueError as error:
            raise ValueError(f"tokenizer.{error}") from None

    def build(self, channels: int) -> DiffusionTokenizer:
        """The module, for images of so many channels."""
        return DiffusionTokenizer(**dataclasses.asdict(self) | dict(channels=channels, dtype=jnp.dtype(self.dtype)))


@dataclasses.dataclass(frozen=True)
class DiffusionTokenizerTrainConfig:
    """How a diffusion tokenizer is trained.

    Attributes:
      steps: updates; 0 takes the tokenizer from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      perceptual_weight: of the LPIPS distance between an image and what the velocity points to; needs `perceptual_path`.
      align_weight: of the mean of 1 - cos(what the decoder's patches say, what an encoder says of the image there).
      align_after: blocks of the decoder before the patches that are compared.
      align_hidden: width of the layers in between, which only training has.
      perceptual_path, lpips_path, revive_every, revive_threshold, optim: see `TokenizerTrainConfig`.
    """

    steps: int = 1000
    batch_size: int = 256
    accumulate: int = 1
    ema: float = 0.0
    perceptual_weight: float = 0.5
    perceptual_path: str = ""
    lpips_path: str = ""
    align_weight: float = 0.0
    align_after: int = 8
    align_hidden: int = 2048
    revive_every: int = 100
    revive_threshold: float = 0.03
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        least = dict(steps=0, batch_size=1, accumulate=1, perceptual_weight=0, revive_every=0, revive_threshold=0)
        align = dict(align_weight=0, align_after=1, align_hidden=1)
        check_fields("tokenizer_train", self, **least, **align, shares=("ema",))

    @property
    def aligned(self) -> bool:
        """Whether there is an encoder to align with."""
        return self.steps > 0 and self.align_weight > 0


@dataclasses.dataclass(frozen=True)
class DiffusionTokensConfig(ImageLlamaConfig):
    """`ImageLlamaConfig` on the tokens of a diffusion, which lie in a row.

    Attributes:
      features, features_train: the encoder that `tokenizer_train.align_weight` aligns with; without a weight there is none.

    Raises:
      ValueError: an alignment behind more blocks than the decoder has, or whose patches are not whole ones of the decoder.
    """

    tokenizer: DiffusionTokenizerConfig = DiffusionTokenizerConfig()
    tokenizer_train: DiffusionTokenizerTrainConfig = DiffusionTokenizerTrainConfig()
    features: FeatureConfig = FeatureConfig()
    features_train: FeatureTrainConfig = FeatureTrainConfig(steps=0)

    def __post_init__(self):
        train, sizes = self.tokenizer_train, self.tokenizer
        if not train.aligned:
            return
        if train.align_after > sizes.decoder_depth:
            depth = f"the decoder has tokenizer.decoder_depth={sizes.decoder_depth} blocks"
            raise ValueError(f"tokenizer_train.align_after={train.align_after}: {depth}")
        if sizes.side // sizes.decoder_patch % self.features.grid:
            cells = sizes.side // sizes.decoder_patch
            raise ValueError(f"features.grid={self.features.grid}: does not divide the decoder's {cells} patches along a side")

    def resolve(self) -> DiffusionTokensConfig:
        """See `NextScaleConfig.resolve`."""
        size = next(iter(image_batches(self.data, 1, "test", 0, 1)))["image"].shape[1:3]
        if size != (self.tokenizer.side,) * 2:
            raise ValueError(
                f"images of {size[0]}x{size[1]} (data.path={self.data.path}, data.image_size={self.data.image_size}): "
                f"tokenizer.side={self.tokenizer.side}"
            )
        return super().resolve()

    def build_tokenizer(self) -> DiffusionTokenizer:
        """The tokenizer module."""
        return self.tokenizer.build(self.data.channels)

    def _generator_fields(self) -> dict:
        fields = dict(vocab=self.tokenizer.vocab, grid=(self.tokenizer.length,), dtype=jnp.dtype(self.model.dtype))
        return dataclasses.asdict(self.model) | fields

    def build_sampler(self) -> DiffusionSampler:
        """From key and labels to images."""
        return DiffusionSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def tokenizer_stage(self) -> Stage:
        """What trains the tokenizer."""
        return diffusion_tokenizer_stage(self)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        encoder = [feature_stage(self.features, self.features_train, self.data)] if self.tokenizer_train.aligned else []
        return dataclasses.replace(base, stages=(*encoder, *base.stages), sample=functools.partial(_sample, self.build_sampler()))


class FeatureProjector(nn.Module):
    """From the decoder's patches to features of an encoder: dense, SiLU, dense, SiLU, dense (the authors' `repa_out`).

    Attributes:
      hidden: width in between.
      width: of the features.
    """

    hidden: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        for _ in range(2):
            x = nn.silu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.width)(x)


def diffusion_tokenizer_stage(config: DiffusionTokensConfig) -> Stage:
    """Flow matching at random times, the codes' loss, and a perceptual distance of what the velocity points to (section 3.3).

    With `align_weight` also the alignment of the decoder's patches, averaged where they are smaller, with an encoder's (REPA, Yu
    et al. 2025, arXiv:2410.06940, as in the authors' code). Its projection is trained beside the tokenizer.
    """
    train, tokenizer = config.tokenizer_train, config.build_tokenizer()
    projector = FeatureProjector(train.align_hidden, config.features.width)

    def init(key, frozen):
        shape = (1, *tokenizer.image_size, tokenizer.channels)
        params = {"tokenizer": tokenizer.init(key, jnp.zeros(shape))}
        if train.aligned:
            params["projector"] = projector.init(jax.random.fold_in(key, 1), jnp.zeros((1, tokenizer.hidden)))
        state = {"codebook": CodebookState.zeros(tokenizer.vocab, tokenizer.width, max(tokenizer.vocab, 256))}
        if train.perceptual_path:
            state["perceptual"] = load_perceptual(train.perceptual_path, train.lpips_path or None)
        return params, state

    def misalignment(params, frozen, images, hidden):
        grid = config.features.grid
        patches = einops.reduce(hidden, "b (h p) (w q) d -> b (h w) d", "mean", h=grid, w=grid)
        told = image_features(config.features, modules(frozen)["encoder"], images)[:, 1:]
        return cosine_distance(projector.apply(params["projector"], patches), told).mean()

    def loss(params, state, batch, key, step, frozen):
        time_key, noise_key, codebook_key = jax.random.split(key, 3)
        images = pixels(batch["image"])
        u, noise = jax.random.uniform(time_key, (len(images),)), jax.random.normal(noise_key, images.shape)
        out = tokenizer.apply(params["tokenizer"], images, u, noise, after=train.align_after if train.aligned else 0)
        metrics = {"flow": out.error.mean(), "vq": out.quantized.loss}
        value = metrics["flow"] + metrics["vq"]
        if train.perceptual_path:
            metrics["perceptual"] = lpips(state["perceptual"], images, out.images).mean()
            value = value + train.perceptual_weight * metrics["perceptual"]
        if train.aligned:
            distance = misalignment(params, frozen, images, out.hidden)
            metrics["alignment"] = 1 - distance
            value = value + train.align_weight * distance
        metrics["codebook_use"] = (out.quantized.counts > 0).mean()
        codebook = state["codebook"].update(out.quantized.counts, out.quantized.vectors, codebook_key)
        return value, (metrics, state | {"codebook": codebook})

    def eval_loss(params, state, batch, key, frozen):
        images = pixels(batch["image"])
        again = tokenizer.apply(params["tokenizer"], images, method="encode")
        again = tokenizer.apply(params["tokenizer"], again, method="decode")
        error = jnp.square(images - again).mean()
        return {"loss": error, "psnr": psnr(images, again).mean()}

    missing = train.steps and train.perceptual_weight and not train.perceptual_path
    return Stage(
        name="tokenizer",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(image_batches, config.data, train.batch_size, "train"),
        needs=("encoder",) if train.aligned else (),
        after_update=reviving(train, tokenizer) if train.revive_every else None,
        eval_data=functools.partial(image_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=((r"projector/.*kernel", P("fsdp", "tensor")), *RULES),
        notes=(f"{NO_PERCEPTUAL} (tokenizer_train.perceptual_path and .lpips_path)",) if missing else (),
    )


def _sample(sampler: DiffusionSampler, params: Mapping[str, Any], key, labels, *, groups: int = 0, **settings) -> dict:
    """Images of classes; settings are those of `jaxgen.decoding.Settings`.

    Args:
      groups: stops after so many groups of tokens, at the preview that they give; 0 makes all.

    Returns:
      "images" [b, H, W, C] and "tokens" [b, k].

    Raises:
      ValueError: more groups than there are, or see `NextTokenSampler`.
    """
    sampler = dataclasses.replace(sampler, groups=groups)
    images, tokens = sampler(modules(params), key, labels, Settings(**settings))
    return {"images": images, "tokens": tokens}
