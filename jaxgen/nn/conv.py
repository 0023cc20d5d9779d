"""Blocks of the VQGAN-family convolutional autoencoders (Esser et al. 2021; layout of the published f16 models)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.nn.attention import attend

__all__ = ["AttentionBlock", "Downsample", "ResBlock", "Upsample", "group_norm"]


def group_norm(groups: int, name: str) -> nn.GroupNorm:
    """Group norm with epsilon 1e-6 and an exact (two-pass) variance, in float32."""
    return nn.GroupNorm(num_groups=groups, epsilon=1e-6, use_fast_variance=False, name=name)


class ResBlock(nn.Module):
    """Two (norm, SiLU, 3x3 conv) and a shortcut, 1x1 where the number of channels changes.

    Attributes:
      channels: of the output.
      groups: of the norms.
      dropout: rate before the second convolution.
    """

    channels: int
    groups: int = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w c2"]:
        h = nn.silu(group_norm(self.groups, "norm1")(x)).astype(self.dtype)
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(h)
        h = nn.silu(group_norm(self.groups, "norm2")(h)).astype(self.dtype)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with a residual."""

    groups: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        normed = group_norm(self.groups, "norm")(x).astype(self.dtype)
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(normed).reshape(b, h * w, 3, 1, c)
        out = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, h, w, c)
        return x + nn.Dense(c, dtype=self.dtype, name="proj")(out)


class Downsample(nn.Module):
    """Halves height and width: 3x3 conv, stride 2, zero padding at the bottom and right only."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
        pad = ((0, 1), (0, 1))
        return nn.Conv(x.shape[-1], (3, 3), strides=2, padding=pad, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 conv."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        return nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="conv")(x)
