"""Only what a grammar allows: a finite automaton over tokens as a transform of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.decoding.speculate import Context

__all__ = ["FORBIDDEN", "check_automaton", "constrain", "states_after"]

FORBIDDEN = -1


def constrain(
    logits: Float[Array, "b q v"],
    context: Context,
    *,
    table: Int[Array, "n v"],
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
        the stop token lead from a final state to itself.
      begin: the place of the first token that the grammar reads, which is the length of the prompt.
      start: the state before it.

    Raises:
      ValueError: see `check_automaton`; or a table for another vocabulary.

    Example:
      >>> even = jnp.array([[0, FORBIDDEN, 0, FORBIDDEN]])  # tokens 0 and 2 of 4
      >>> import functools
      >>> transform = functools.partial(constrain, table=even, begin=1)
    """
    check_automaton(table, start)
    if table.shape[1] != logits.shape[-1]:
        raise ValueError(f"table {table.shape}: expected a column for each of the {logits.shape[-1]} tokens")
    states = states_after(context, jnp.asarray(table, jnp.int32), begin=begin, start=start)
    allowed = jnp.asarray(table)[jnp.maximum(states, 0)] >= 0
    return jnp.where(allowed | (states < 0)[..., None], logits.astype(jnp.float32), -jnp.inf)


def states_after(
    context: Context, table: Int[Array, "n v"], *, begin: int | Int[Array, "b"], start: int | Int[Array, "b"] = 0
) -> Int[Array, "b q"]:
    """The state in which each query's law is asked for, or `FORBIDDEN`. Reads the sequence: one look-up a token."""
    seq, path = context.seq, context.path
    begin, state = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), seq.length.shape) for x in (begin, start))

    def read(i, state):
        inside = (i >= begin) & (i < seq.length)
        return jnp.where(inside, _move(table, state, seq.tokens[:, i]), state)

    state = jax.lax.fori_loop(begin.min(), seq.length.max(), read, state)
    state = jnp.broadcast_to(state[:, None], path.shape[:2])
    for depth in range(1, path.shape[2]):  # the root is certain
        token = path[:, :, depth]
        state = jnp.where(token >= 0, _move(table, state, jnp.maximum(token, 0)), state)
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


def _move(table, state, token):
    return jnp.where(state >= 0, table[jnp.maximum(state, 0), token], FORBIDDEN)
