"""A small residual image classifier: the judge of generated samples, and the features for Fréchet distances."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.nn.conv import Downsample, ResBlock, group_norm

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Residual blocks at falling resolution and rising width, averaged over positions, then one dense layer.

    The parameters do not depend on the image size: 8x8 digits and 64x64 photographs take the same network.

    Attributes:
      num_classes: of the logits.
      width: channels at full resolution, doubled at every level; a multiple of 8.
      levels: resolutions, each half the one before.
      blocks: residual blocks a level.
      dropout: rate before the dense layer, while training.
      dtype: of the computation; features and logits are float32.

    Example:
      >>> model = Classifier(num_classes=10)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> model.apply(variables, images)  # logits [b, 10]
      >>> model.apply(variables, images, method="features")  # [b, 128]
    """

    num_classes: int
    width: int = 32
    levels: int = 3
    blocks: int = 1
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        for name in ("num_classes", "levels", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 1")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width={self.width}: must be a positive multiple of 8")
        self.trunk = _Trunk(self.width, self.levels, self.blocks, self.dtype)
        self.drop = nn.Dropout(self.dropout)
        # Zero: the first predictions are uniform, whatever the width.
        self.head = nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)

    def features(self, images: Float[Array, "b H W C"]) -> Float[Array, "b d"]:
        """What the last layer sees; d = width * 2^(levels - 1). Raises as a call does."""
        if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images of shape {images.shape} and dtype {images.dtype}: expected floats [b, H, W, C]")
        smallest = 2 ** (self.levels - 1)
        if min(images.shape[1:3]) < smallest:
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]}: levels={self.levels} needs {smallest} a side")
        return self.trunk(images)

    def __call__(self, images: Float[Array, "b H W C"], train: bool = False) -> Float[Array, "b v"]:
        """Logits.

        Args:
          images: in [-1, 1].
          train: applies dropout; needs a `dropout` rng where its rate is not 0.

        Raises:
          ValueError: images that are not floats [b, H, W, C], or too small to be halved `levels` - 1 times.
        """
        return self.head(self.drop(self.features(images), deterministic=not train))


class _Trunk(nn.Module):
    width: int
    levels: int
    blocks: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b H W C"]) -> Float[Array, "b d"]:
        x = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="stem")(x.astype(self.dtype))
        for level in range(self.levels):
            if level:
                x = Downsample(dtype=self.dtype, name=f"down{level}")(x)
            for block in range(self.blocks):
                channels = self.width * 2**level
                x = ResBlock(channels, groups=8, dtype=self.dtype, name=f"level{level}_block{block}")(x)
        x = nn.silu(group_norm(8, "norm")(x))
        return x.astype(jnp.float32).mean(axis=(1, 2))
