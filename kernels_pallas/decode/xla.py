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


def forward(q, k_cache, v_cache, lengths, *, problem: Problem, device: Device):
    """Attention of rows to the first `lengths` positions, by online softmax (Milakov and Gimelshein 2018, algorithm 3).

    Args:
      q: [b, g, n, d].
      k_cache: [b, s, g, d].
      v_cache: [b, s, g, d].
      lengths: int32 [b] in 0..s.
      problem: static facts; `batch` is not used.
      device: not used.

    Returns:
      (o float32 [b, g, n, d], lse float32 [b, g, n]); 0 and -inf where the length is 0.
    """

    def step(start, live, carry):
        acc, m, l = carry
        k, v = _chunk(k_cache, start, live), _chunk(v_cache, start, live)
        s = jnp.where(live[:, None, None, :], _dot("bgnd,bsgd->bgns", q, k) * problem.scale, -jnp.inf)
        m_new = jnp.maximum(m, s.max(axis=-1))
        finite = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        alpha, p = jnp.exp(m - finite), jnp.exp(s - finite[..., None])
        acc = acc * alpha[..., None] + _dot("bgns,bsgd->bgnd", p.astype(v.dtype), v)
        return acc, m_new, l * alpha + p.sum(axis=-1)

    rows = jnp.zeros(q.shape[:3], jnp.float32)
    acc, m, l = _loop(step, (jnp.zeros(q.shape, jnp.float32), rows - jnp.inf, rows), k_cache, lengths, problem)
    return acc / jnp.where(l == 0, 1.0, l)[..., None], m + jnp.log(l)


def backward(q, k_cache, v_cache, lengths, o, lse, do, dlse, *, problem: Problem, device: Device):
    """Cotangents of q and the caches, from the scores computed anew.

    With p = exp(s - lse), ds = p (do . v - do . o + dlse): the softmax's Jacobian, and that of its log-sum-exp.

    Args:
      q, k_cache, v_cache, lengths: as `forward`'s.
      o: float32 [b, g, n, d], its result.
      lse: float32 [b, g, n], its other result.
      do: float32 [b, g, n, d], cotangent of o.
      dlse: float32 [b, g, n], cotangent of lse.
      problem: static facts; `batch` is not used.
      device: not used.

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
    dq, dk_cache, dv_cache = _loop(step, start, k_cache, lengths, problem)
    return dq.astype(q.dtype), dk_cache, dv_cache


def _loop(step: Callable, carry, cache, lengths, problem: Problem):
    """`carry = step(start, live, carry)` over chunks; live bool [b, chunk] marks the positions to attend to."""
    s = cache.shape[1]
    # Scores of a sequence take at most 512 KiB, or 256 positions of them.
    chunk = min(s, max(256, min(1024, (1 << 17) // (problem.queries * problem.heads))))

    def body(i, carry):
        # The last chunk of a cache that is no multiple begins early; what it repeats is not live.
        start = jnp.minimum(i * chunk, s - chunk)
        position = start + jnp.arange(chunk)
        live = (position >= i * chunk) & (position < lengths[:, None])
        return step(start, live, carry)

    return lax.fori_loop(0, (lengths.max() + chunk - 1) // chunk, body, carry)


def _chunk(cache, start, live):
    """Positions of a cache, cleared where not live: 0 * NaN is NaN, and what lies there may be anything."""
    part = lax.dynamic_slice_in_dim(cache, start, live.shape[1], axis=1)
    return jnp.where(live[:, :, None, None], part, jnp.zeros_like(part))


def _add(cache, start, part):
    old = lax.dynamic_slice_in_dim(cache, start, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(cache, old + part.astype(cache.dtype), start, axis=1)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)
