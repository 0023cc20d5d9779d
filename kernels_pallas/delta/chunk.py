"""One chunk of the gated delta rule in matrix form: what implementations share.

Every array is a matrix, so that the same lines run under `jax.vmap` and inside a TPU kernel: a vector over the chunk's c
tokens is a row [1, c] where it comes in and goes out, and a column [c, 1] where it scales rows.

With b the inclusive sum of log-decays in the chunk and S the state before it (Yang et al. 2024, arXiv:2412.06464,
section 3.3, and arXiv:2406.06484, equations 8-11):

    a_ij = beta_i exp(b_i - b_j) k_i.k_j (i > j)        T = (I + a)^-1
    u = T beta (v - exp(b) k S)                         what each token really writes
    o = exp(b) q S + ((q k^T) exp(b_i - b_j))_{i >= j} u
    S' = exp(b_c) S + k^T exp(b_c - b) u

Every exponent is at most 0. Only T couples tokens in order; `inverse` is left to implementations.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.linear.chunk import positions

__all__ = ["Gates", "backward", "couplings", "forward", "gates", "product", "write"]

Array = jax.Array


def product(x: Array, y: Array, x_axis: int = 1, y_axis: int = 0) -> Array:
    """x y in float32, contracted over one axis of each; `(1, 1)` is x y^T and `(0, 0)` is x^T y.

    Where one side has 16 bits, the other is split into two such numbers: 2^-16 of its value is lost, and the product needs
    two passes of the matrix unit instead of the six of float32.
    """
    if x.dtype == y.dtype:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        dims = (((x_axis,), (y_axis,)), ((), ()))
        return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)
    if x.dtype == jnp.float32:
        return sum(product(part, y, x_axis, y_axis) for part in _split(x, y.dtype))
    return sum(product(x, part, x_axis, y_axis) for part in _split(y, x.dtype))


def _split(x: Array, dtype) -> tuple[Array, Array]:
    """x = high + low in bfloat16, up to 2^-16."""
    # By bits: XLA may take a conversion to 16 bits and back for nothing and would leave low = 0.
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(dtype), (x - high).astype(dtype)


class Gates(NamedTuple):
    """What decay and write strength say of a chunk.

    Attributes:
      start: exp(b), [c, 1].
      end: exp(b_c - b), [c, 1].
      total: exp(b_c), [1, 1].
      between: exp(b_i - b_j) for i >= j and else 0, [c, c].
      beta: [c, 1].
    """

    start: Array
    end: Array
    total: Array
    between: Array
    beta: Array


def _rows(x: Array) -> Array:
    """Sums along the rows, [r, c] -> [r, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


def gates(log_decay: Array, beta: Array) -> Gates:
    """Of log-decays and write strengths [1, c]."""
    i, j = positions(log_decay.shape[1])

    def column(kept, x):
        return _rows(jnp.where(kept, x, 0.0))

    def row(x):
        return jnp.sum(jnp.where(i == j, x, 0.0), axis=0, keepdims=True)

    def difference(xs, ys):
        return jnp.minimum((xs[0] - ys[0]) + (xs[1] - ys[1]), 0.0)

    # Sums in two parts, as `linear.chunk.cumulative`: differences of the coarse ones, in units of 2^-8, are exact.
    coarse = jnp.floor(log_decay * 256.0) * (1 / 256.0)
    sums = [column(i >= j, coarse), column(i >= j, log_decay - coarse)]
    last = [x[-1:] for x in sums]
    return Gates(
        start=jnp.exp(sums[0] + sums[1]),
        end=jnp.exp(difference(last, sums)),
        total=jnp.exp(last[0] + last[1]),
        between=jnp.exp(jnp.where(i >= j, difference(sums, [row(x) for x in sums]), -jnp.inf)),
        beta=column(i == j, beta),
    )


def couplings(k: Array, g: Gates) -> Array:
    """a [c, c], strictly lower triangular."""
    i, j = positions(k.shape[0])
    return jnp.where(i > j, g.beta * g.between * product(k, k, 1, 1), 0.0)


def write(k: Array, v: Array, g: Gates, inverse: Array, state: Array) -> tuple[Array, Array]:
    """What each token writes, u [c, dv], and the state after the chunk [dk, dv]."""
    u = product(inverse, g.beta * (v.astype(jnp.float32) - g.start * product(k, state)))
    return u, g.total * state + product(k, g.end * u, 0, 0)


def forward(q: Array, k: Array, v: Array, g: Gates, inverse: Array, state: Array) -> tuple[Array, Array]:
    """Outputs [c, dv] in float32 and the state after the chunk.

    Args:
      q: [c, dk].
      k: [c, dk].
      v: [c, dv].
      g: gates of the chunk.
      inverse: T [c, c].
      state: before the chunk, [dk, dv] float32.
    """
    u, new_state = write(k, v, g, inverse, state)
    # Nothing is computed from the outputs, so the last product may have 16-bit operands.
    scores = (product(q, k, 1, 1) * g.between).astype(q.dtype)
    return g.start * product(q, state) + product(scores, u), new_state


class Cotangents(NamedTuple):
    """Of the inputs of a chunk: q, k [c, dk], v [c, dv], log_decay, beta [1, c], and state [dk, dv]; float32."""

    q: Array
    k: Array
    v: Array
    log_decay: Array
    beta: Array
    state: Array


def backward(q: Array, k: Array, v: Array, g: Gates, inverse: Array, state: Array, o_bar: Array, state_bar: Array) -> Cotangents:
    """Cotangents of the inputs of `forward`, of the log-decays and of the betas.

    Args:
      q: as `forward`.
      k: as `forward`.
      v: as `forward`.
      g: as `forward`.
      inverse: as `forward`.
      state: as `forward`.
      o_bar: cotangent of the outputs, [c, dv].
      state_bar: of the state after the chunk, [dk, dv].
    """
    i, j = positions(q.shape[0])
    read = g.start * product(k, state)
    error = v.astype(jnp.float32) - read
    u = product(inverse, g.beta * error)
    keys = product(k, k, 1, 1) * g.between
    scores = product(q, k, 1, 1) * g.between

    u_bar = product(scores, o_bar, 0, 0) + g.end * product(k, state_bar)
    # u = (I + a)^-1 r, so a's cotangent is -r_bar u^T.
    r_bar = product(inverse, u_bar, 0, 0)
    v_bar = g.beta * r_bar
    a_bar = jnp.where(i > j, -product(r_bar, u, 1, 1), 0.0)
    scores_bar = product(o_bar, u, 1, 1)
    products_bar = scores_bar * g.between
    keys_bar = g.beta * a_bar * g.between

    q_read = g.start * product(o_bar, state, 1, 1)
    k_read = -g.start * product(v_bar, state, 1, 1)
    k_write = g.end * product(u, state_bar, 1, 1)

    # log_decay_t scales the pairs i >= t > j, what is read at i >= t and what is written at j < t. Added up as they stand: taken
    # from cotangents of the sums b they would be small differences of large numbers where decay is strong.
    paired = scores_bar * scores + g.beta * a_bar * keys
    earlier = product(paired, jnp.where(i < j, 1.0, 0.0).astype(k.dtype))
    read_bar = _rows(q.astype(jnp.float32) * q_read) - _rows(v_bar * read)
    written_bar = _rows(k.astype(jnp.float32) * k_write)
    log_decay_bar = jnp.sum(jnp.where(i >= j, earlier + read_bar, written_bar), axis=0, keepdims=True)
    log_decay_bar += g.total * jnp.sum(_rows(state * state_bar), axis=0, keepdims=True)

    return Cotangents(
        q=product(products_bar, k) + q_read,
        k=product(products_bar, q, 0, 0) + product(keys_bar, k) + product(keys_bar, k, 0, 0) + k_read + k_write,
        v=v_bar,
        log_decay=log_decay_bar,
        beta=jnp.sum(jnp.where(i == j, _rows(r_bar * error) + _rows(a_bar * keys), 0.0), axis=0, keepdims=True),
        state=g.total * state_bar + product(q, g.start * o_bar.astype(jnp.float32), 0, 0) - product(k, g.start * v_bar, 0, 0),
    )
