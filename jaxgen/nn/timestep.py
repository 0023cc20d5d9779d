"""Noise levels as vectors."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["TimestepEmbedding", "sinusoids"]


def sinusoids(t: Float[Array, "*b"], size: int, longest: float = 10_000.0) -> Float[Array, "*b k"]:
    """cos(w t), then sin(w t); k / 2 frequencies w fall geometrically from 1 towards 1 / longest (Vaswani et al. 2017)."""
    frequencies = jnp.exp(-math.log(longest) * jnp.arange(size // 2) / (size // 2))
    angles = jnp.asarray(t, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """Sinusoids of a time, through dense, SiLU, dense (Dhariwal & Nichol 2021).

    Attributes:
      width: d, of the result.
      frequencies: k, numbers that the sinusoids are; even.
    """

    width: int
    frequencies: int = 256

    @nn.compact
    def __call__(self, t: Float[Array, "*b"]) -> Float[Array, "*b d"]:
        init = nn.initializers.normal(0.02)
        h = nn.Dense(self.width, kernel_init=init, name="fc1")(sinusoids(t, self.frequencies))
        return nn.Dense(self.width, kernel_init=init, name="fc2")(nn.silu(h))
