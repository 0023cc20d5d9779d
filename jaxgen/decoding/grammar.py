"""Only what a grammar allows: a finite automaton over tokens as a transform of logits."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.decoding.speculate import Context

__all__ = ["FORBIDDEN", "Automaton", "check_automaton", "constrain", "states_after"]

FORBIDDEN = -1

PyTree = Any


class Automaton(Protocol):
    """A grammar whose states are too many for a table, and are worked out instead. Its state is a pytree of arrays [*s]."""

    def begin(self, shape: tuple[int, ...]) -> PyTree:
        """The state before the first token, in arrays of `shape`."""

    def move(self, state: PyTree, token: Int[Array, "*s"]) -> PyTree:
        """The state after a token. One that is forbidden leads to a state without a way on, which allows everything."""

    def allowed(self, state: PyTree) -> Bool[Array, "*s v"]:
        """The tokens that may follow; some always may."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
    """The automaton of a table."""

    table: Int[Array, "n v"]
    start: Any

    def begin(self, shape):
        return jnp.broadcast_to(jnp.asarray(self.start, jnp.int32), shape)

    def move(self, state, token):
        return jnp.where(state >= 0, self.table[jnp.maximum(state, 0), token], FORBIDDEN)

    def allowed(self, state):
        return (self.table[jnp.maximum(state, 0)] >= 0) | (state < 0)[..., None]


def constrain(
    logits: Float[Array, "b q v"],
    context: Context,
    *,
    table: Int[Array, "n v"] | Automaton,
    begin: int | Int[Array, "b"],
    start: int | Int[Array, "b"] = 0,
) -> Float[Array, "b q v"]:
    """Logits with every token at -inf that the automaton has no way on for (Willard and Louf 2023, arXiv:2307.09702).

    Each query is in the state that its own path leads to. A draft that is forbidden leads nowhere: what follows it has no state
    and keeps its logits, since no exact rule accepts such a draft. Comes before `truncate`, so that the allowed tokens
    compete among themselves.

    Several grammars share a table: stack their states, and start each row in its own. A plain list of allowed tokens is an
    automaton of one state.

    Args:
      logits: of the law.
      context: what came before.
      table: the state after each state and token, `FORBIDDEN` where there is none. Every state allows some token: let
        the stop token lead from a final state to itself. Or an `Automaton`, which has its own first state.
      begin: the place of the first token that the grammar reads, which is the length of the prompt.
      start: the state before it.

    Raises:
      ValueError: see `check_automaton`; or a table for another vocabulary.

    Example:
      >>> even = jnp.array([[0, FORBIDDEN, 0, FORBIDDEN]])  # tokens 0 and 2 of 4
      >>> import functools
      >>> transform = functools.partial(constrain, table=even, begin=1)
    """
    if hasattr(table, "shape"):
        check_automaton(table, start)
        if table.shape[1] != logits.shape[-1]:
            raise ValueError(f"table {table.shape}: expected a column for each of the {logits.shape[-1]} tokens")
    automaton = _automaton(table, start)
    allowed = automaton.allowed(states_after(context, automaton, begin=begin))
    return jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)


def states_after(
    context: Context, table: Int[Array, "n v"] | Automaton, *, begin: int | Int[Array, "b"], start: int | Int[Array, "b"] = 0
) -> PyTree:
    """The state in which each query's law is asked for, [b, q]; of a table `FORBIDDEN` where there is none. Reads the sequence:
    one move a token."""
    seq, path, automaton = context.seq, context.path, _automaton(table, start)
    begin = jnp.broadcast_to(jnp.asarray(begin, jnp.int32), seq.length.shape)

    def read(i, state):
        return _where((i >= begin) & (i < seq.length), automaton.move(state, seq.tokens[:, i]), state)

    state = jax.lax.fori_loop(begin.min(), seq.length.max(), read, automaton.begin(seq.length.shape))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], path.shape[:2]), state)
    for depth in range(1, path.shape[2]):  # the root is certain
        token = path[:, :, depth]
        state = _where(token >= 0, automaton.move(state, jnp.maximum(token, 0)), state)
    return state


def check_automaton(table, start=0) -> None:
    """Checks an automaton that is concrete; a traced one passes, and a state of it that allows nothing makes a row NaN.

    Raises:
      ValueError: naming the state that is wrong.
    """
    if getattr(table, "ndim", 0) != 2 or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(f"table {getattr(table, 'shape', table)}: expected integers [states, v]")
    n = table.shape[0]
    if not isinstance(table, jax.core.Tracer):
        host = np.asarray(table)
        if ((host < FORBIDDEN) | (host >= n)).any():
            state, token = np.argwhere((host < FORBIDDEN) | (host >= n))[0]
            raise ValueError(f"table[{state}, {token}]={host[state, token]}: must be a state in 0..{n - 1} or {FORBIDDEN}")
        if (host < 0).all(axis=1).any():
            stuck = np.flatnonzero((host < 0).all(axis=1))[0]
            raise ValueError(f"state {stuck} of the table allows no token; let the stop token lead from a final state to itself")
    if not isinstance(start, jax.core.Tracer):
        first = np.asarray(start)
        if ((first < 0) | (first >= n)).any():
            raise ValueError(f"start={start}: must be a state in 0..{n - 1}")


def _automaton(table, start) -> Automaton:
    return _Table(jnp.asarray(table, jnp.int32), start) if hasattr(table, "shape") else table


def _where(condition, yes, no):
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), yes, no)
