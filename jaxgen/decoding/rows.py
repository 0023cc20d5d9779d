"""Sampling a grid row by row: what depends on the rows above once a row, what depends on the left once a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxgen.decoding.next_scale import Settings
from jaxgen.decoding.next_token import sample_tokens
from jaxgen.decoding.step import StepFn
from jaxgen.orders import raster

__all__ = ["Enter", "sample_rows"]

Enter = Callable[[Any, Any, Int[Array, "2b n"], Int[Array, ""], Any], tuple[Any, Any]]
"""`(params, caches, row above, row, cond) -> (context, caches)`: what a model works out once a row, for all its columns."""


def sample_rows(
    enter: Enter,
    step: StepFn,
    *,
    params: Any,
    caches: Any,
    cache: Any,
    cond: Any,
    batch: int,
    shape: tuple[int, int],
    key: Key[Array, ""],
    settings: Settings = Settings(),
) -> Int[Array, "b l"]:
    """Samples a grid of tokens, in raster order (the semi-parallel sampling of Ho et al. 2019, section 3.3).

    Args:
      enter: called once a row, on the tokens of the row above, which are zeros before the first.
      step: as for `sample_tokens`, with positions within a row; its condition is (cond, context, row).
      params: passed to both.
      caches: of `enter`, empty; a pytree of arrays.
      cache: of `step`, empty, with room for a row.
      cond: the model's condition, rows [2b]: conditional then unconditional.
      batch: b.
      shape: rows and columns.
      key: a token's noise depends on the key, its place in the batch, its row and its column.
      settings: `cfg` is the weight of guidance, one number or one for each position, [l].
    """
    rows, columns = shape
    weights = jnp.broadcast_to(settings.cfg, (rows * columns,)).reshape(shape)

    def one(i, carry):
        tokens, caches = carry
        above = jax.lax.dynamic_index_in_dim(tokens, jnp.maximum(i - 1, 0), axis=1, keepdims=False)
        context, caches = enter(params, caches, jnp.concatenate([above, above]), i, cond)
        line = sample_tokens(
            step,
            params=params,
            cache=cache,
            cond=(cond, context, i),
            batch=batch,
            order=raster(columns),
            key=jax.random.fold_in(key, i),
            settings=settings._replace(cfg=weights[i]),
        )
        return jax.lax.dynamic_update_index_in_dim(tokens, line, i, axis=1), caches

    tokens, _ = jax.lax.fori_loop(0, rows, one, (jnp.zeros((batch, rows, columns), jnp.int32), caches))
    return tokens.reshape(batch, rows * columns)
