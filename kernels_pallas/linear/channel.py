"""One chunk of linear attention with a decay a channel (GLA): what implementations share.

As in `chunk`, every array is a matrix and the state is kept transposed. Here

    a_ij = sum_d q_id k_jd exp(b_id - b_jd)    (i >= j)

(Yang et al. 2023, arXiv:2312.06635, equation 4) is no product of two matrices that float32 could hold: exp(-b_jd) overflows.
The paper cuts the chunk into sub-chunks and computes those on the diagonal pair by pair. Here the cut is binary and goes down
to single tokens: for i > j let 2^l be the highest bit in which i and j differ, so that both lie in one aligned run of 2^(l + 1)
tokens, j in its first half and i in its second. With e_l(x) the decay between token x and that middle,

    exp(b_i - b_j) = e_l(i) e_l(j),    both at most 1,

and a is a sum over l of [bit l is the highest that differs] z_l z_l^T, where row x of z_l is q_x e_l(x) where bit l of x is
set and k_x e_l(x) where it is not: log2(c) + 1 matrix products, exact at any decay.

The exponents come from the same tree, without differences: with the sums over an aligned run of 2^l tokens from its start up to
token x, and from behind x to its end, those over the run of 2^(l + 1) need the total of the run beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.linear.chunk import Cotangents, positions, product

__all__ = ["Factors", "advance", "backward", "decaying", "forward", "scores", "times", "tokens"]

Array = jax.Array
# Rows of a float32 register of a TPU: it turns them at once, and moves whole registers at no cost.
SUBLANES = 8


class Factors(NamedTuple):
    """What decay says of a chunk.

    Attributes:
      levels: e_l for every l, each [c, dk].
      start: exp(b), [c, dk].
      end: exp(b_c - b), [c, dk].
    """

    levels: list[Array]
    start: Array
    end: Array


def decaying(log_decay: Array) -> Factors:
    """The factors of a chunk, of log_decay float32 [c, dk] where c is a power of two."""
    c = log_decay.shape[0]
    if c < 2 or c & (c - 1):
        raise ValueError(f"chunk {c} must be a power of two, at least 2")
    until, behind, levels = log_decay, jnp.zeros_like(log_decay), []
    for level in range(c.bit_length() - 1):
        levels.append(jnp.exp(_mixed(until, behind, level)))
        beside = _beside(until + behind, level)
        until, behind = _mixed(until + beside, until, level), _mixed(behind, behind + beside, level)
    return Factors(levels, jnp.exp(until), jnp.exp(behind))


def _log_decay_bar(levels: list[Array], start: Array, end: Array) -> Array:
    """The transpose of `decaying`, of cotangents of the exponents."""
    until, behind = start, end
    for level in reversed(range(len(levels))):
        total = _beside(_mixed(until, behind, level), level)
        until, behind = until + total, behind + total
        until, behind = _mixed(until + levels[level], until, level), _mixed(behind, behind + levels[level], level)
    return until


def _mixed(second: Array, first: Array, level: int) -> Array:
    """Rows of `second` [c, d] where bit `level` of their number is set, in second halves of runs; else of `first`."""
    return jnp.where((lax.broadcasted_iota(jnp.int32, first.shape, 0) >> level) & 1 == 1, second, first)


def _beside(x: Array, level: int) -> Array:
    """Row i of the result is row i ^ 2^level of x [c, d]."""
    size = 1 << level
    tile = max(2 * size, min(SUBLANES, x.shape[0]))
    tiles = x.reshape(-1, tile, x.shape[1])
    down = jnp.roll(tiles, size, axis=1).reshape(x.shape)
    if tile == 2 * size:
        return down
    return _mixed(down, jnp.roll(tiles, -size, axis=1).reshape(x.shape), level)


def _differ(c: int, level: int) -> Array:
    """bool [c, c]: `level` is the highest bit in which i and j differ."""
    i, j = positions(c)
    return ((i ^ j) >> level) == 1


def times(x: Array, e: Array, dtype) -> Array:
    return (x.astype(jnp.float32) * e).astype(dtype)


def tokens(q: Array, k: Array, f: Factors) -> list[Array]:
    """z_l before the decay, in float32."""
    return [_mixed(q.astype(jnp.float32), k.astype(jnp.float32), level) for level in range(len(f.levels))]


def scores(q: Array, k: Array, z: list[Array]) -> Array:
    i, j = positions(q.shape[0])
    a = jnp.where(i == j, product(q, k, 1, 1), 0.0)
    for level, x in enumerate(z):
        a = jnp.where(_differ(q.shape[0], level) & (i > j), product(x, x, 1, 1), a)
    return a.astype(q.dtype)


def advance(k: Array, v: Array, f: Factors, m: Array) -> Array:
    """The transposed state after the chunk.

    Args:
      k: [c, dk].
      v: [c, dv].
      f: factors of the chunk.
      m: before the chunk, [dv, dk] float32.
    """
    return f.start[-1:] * m + product(v, times(k, f.end, k.dtype), 0, 0)


def forward(q: Array, k: Array, v: Array, f: Factors, m: Array) -> tuple[Array, Array]:
    """Outputs [c, dv] in float32 and `advance`."""
    z = [times(x, e, q.dtype) for x, e in zip(tokens(q, k, f), f.levels)]
    return product(scores(q, k, z), v) + product(times(q, f.start, q.dtype), m, 1, 1), advance(k, v, f, m)


def backward(q: Array, k: Array, v: Array, f: Factors, m: Array, o_bar: Array, m_bar: Array) -> Cotangents:
    """Cotangents of the inputs of `forward`.

    Every exponent gets a cotangent of its own, and the tree backwards adds them up: nothing cancels.

    Args:
      q: [c, dk].
      k: [c, dk].
      v: [c, dv].
      f: factors of the chunk.
      m: transposed state before the chunk, [dv, dk].
      o_bar: of the outputs, [c, dv].
      m_bar: of the transposed state after the chunk, [dv, dk].
    """
    c = q.shape[0]
    i, j = positions(c)
    rows = tokens(q, k, f)
    z = [times(x, e, q.dtype) for x, e in zip(rows, f.levels)]
    # Symmetric, so that one product a level serves queries and keys.
    scores_bar = jnp.where(i >= j, product(o_bar, v, 1, 1), product(v, o_bar, 1, 1))

    on_diagonal = jnp.where(i == j, scores_bar, 0.0).astype(q.dtype)
    q_bar, k_bar = product(on_diagonal, k), product(on_diagonal, q)
    exponents_bar = []
    for level, (x, e) in enumerate(zip(rows, f.levels)):
        x_bar = e * product(jnp.where(_differ(c, level), scores_bar, 0.0).astype(q.dtype), z[level])
        q_bar, k_bar = _mixed(q_bar + x_bar, q_bar, level), _mixed(k_bar, k_bar + x_bar, level)
        exponents_bar.append(x * x_bar)
    q_read, k_write = f.start * product(o_bar, m), f.end * product(v, m_bar)
    log_decay_bar = _log_decay_bar(exponents_bar, q.astype(jnp.float32) * q_read, k.astype(jnp.float32) * k_write)
    return Cotangents(
        q=q_bar + q_read,
        k=k_bar + k_write,
        v=product(scores(q, k, z), o_bar, 0, 0) + product(times(k, f.end, k.dtype), m_bar, 1, 1),
        log_decay=log_decay_bar + f.start[-1:] * jnp.sum(m * m_bar, axis=0, keepdims=True),
        m=f.start[-1:] * m_bar + product(o_bar, times(q, f.start, q.dtype), 0, 0),
    )
