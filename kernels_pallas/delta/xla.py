"""The gated delta rule by chunks in plain XLA: a scan whose carry is the state. Any device, size and dtype."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.delta import chunk
from kernels_pallas.delta.problem import Problem
from kernels_pallas.device import Device

__all__ = ["backward", "chunk_inverse", "forward", "refuses"]

Array = jax.Array
CHUNK, SHORT_CHUNK = 64, 16


def refuses(problem: Problem, device: Device) -> str | None:
    """None: it runs everywhere."""
    del problem, device
    return None


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv].

    Args:
      q: [b, t, h, dk].
      k: [b, t, h, dk].
      v: [b, t, h, dv].
      log_decay: [b, t, h] float32.
      beta: [b, t, h] float32.
      state: before the first token, [b, h, dk, dv] float32.
      problem: unused.
      device: unused.
    """
    del problem, device
    dtype, length = v.dtype, q.shape[1]

    def step(state, xs):
        o, state = _each(_forward)(*xs, state)
        return state, o.astype(dtype)

    xs = [_chunks(x) for x in (q, k, v, log_decay, beta)]
    state, o = lax.scan(step, state, (*xs, _inverses(*xs[1:])))
    return _tokens(o, length), state


def backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    state: Array,
    o_bar: Array,
    state_bar: Array,
    *,
    problem: Problem,
    device: Device,
) -> tuple[Array, ...]:
    """Cotangents of q, k, v, log_decay, beta and state.

    The states between chunks are computed once more and kept meanwhile: t / 64 of them.

    Args:
      q: as `forward`.
      k: as `forward`.
      v: as `forward`.
      log_decay: as `forward`.
      beta: as `forward`.
      state: as `forward`.
      o_bar: cotangent of the outputs, [b, t, h, dv].
      state_bar: of the last state, [b, h, dk, dv] float32.
      problem: unused.
      device: unused.
    """
    del problem, device
    dtypes, length = [x.dtype for x in (q, k, v, log_decay, beta)], q.shape[1]
    *xs, o_bar = (_chunks(x) for x in (q, k, v, log_decay, beta, o_bar))
    inverses = _inverses(*xs[1:])

    def advance(state, xs):
        return _each(_write)(*xs, state), state

    def retreat(state_bar, xs):
        *rest, state_bar = _each(_backward)(*xs, state_bar)
        return state_bar, [x.astype(dtype) for x, dtype in zip(rest, dtypes)]

    _, states = lax.scan(advance, state, (*xs[1:], inverses))
    state_bar, cotangents = lax.scan(retreat, state_bar, (*xs, inverses, states, o_bar), reverse=True)
    return *(_tokens(x, length) for x in cotangents), state_bar


def _each(fn: Callable) -> Callable:
    """A function of matrices, over the axes b and h."""
    return jax.vmap(jax.vmap(fn))


def _forward(q, k, v, log_decay, beta, inverse, state):
    return chunk.forward(q, k, v, chunk.gates(log_decay, beta), inverse, state)


def _write(k, v, log_decay, beta, inverse, state):
    return chunk.write(k, v, chunk.gates(log_decay, beta), inverse, state)[1]


def _backward(q, k, v, log_decay, beta, inverse, state, o_bar, state_bar):
    return chunk.backward(q, k, v, chunk.gates(log_decay, beta), inverse, state, o_bar, state_bar)


def _chunks(x: Array) -> Array:
    """[b, t, h, d] -> [n, b, h, c, d] and [b, t, h] -> [n, b, h, 1, c], padded by tokens that change nothing."""
    if x.dtype == jnp.float16:
        x = x.astype(jnp.float32)  # `chunk.product` splits into bfloat16, whose range is the state's
    b, t, h, *d = x.shape
    c = CHUNK if t > SHORT_CHUNK else SHORT_CHUNK
    x = jnp.pad(x, ((0, 0), (0, -t % c), (0, 0)) + ((0, 0),) * len(d)).reshape(b, -1, c, h, *d)
    return x.transpose(1, 0, 3, 2, 4) if d else x.transpose(1, 0, 3, 2)[:, :, :, None]


def _tokens(x: Array, length: int) -> Array:
    """`_chunks` undone."""
    n, b, h, c, d = x.shape
    if c == 1:
        return x.reshape(n, b, h, d).transpose(1, 0, 3, 2).reshape(b, n * d, h)[:, :length]
    return x.transpose(1, 0, 3, 2, 4).reshape(b, n * c, h, d)[:, :length]


def _inverses(k: Array, v: Array, log_decay: Array, beta: Array) -> Array:
    """T of all chunks at once: they don't depend on the state."""
    del v
    coupling = jax.vmap(_each(lambda k, g, w: chunk.couplings(k, chunk.gates(g, w))))
    return chunk_inverse(coupling(k, log_decay, beta))


def chunk_inverse(a: Array) -> Array:
    """(I + a)^-1 of strictly lower triangular a [..., c, c], by halves: [[x, 0], [-y a_21 x, y]].

    Its entries are at most beta for keys of unit length, so no step cancels. The Neumann series by doubling, which has fewer
    products, sums powers of a that grow like binomials when keys are alike, and loses all digits.
    """
    c = a.shape[-1]
    if c == 2:
        return jnp.eye(2) - a
    m = c // 2
    x, y = chunk_inverse(jnp.stack([a[..., :m, :m], a[..., m:, m:]]))
    corner = -jnp.matmul(y, jnp.matmul(a[..., m:, :m], x, precision="highest"), precision="highest")
    return jnp.concatenate(
        [jnp.concatenate([x, jnp.zeros_like(x)], -1), jnp.concatenate([corner, y], -1)],
        axis=-2,
    )
