"""Features that should agree: their cosine, and the contrastive loss that tells pairs apart."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.objectives.likelihood import cross_entropy

__all__ = ["cosine_distance", "info_nce"]


def cosine_distance(x: Float[Array, "*b d"], y: Float[Array, "*b d"]) -> Float[Array, "*b"]:
    """1 - cos(x, y), in [0, 2], half the squared distance of the unit vectors; axes of the others broadcast.

    Where x or y is 0 it is 1, and its gradient is finite.
    """
    x, y = _unit(x), _unit(y)
    return 1 - jnp.sum(x * y, axis=-1)


def info_nce(x: Float[Array, "b d"], y: Float[Array, "b d"], *, temperature: float = 0.1) -> Float[Array, ""]:
    """How hard it is to find the y of each x among all of the batch, and the x of each y, in nats.

    The mean of -log softmax(x_i . y / t)_i over both directions, of unit vectors (van den Oord et al. 2018, equation 4).

    Args:
      x: row i belongs to row i of `y`.
      y: features of other views of the same things.
      temperature: t.
    """
    logits = _unit(x) @ _unit(y).T / temperature
    own = jnp.arange(len(logits))
    return (cross_entropy(logits, own).mean() + cross_entropy(logits.T, own).mean()) / 2


def _unit(x):
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
