"""One chunk of linear attention without decay or with one decay a token: what implementations share.

Every array is a matrix, so that the same lines run under `jax.vmap` and inside a TPU kernel. The state is kept transposed,
m = S^T [dv, dk]: decays of channels then scale columns, which a vector unit does without turning anything.

With b the inclusive sums of log_decay inside the chunk and w_ij = exp(b_i - b_j) for i >= j and else 0 (Dao and Gu 2024,
arXiv:2405.21060, section 6; Sun et al. 2023, arXiv:2307.08621, equation 7):

    o_i = sum_j w_ij (q_i.k_j) v_j + exp(b_i) S^T q_i
    S' = exp(b_c) S + sum_j exp(b_c - b_j) k_j v_j^T

No exponent is above 0, but for rounding. Blocks that see themselves are the same with another 0-1 matrix w and no decay.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "Cotangents",
    "Factors",
    "Sums",
    "advance",
    "backward",
    "decaying",
    "forward",
    "plain",
    "positions",
    "product",
    "sums",
]

Array = jax.Array


def product(x: Array, y: Array, x_axis: int = 1, y_axis: int = 0) -> Array:
    """x y in float32, contracted over one axis of each; `(1, 1)` is x y^T and `(0, 0)` is x^T y.

    Operands of different types are rounded to the one with fewer bits: what a matrix unit takes at full speed.
    """
    dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x.astype(dtype), y.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32)


def positions(c: int) -> tuple[Array, Array]:
    """Row and column numbers of a [c, c] matrix."""
    return lax.broadcasted_iota(jnp.int32, (c, c), 0), lax.broadcasted_iota(jnp.int32, (c, c), 1)


class Factors(NamedTuple):
    """What decay says of a chunk.

    Attributes:
      between: w, [c, c].
      start: exp(b) [c, 1], None without decay.
      end: exp(b_c - b) [c, 1], None without decay.
      total: exp(b_c) [1, 1], None without decay.
    """

    between: Array
    start: Array | None = None
    end: Array | None = None
    total: Array | None = None


def plain(c: int, block_size: int = 1) -> Factors:
    """Without decay; tokens of a block see each other."""
    i, j = positions(c)
    return Factors(jnp.where(lax.div(i, block_size) >= lax.div(j, block_size), 1.0, 0.0))


class Sums(NamedTuple):
    """Inclusive sums b of log_decay inside a chunk, a token each.

    exp(b_i - b_j) between two tokens after a strong decay is lost where b is one float32 number: at b = -6000 its last bit is
    5e-4. The coarse part is in units of 2^-8, so its sums and differences are exact, and the fine part stays below c / 2^8.

    Attributes:
      coarse: of multiples of 2^-8.
      fine: of the rest.
      start: exp(b).
      end: exp(b_c - b).
    """

    coarse: Array
    fine: Array
    start: Array
    end: Array


def sums(log_decay: Array) -> Sums:
    """Along rows [r, c], one row a head."""
    i, j = positions(log_decay.shape[1])
    until = jnp.where(i <= j, 1.0, 0.0)
    units = jnp.floor(log_decay * 256.0) * (1 / 256.0)
    coarse, fine = product(units, until), product(log_decay - units, until)
    rest = (coarse[:, -1:] - coarse) + (fine[:, -1:] - fine)
    return Sums(coarse, fine, jnp.exp(coarse + fine), jnp.exp(rest))


def decaying(rows: Sums, columns: Sums) -> Factors:
    """With the sums of one head, as rows [1, c] and as columns [c, 1]."""
    i, j = positions(rows.coarse.shape[1])
    difference = (columns.coarse - rows.coarse) + (columns.fine - rows.fine)
    between = jnp.exp(jnp.where(i >= j, difference, -jnp.inf))
    return Factors(between, columns.start, columns.end, rows.start[:, -1:])


def _scaled(x: Array, factor: Array | None) -> Array:
    return x if factor is None else x.astype(jnp.float32) * factor


def advance(k: Array, v: Array, f: Factors, m: Array) -> Array:
    """The transposed state after the chunk.

    Args:
      k: [c, dk].
      v: [c, dv].
      f: factors of the chunk.
      m: before the chunk, [dv, dk] float32.
    """
    return _scaled(m, f.total) + product(v, _scaled(k, f.end), 0, 0)


def forward(q: Array, k: Array, v: Array, f: Factors, m: Array) -> tuple[Array, Array]:
    """Outputs [c, dv] in float32 and `advance`."""
    scores = (product(q, k, 1, 1) * f.between).astype(v.dtype)
    o = product(scores, v) + _scaled(product(q, m, 1, 1), f.start)
    return o, advance(k, v, f, m)


class Cotangents(NamedTuple):
    """Of the inputs of a chunk, in float32.

    Attributes:
      q: [c, dk].
      k: [c, dk].
      v: [c, dv].
      log_decay: [1, c], or [c, dk] a channel; None without decay.
      m: of the transposed state before the chunk, [dv, dk].
    """

    q: Array
    k: Array
    v: Array
    log_decay: Array | None
    m: Array


def backward(q: Array, k: Array, v: Array, f: Factors, m: Array, o_bar: Array, m_bar: Array) -> Cotangents:
    """Cotangents of the inputs of `forward` and of log_decay.

    Args:
      q: [c, dk].
      k: [c, dk].
      v: [c, dv].
      f: factors of the chunk.
      m: transposed state before the chunk, [dv, dk].
      o_bar: of the outputs, [c, dv].
      m_bar: of the transposed state after the chunk, [dv, dk].
    """
    scores = product(q, k, 1, 1) * f.between
    scores_bar = product(o_bar, v, 1, 1)
    products_bar = (scores_bar * f.between).astype(q.dtype)
    q_read = _scaled(product(o_bar, m), f.start)
    k_write = _scaled(product(v, m_bar), f.end)
    log_decay = None
    if f.start is not None:
        log_decay = _log_decay_bar(q, k, scores * scores_bar, q_read, k_write)
        log_decay += f.total * jnp.sum(jnp.sum(m * m_bar, axis=0, keepdims=True), axis=1, keepdims=True)
    return Cotangents(
        q=product(products_bar, k) + q_read,
        k=product(products_bar, q, 0, 0) + k_write,
        v=product(scores.astype(q.dtype), o_bar, 0, 0) + product(_scaled(k, f.end).astype(q.dtype), m_bar, 1, 1),
        log_decay=log_decay,
        m=_scaled(m_bar, f.total) + product(o_bar, _scaled(q, f.start), 0, 0),
    )


def _log_decay_bar(q: Array, k: Array, paired: Array, q_read: Array, k_write: Array) -> Array:
    """[1, c]: log_decay_t scales the pairs i >= t > j, what is read at i >= t and what is written at j < t.

    These are added up as they stand. The usual sum over i >= t of q_i.q_bar_i - k_i.k_bar_i is the same in exact numbers, but
    where decay is strong it is a small difference of large sums.
    """
    i, t = positions(q.shape[0])
    read = jnp.sum(q.astype(jnp.float32) * q_read, axis=1, keepdims=True)
    written = jnp.sum(k.astype(jnp.float32) * k_write, axis=1, keepdims=True)
    earlier = product(paired.astype(q.dtype), jnp.where(i < t, 1.0, 0.0).astype(q.dtype))
    return jnp.sum(jnp.where(i >= t, earlier + read, written), axis=0, keepdims=True)
