"""The bits of a byte through an automaton of bits, of one byte or of all 256 together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

__all__ = ["after_all_bits", "after_byte", "last_axes"]

PyTree = Any
Step = Callable[[Any, PyTree, Any], PyTree]


def last_axes(state: PyTree) -> PyTree:
    """Where, among the axes of states [*s], one is put behind *s.

    Args:
      state: one of the shape ().
    """
    return jax.tree.map(lambda x: -1 - x.ndim, state)


def after_byte(step: Step, state: PyTree, byte: Int[Array, "*s"]) -> PyTree:
    """The state after the 8 bits of a byte, the highest first.

    Args:
      step: `(i, state, bit) -> state`, of bit i.
      state: arrays [*s], and more dimensions behind them.
      byte: 0..255.
    """
    return jax.lax.fori_loop(0, 8, lambda i, s: step(i, s, (byte >> (7 - i)) & 1), state)


def after_all_bits(step: Step, state: PyTree, axes: PyTree, *, first: int = 0, count: int) -> PyTree:
    """The states after each value that some more bits can have, [*s, 2**(first + count)], in the order of the bytes.

    All 256 bytes at once take eight bits of 256 states. Six bits of 64 and then two of 256 are less than half as much work, for
    another copy of the automaton to be compiled.

    Args:
      step: as in `after_byte`.
      state: after each value of the bits before, arrays [*s, 2**first], and more dimensions behind them.
      axes: of `last_axes`.
      first: bits that are read already.
      count: bits to read.
    """
    ways = jnp.tile(jnp.arange(1 << count), 1 << first)
    state = jax.tree.map(lambda x, axis: jnp.repeat(x, 1 << count, axis), state, axes)
    return jax.lax.fori_loop(0, count, lambda i, s: step(first + i, s, (ways >> (count - 1 - i)) & 1), state)
