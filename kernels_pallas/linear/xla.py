"""Linear attention by chunks in plain XLA: a scan whose carry is the state. Any device, size, dtype and mode."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.device import Device
from kernels_pallas.linear import channel, chunk, whole
from kernels_pallas.linear.problem import Problem

__all__ = ["backward", "forward", "refuses", "step"]

Array = jax.Array
CHUNK, CHANNEL_CHUNK = 128, 64


def refuses(problem: Problem, device: Device) -> str | None:
    """None: it runs everywhere."""
    del problem, device
    return None


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a chunk is computed.

    Attributes:
      size: tokens of a chunk.
      math: `chunk`, `channel` or `whole`.
      factors: the factors of a chunk, of its log_decay [size] or [size, dk], or None.
    """

    size: int
    math: ModuleType
    factors: Callable[[Array | None], Any]


def _rule(problem: Problem) -> _Rule:
    size = min(CHUNK, max(2, problem.length))
    if problem.decay == "channel":
        size = min(CHANNEL_CHUNK, 1 << (size - 1).bit_length())
        return _Rule(size, channel, channel.decaying)
    if problem.decay == "scalar":
        return _Rule(size, chunk, _scalar)
    if problem.block_size > CHUNK:
        return _Rule(problem.block_size, whole, lambda g: None)
    size -= size % problem.block_size
    return _Rule(size, chunk, lambda g: chunk.plain(size, problem.block_size))


def _scalar(log_decay: Array) -> chunk.Factors:
    rows = chunk.sums(log_decay[None])
    return chunk.decaying(rows, chunk.Sums(*(x.T for x in rows)))


def forward(
    q: Array, k: Array, v: Array, log_decay: Array | None, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv].

    Args:
      q: [b, t, h, dk].
      k: [b, t, h, dk].
      v: [b, t, h, dv].
      log_decay: None, [b, t, h] or [b, t, h, dk], float32.
      state: before the first token, [b, h, dk, dv] float32.
      problem: static facts.
      device: unused; the contract of implementations.
    """
    del device
    rule = _rule(problem)

    def advance(m, xs):
        o, m = _each(lambda q, k, v, g, m: rule.math.forward(q, k, v, rule.factors(g), m))(*xs, m)
        return m, o.astype(v.dtype)

    m, o = lax.scan(advance, state.mT, _chunked(rule.size, *_wide(q, k, v), log_decay))
    return _joined(o, q.shape[1]), m.mT


def backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array,
    do: Array,
    dstate: Array,
    *,
    problem: Problem,
    device: Device,
) -> tuple[Array, Array, Array, Array | None, Array]:
    """Cotangents of q, k, v, log_decay and state.

    Of n chunks, about sqrt(n) states are kept at a time, and as many again while the chunks between two of them are gone
    through in reverse.

    Args:
      q: as `forward`.
      k: as `forward`.
      v: as `forward`.
      log_decay: as `forward`.
      state: as `forward`.
      do: cotangent of the outputs, [b, t, h, dv].
      dstate: of the last state, [b, h, dk, dv] float32.
      problem: static facts.
      device: unused.
    """
    del device
    rule = _rule(problem)
    length = q.shape[1]
    segment = math.isqrt(-(-length // rule.size))
    xs = _chunked(rule.size, *_wide(q, k, v), log_decay, *_wide(do), multiple=segment)
    xs = jax.tree.map(lambda x: x.reshape(-1, segment, *x.shape[1:]), xs)

    def advance(m, xs):
        return _each(lambda k, v, g, m: rule.math.advance(k, v, rule.factors(g), m))(*xs, m), m

    def retreat(m_bar, xs):
        def one(q, k, v, g, *rest):
            bars = rule.math.backward(q, k, v, rule.factors(g), *rest)
            return bars if g is None else bars._replace(log_decay=bars.log_decay.reshape(g.shape))

        q, k, v, g, o_bar, m = xs
        bars = _each(one)(q, k, v, g, m, o_bar, m_bar)
        return bars.m, (*(x.astype(problem.dtype) for x in bars[:3]), bars.log_decay)

    def retreat_segment(m_bar, xs):
        *xs, m = xs
        _, states = lax.scan(advance, m, tuple(xs[1:4]))
        return lax.scan(retreat, m_bar, (*xs, states), reverse=True)

    _, starts = lax.scan(lambda m, xs: (lax.scan(advance, m, xs)[0], m), state.mT, xs[1:4])
    m_bar, bars = lax.scan(retreat_segment, dstate.mT, (*xs, starts), reverse=True)
    bars = jax.tree.map(lambda x: _joined(x.reshape(-1, *x.shape[2:]), length), bars)
    return *bars, m_bar.mT


def step(q: Array, k: Array, v: Array, log_decay: Array | None, state: Array) -> tuple[Array, Array]:
    """One token: outputs [b, h, dv] and the state after it.

    Args:
      q: [b, h, dk].
      k: [b, h, dk].
      v: [b, h, dv].
      log_decay: None, [b, h] or [b, h, dk], float32.
      state: [b, h, dk, dv] float32.
    """
    if log_decay is not None:
        decay = jnp.exp(log_decay)
        state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    state = state + k32[..., None] * v32[..., None, :]
    # A sum of products rather than a matrix product: a matrix unit would round the state, and bytes bound this anyway.
    return jnp.sum(q32[..., None] * state, axis=-2).astype(v.dtype), state


def _each(fn: Callable) -> Callable:
    """A function of matrices, over leading axes b and h."""
    return jax.vmap(jax.vmap(fn))


def _wide(*arrays: Array) -> tuple[Array, ...]:
    """float16 as float32: states and products of keys leave its range."""
    return tuple(x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in arrays)


def _chunked(size: int, *arrays: Array | None, multiple: int = 1) -> tuple[Array | None, ...]:
    """[b, t, h, ...] to [n, b, h, size, ...], padded with zeros; n is a multiple of `multiple`."""

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % (size * multiple))) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    return tuple(x if x is None else cut(x) for x in arrays)


def _joined(x: Array, length: int) -> Array:
    """[n, b, h, size, ...] to [b, t, h, ...]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
