"""A frozen encoder of images: trained here without labels, or a published one that was put into the work directory.

The training: two views of an image should have features that are alike, and unlike those of other images (Chen et al. 2020,
*SimCLR*), where each view shows only some of its patches (Assran et al. 2022, *Masked Siamese Networks*). Both the features of
the whole and the mean of the patches' are compared, in one space, so that patches can be compared with the whole.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxgen.data import DataConfig, image_batches, pixels
from jaxgen.nn.feature_vit import IMAGENET, FeatureViT
from jaxgen.objectives.alignment import info_nce
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Stage
from jaxgen.recipes.classifier import random_shift
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.resample import resize

__all__ = ["FeatureConfig", "FeatureTrainConfig", "feature_stage", "image_features"]


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Sizes of `FeatureViT`, and how images reach it.

    Attributes:
      width, depth, heads, patch, mlp_ratio, gated_mlp, layer_scale, dtype: see `FeatureViT`.
      grid: patches along a side; images of other sizes are resampled.
      positions: see `FeatureViT`; 0 is `grid`.
      registers: see `FeatureViT`.
      imagenet: pixels are standardised as those of ImageNet, which published encoders expect.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 14
    grid: int = 16
    positions: int = 0
    registers: int = 0
    mlp_ratio: float = 4.0
    gated_mlp: bool = False
    layer_scale: float = 1e-5
    imagenet: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(width=1, depth=1, heads=1, patch=1, grid=1, positions=0, registers=0)
        check_fields("features", self, **sizes, mlp_ratio=0.1, layer_scale=0)
        check_dtype("features", self.dtype)
        if self.width % self.heads:
            raise ValueError(f"features.heads={self.heads} does not divide features.width={self.width}")

    def build(self, channels: int) -> FeatureViT:
        """The module, for images of `channels`."""
        fields = dataclasses.asdict(self) | dict(positions=self.positions or self.grid, dtype=jnp.dtype(self.dtype))
        for name in ("grid", "imagenet"):
            fields.pop(name)
        if self.imagenet and channels != 3:
            raise ValueError(f"features.imagenet=True: expected images of 3 channels, not {channels}")
        return FeatureViT(channels=channels, **fields | (IMAGENET if self.imagenet else {}))


@dataclasses.dataclass(frozen=True)
class FeatureTrainConfig:
    """How an encoder is trained.

    Attributes:
      steps: updates; 0 takes the encoder from the work directory as it is.
      batch_size: global.
      ema: decay, 0 is off.
      temperature: see `info_nce`.
      masked: share of the patches that a view does not show.
      shift: pixels by which a view is moved at most, along each side.
      noise: standard deviation of what is added to a view's pixels.
      projection: width of the vectors that are compared.
      optim: AdamW and its schedule.
    """

    steps: int = 1000
    batch_size: int = 256
    ema: float = 0.0
    temperature: float = 0.1
    masked: float = 0.5
    shift: int = 1
    noise: float = 0.1
    projection: int = 128
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        counts = dict(steps=0, batch_size=1, shift=0, noise=0, projection=1)
        check_fields("features_train", self, **counts, shares=("ema", "masked"))
        if not self.temperature > 0:
            raise ValueError(f"features_train.temperature={self.temperature}: expected a positive number")


class Projector(nn.Module):
    """Dense, GELU, dense: what is compared; see `FeatureTrainConfig.projection`."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b p"]:
        return nn.Dense(self.width)(nn.gelu(nn.Dense(x.shape[-1])(x)))


def image_features(config: FeatureConfig, variables: Any, images: Float[Array, "b H W C"], **options) -> Float[Array, "b 1+n d"]:
    """Features of images in [-1, 1], the whole first; no gradient passes. `options` are those of `FeatureViT`."""
    return jax.lax.stop_gradient(_read(config, variables, images, **options))


def _read(config, variables, images, **options):
    side = config.grid * config.patch
    module = config.build(images.shape[-1])
    return module.apply(variables, resize(images, (side, side), "bicubic"), **options)


def feature_stage(config: FeatureConfig, train: FeatureTrainConfig, data: DataConfig, *, name: str = "encoder") -> Stage:
    """The stage that trains `FeatureViT`; its parameters are `{"encoder": ..., "projector": ...}`, the latter while it trains."""
    module, projector = config.build(data.channels), Projector(train.projection)

    def init(key, frozen):
        keys, side = jax.random.split(key), config.grid * config.patch
        params = {"encoder": module.init(keys[0], jnp.zeros((1, side, side, data.channels)))}
        if train.steps:
            params["projector"] = projector.init(keys[1], jnp.zeros((1, config.width)))
        return params, ()

    def compared(params, images, key):
        """The projections of a view's whole, and of its patches' mean."""
        keys = jax.random.split(key, 3)
        images = random_shift(keys[0], images, train.shift)
        images = images + train.noise * jax.random.normal(keys[1], images.shape)
        masked = jax.random.uniform(keys[2], (len(images), config.grid**2)) < train.masked
        tokens = _read(config, params["encoder"], images, masked=masked)
        parts = (tokens[:, 0], tokens[:, 1:].mean(axis=1))
        return [projector.apply(params["projector"], part) for part in parts]

    def score(params, batch, key):
        views = [compared(params, pixels(batch["image"]), k) for k in jax.random.split(key)]
        return sum(info_nce(x, y, temperature=train.temperature) for x, y in zip(*views)) / 2

    def loss(params, state, batch, key, step, frozen):
        return score(params, batch, key), ({}, state)

    def eval_loss(params, state, batch, key, frozen):
        return {"loss": score(params, batch, key)}

    return Stage(
        name=name,
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(image_batches, data, train.batch_size, "train"),
        eval_data=functools.partial(image_batches, data, train.batch_size, "test") if train.steps else None,
        eval_loss=eval_loss if train.steps else None,
        ema=train.ema,
    )
