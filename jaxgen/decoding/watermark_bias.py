"""Lexical bias: tokens of a secret green list are made likelier while sampling (S013 LBW, Hui et al. 2025).

The rules are those of Kirchenbauer et al. (2023), soft and hard, with lists that do not depend on the tokens before. The list
of a sequence is one of a pool, chosen at random, so that statistics over many sequences do not betray it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.speculate import Context

__all__ = ["LexicalBias", "bias_logits", "choose_list", "green_lists"]


def green_lists(key: Key[Array, ""], *, pool: int, vocab: int, gamma: float, positions: int = 1) -> Bool[Array, "p n v"]:
    """A pool of random lists, each with round(gamma v) green tokens.

    Args:
      key: the secret.
      pool: p, how many.
      vocab: v.
      gamma: share of green tokens.
      positions: n; the token at place i is coloured by list i mod n. 1, one list for all places, as published, survives
        crops; as many as there are tokens makes the binomial law exact, however often a token is repeated.

    Raises:
      ValueError: an empty pool, no positions, or a share that leaves no token green or none red.
    """
    if pool < 1 or positions < 1:
        raise ValueError(f"pool={pool} and positions={positions} must be at least 1")
    green = round(gamma * vocab)
    if not 0 < green < vocab:
        raise ValueError(f"gamma={gamma}: {green} of {vocab} tokens would be green; some must be green and some red")
    noise = jax.random.uniform(key, (pool, positions, vocab))
    return jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < green


def choose_list(key: Key[Array, ""], rows: Int[Array, "b"], pool: int) -> Int[Array, "b"]:
    """Each request's list, from the request's number alone."""
    return jax.vmap(lambda row: jax.random.randint(jax.random.fold_in(key, row), (), 0, pool))(rows)


def bias_logits(logits: Float[Array, "... v"], green: Bool[Array, "... v"], delta) -> Float[Array, "... v"]:
    """softmax(logits + delta green): the law tilted to the green tokens, written so that delta may be infinite.

    Subtracting from red is adding to green up to a constant. `delta` = 0 changes nothing, not even the rounding; infinity
    leaves green tokens only (the paper's hard watermark). Where no green token is possible, the logits stay.
    """
    logits = logits.astype(jnp.float32)
    possible = (green & (logits > -jnp.inf)).any(axis=-1, keepdims=True)
    return jnp.where(green | ~possible, logits, logits - delta)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lists", "key", "delta"], meta_fields=["start"])
@dataclasses.dataclass(frozen=True)
class LexicalBias:
    """A transform for `speculate`, or part of one: `lambda logits, context: truncate(mark(logits, context), top_k=50)`.

    What it does to a position depends on the request and the position alone, so that drafts, targets, trees and plain
    sampling see the same law. It is a pytree: lists, key and delta may be traced.

    Attributes:
      lists: the pool, see `green_lists`.
      key: of the choice of each request's list.
      delta: >= 0, nats by which green tokens gain; infinity is the hard watermark.
      start: the first position that is marked, such as the length of the prompt.
    """

    lists: Bool[Array, "p n v"]
    key: Key[Array, ""]
    delta: float | Float[Array, ""]
    start: int = 1

    def __post_init__(self):
        if isinstance(self.delta, int | float) and not self.delta >= 0:
            raise ValueError(f"delta={self.delta}: must be >= 0")

    def __call__(self, logits: Float[Array, "b q v"], context: Context) -> Float[Array, "b q v"]:
        if logits.shape[-1] != self.lists.shape[-1]:
            raise ValueError(f"lists of {self.lists.shape[-1]} tokens do not fit logits of {logits.shape[-1]}")
        index = choose_list(self.key, context.seq.rows, self.lists.shape[0])
        green = self.lists[index[:, None], (context.pos - self.start) % self.lists.shape[1]]
        return bias_logits(logits, green, self.delta)
