"""Noise that depends on the request and the position alone, so that a row's sample does not change with its batch."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int, Key

__all__ = ["gumbel"]


def gumbel(
    key: Key[Array, ""], rows: Int[Array, "b"], pos: Int[Array, "q"], vocab: int, *, stream: int = 0
) -> Float[Array, "b q v"]:
    """Standard Gumbel noise for each (row, position): `argmax(logits + gumbel)` samples from softmax(logits).

    Args:
      key: of the whole call.
      rows: the number of each request.
      pos: absolute positions.
      vocab: v.
      stream: another number gives independent noise at the same place.
    """

    def one(row, position):
        k = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, stream), row), position)
        return jax.random.gumbel(k, (vocab,))

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rows, pos)
