"""Attention of a few rows to a cache in plain XLA: a loop over chunks of positions that ends at the longest length.

It always works, and its gradient is that of every implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.decode.problem import Problem
from kernels_pallas.device import Device

__all__ = ["backward", "forward", "refuses"]


def refuses(problem: Problem, device: Device) -> str | None:
    """None: it computes every problem everywhere."""
    return None


def forward(q, k_cache, v_cache, lengths, *, layer, problem: Problem, device: Device):
    """Attention of rows to the first `lengths` positions, by online softmax (Milakov and Gimelshein 2018, algorithm 3).

    Args:
      q: [b, g, n, d].
      k_cache: [b, s, g, d], or [layers, b, s, g, d] with a layer.
      v_cache: alike.
      lengths: int32 [b] in 0..s.
      layer: which of the layers, or None.
      problem: static facts; `batch` decides nothing but the size of chunks.
      device: only a CPU takes small chunks.

    Returns:
      (o float32 [b, g, n, d], lse float32 [b, g, n]); 0 and -inf where the length is 0.
    """

    def step(start, live, carry):
        acc, m, l = carry
        # What lies in k past the lengths may be anything, too, but its scores are discarded.
        k, v = _part(k_cache, start, live.shape[1], layer), _chunk(v_cache, start, live, layer)
        s = jnp.where(live[:, None, None, :], _dot("bgnd,bsgd->bgns", q, k) * problem.scale, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=-1))
        finite = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        alpha, p = jnp.exp(m - finite), jnp.exp(s - finite[..., None])
        acc = acc * alpha[..., None] + _dot("bgns,bsgd->bgnd", p.astype(v.dtype), v)
        return acc, m_new, l * alpha + p.sum(axis=-1)

    rows = jnp.zeros(q.shape[:3], jnp.float32)
    start = jnp.zeros(q.shape, jnp.float32), rows - jnp.inf, rows
    acc, m, l = _loop(step, start, lengths, problem, _chunk_length(problem, device))
    return acc / jnp.where(l == 0, 1.0, l)[..., None], m + jnp.log(l)


def backward(q, k_cache, v_cache, lengths, o, lse, do, dlse, *, problem: Problem, device: Device):
    """Cotangents of q and the caches, from the scores computed anew.

    With p = exp(s - lse), ds = p (do . v - do . o + dlse): the softmax's Jacobian, and that of its log-sum-exp.

    Args:
      q, lengths: as `forward`'s.
      k_cache, v_cache: [b, s, g, d].
      o: float32 [b, g, n, d], its result.
      lse: float32 [b, g, n], its other result.
      do: float32 [b, g, n, d], cotangent of o.
      dlse: float32 [b, g, n], cotangent of lse.
      problem, device: as `forward`'s.

    Returns:
      (dq, dk_cache, dv_cache), in the dtypes of what they belong to; zero past the lengths.
    """
    delta = (do * o).sum(axis=-1) - dlse
    do = do.astype(q.dtype)

    def step(start, live, carry):
        dq, dk_cache, dv_cache = carry
        k, v = _chunk(k_cache, start, live), _chunk(v_cache, start, live)
        mask = live[:, None, None, :]
        # A dead sequence has lse = -inf and whatever the caller made of it in dlse: both are discarded here.
        p = jnp.exp(jnp.where(mask, _dot("bgnd,bsgd->bgns", q, k) * problem.scale - lse[..., None], -jnp.inf))
        ds = jnp.where(mask, p * (_dot("bgnd,bsgd->bgns", do, v) - delta[..., None]), 0.0) * problem.scale
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dq += _dot("bgns,bsgd->bgnd", ds, k)
        dk_cache = _add(dk_cache, start, _dot("bgns,bgnd->bsgd", ds, q))
        dv_cache = _add(dv_cache, start, _dot("bgns,bgnd->bsgd", p, do))
        return dq, dk_cache, dv_cache

    start = jnp.zeros(q.shape, jnp.float32), jnp.zeros_like(k_cache), jnp.zeros_like(v_cache)
    dq, dk_cache, dv_cache = _loop(step, start, lengths, problem, _chunk_length(problem, device))
    return dq.astype(q.dtype), dk_cache, dv_cache


def _chunk_length(problem: Problem, device: Device) -> int:
    """Positions that a turn of the loop reads.

    Scores of a sequence take at most 512 KiB, or 256 positions of them. A CPU gains from fewer: the keys of all sequences, which
    a product wants in another order, then stay in its cache (64 KiB, or 16 positions), and less is read past the lengths.
    """
    chunk = max(256, min(1024, (1 << 17) // (problem.queries * problem.heads)))
    if device.platform == "cpu":
        position = problem.batch * problem.kv_heads * problem.head_size * jnp.dtype(problem.dtype).itemsize
        chunk = min(chunk, max(16, (1 << 16) // position))
    return min(problem.length, chunk)


def _loop(step: Callable, carry, lengths, problem: Problem, chunk: int):
    """`carry = step(start, live, carry)` over chunks; live bool [b, chunk] marks the positions to attend to."""

    def body(i, carry):
        # The last chunk of a cache that is no multiple begins early; what it repeats is not live.
        start = jnp.minimum(i * chunk, problem.length - chunk)
        position = start + jnp.arange(chunk)
        live = (position >= i * chunk) & (position < lengths[:, None])
        return step(start, live, carry)

    return lax.fori_loop(0, (lengths.max() + chunk - 1) // chunk, body, carry)


def _chunk(cache, start, live, layer=None):
    """Positions of a cache, cleared where not live: 0 * NaN is NaN, and what lies there may be anything."""
    part = _part(cache, start, live.shape[1], layer)
    return jnp.where(live[:, :, None, None], part, jnp.zeros_like(part))


def _part(cache, start, size, layer=None):
    if layer is None:
        cache, layer = cache[None], 0
    _, b, _, g, d = cache.shape
    return lax.dynamic_slice(cache, (layer, 0, start, 0, 0), (1, b, size, g, d))[0]


def _add(cache, start, part):
    old = lax.dynamic_slice_in_dim(cache, start, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(cache, old + part.astype(cache.dtype), start, axis=1)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
