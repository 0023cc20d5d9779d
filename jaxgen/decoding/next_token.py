"""Sampling one token, or one run of tokens, after another: one model call each, the loop compiled once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxgen.decoding.guidance import Guided, guide
from jaxgen.decoding.next_scale import Settings
from jaxgen.decoding.noise import gumbel
from jaxgen.decoding.step import StepFn, View
from jaxgen.decoding.transforms import truncate

__all__ = ["sample_tokens"]


def sample_tokens(
    step: StepFn,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    batch: int,
    length: int,
    key: Key[Array, ""],
    settings: Settings = Settings(),
    size: int = 1,
) -> Int[Array, "b l"]:
    """Samples `length` tokens a row.

    Args:
      step: the model, unguided, reading the token `size` places before each position; its cache has 2b rows.
      params: passed to `step`.
      cache: empty, with room for `length / size` steps.
      cond: the model's condition, rows [2b]: conditional then unconditional.
      batch: b.
      length: l.
      key: row i's noise depends on the key, i and the position only.
      settings: `cfg` is the weight t in (1 + t) conditional - t unconditional, one number or one for each position, [l].
      size: n, tokens a call; they are independent of one another given those of earlier calls.

    Raises:
      ValueError: a size that does not divide the length.
    """
    if size < 1 or length % size:
        raise ValueError(f"size={size}: must divide length={length}")
    guided, rows = guide(step), jnp.arange(batch)
    weights = jnp.broadcast_to(settings.cfg, (length,))
    cache = dataclasses.replace(cache, length=jnp.int32(cache.length))

    def one(i, carry):
        tokens, cache = carry
        before = jax.lax.dynamic_slice_in_dim(tokens, jnp.maximum(i - 1, 0) * size, size, axis=1)
        pos = i * size + jnp.arange(size)
        out, cache = guided(params, cache, View(before, pos), Guided(cond, weights[pos][:, None]))
        logits = truncate(out.params, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        ids = jnp.argmax(logits + gumbel(key, rows, pos, logits.shape[-1]), axis=-1).astype(jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(tokens, ids, i * size, axis=1), cache.commit(1)

    tokens, _ = jax.lax.fori_loop(0, length // size, one, (jnp.zeros((batch, length), jnp.int32), cache))
    return tokens
