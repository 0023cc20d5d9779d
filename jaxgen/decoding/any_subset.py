"""Any-subset speculative decoding: tokens in any order, drafted in parallel and checked by the model that drafted them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxgen.decoding.noise import DRAFT, TARGET, gumbel
from jaxgen.decoding.speculate import FULL, RUNNING, Context, Loop, Proposal, Proposer, Sequences, Transform, advance
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.decoding.topology import Topology, chain
from jaxgen.decoding.verify import Rule

__all__ = ["Ask", "Bigrams", "Infilled", "ParallelDrafts", "Queries", "in_order", "infill", "reading_order"]

PyTree = Any


class Queries(NamedTuple):
    """Places whose tokens are asked for. Nothing sees a query, so asking changes no other law.

    Attributes:
      places: where each token stands.
      behind: the token of the view behind which each query is made: it sees what that token sees, itself included.
    """

    places: Int[Array, "b m"]
    behind: Int[Array, "m"]


Ask = Callable[[PyTree, PyTree, View, Queries], tuple[Out, PyTree]]
"""`(params, cache, view, queries) -> (out, cache)`: stages the view's tokens, whose `pos` are places; `Out.params` are the laws
of the queries, [b, m, v]. A law depends on the tokens and places that the query sees."""


def in_order(ask: Ask) -> StepFn:
    """The step function of a model that reads and says tokens in any order.

    `cond` is that order, int32 [b, s]: position j of a sequence is the token at place cond[:, j]. The law of position j + 1 is
    the answer to a query at place cond[:, j + 1] behind position j.
    """

    def step(params, cache, view, cond):
        pos = jnp.broadcast_to(view.pos, view.tokens.shape)
        content = view._replace(pos=_take(cond, pos))
        return ask(params, cache, content, Queries(_take(cond, pos + 1), jnp.arange(pos.shape[1])))

    return step


def reading_order(visible: Bool[Array, "b s"]) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
    """(order, how many come first): the places of the visible tokens, then the others, each from left to right.

    There is one such order for every subset, 2^s in place of s! (Shih et al. 2022, arXiv:2205.13554).
    """
    return jnp.argsort(~visible, axis=1, stable=True).astype(jnp.int32), visible.sum(axis=1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class ParallelDrafts:
    """Any-subset speculative decoding's own drafts (Guo and Ermon 2025, arXiv:2504.20456), the first of its two passes.

    It asks for the next k places of the order at once, given the certain tokens alone. What it says of the first of them is
    the target's own law, so the first draft always stays: a round of two calls makes two tokens at least. The last token of all
    needs no draft, so that calls never exceed tokens.

    The state counts the calls of each row.

    Attributes:
      ask: the target.
      params: passed to it.
      cache: the target's, which holds all certain tokens but the last.
      order: places of the positions.
      length: k; 0 drafts nothing, which is plain sampling.
      coupled: draw with the target's own noise, for `Coupled`.
    """

    ask: Ask
    params: PyTree
    cache: PyTree
    order: Int[Array, "b s"]
    length: int
    coupled: bool = False

    @property
    def topology(self) -> Topology:
        """A chain."""
        return chain(self.length)

    def start(self, seq, key, vocab, out):
        return jnp.zeros(seq.length.shape, jnp.int32)

    def propose(self, state, seq, transform, key):
        b, k = seq.length.shape[0], self.length
        if not k:
            return Proposal(jnp.zeros((b, 0), jnp.int32)), state
        last, end = (seq.length - 1)[:, None], self.order.shape[1]
        root = _take(seq.tokens, last)
        at = seq.length[:, None] + jnp.arange(k)
        useful = seq.length + 1 < end

        def draft():
            view = View(root, _take(self.order, last), jnp.ones((1, 1), bool))
            queries = Queries(_take(self.order, at), jnp.zeros((k,), jnp.int32))
            return self.ask(self.params, self.cache, view, queries)[0].params

        nothing = jax.eval_shape(draft)
        logits = jax.lax.cond(useful.any(), draft, lambda: jnp.zeros(nothing.shape, nothing.dtype))
        # What lies between the root and a draft is not known, so that transforms see the root alone.
        path = jnp.full((b, k, k + 1), -1, jnp.int32).at[:, :, 0].set(root)
        log_q = jax.nn.log_softmax(transform(logits, Context(seq, path, at)), axis=-1)
        noise = gumbel(key, seq.rows, at, log_q.shape[-1], stream=TARGET if self.coupled else DRAFT)
        tokens = jnp.argmax(log_q + noise, axis=-1).astype(jnp.int32)
        return Proposal(tokens, log_q, useful[:, None] & (at < end)), state + useful

    def update(self, state, seq, verdict, taken, log_p, out):
        return state


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """The n-gram variant (Guo and Ermon 2025): drafts from the pairs of neighbours that are certain so far, without a model.

    A draft follows the token to its left, certain or drafted, as often as the tokens here did; where that one is unknown or was
    never followed, drafts are as frequent as tokens are here.

    Attributes:
      order: places of the positions.
      vocab: v.
      length: k.
      coupled: draw with the target's own noise, for `Coupled`.
    """

    order: Int[Array, "b s"]
    vocab: int
    length: int
    coupled: bool = False

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")

    @property
    def topology(self) -> Topology:
        """A chain."""
        return chain(self.length)

    def start(self, seq, key, vocab, out):
        return jnp.zeros(seq.length.shape, jnp.int32)

    def propose(self, state, seq, transform, key):
        b, s = self.order.shape
        rows, at = jnp.arange(b), seq.length[:, None] + jnp.arange(self.length)
        certain = jnp.zeros((b, s), bool).at[rows[:, None], self.order].set(jnp.arange(s) < seq.length[:, None])
        text = jnp.zeros((b, s), jnp.int32).at[rows[:, None], self.order].set(seq.tokens[:, :s])

        def count(tokens, counted):
            return jnp.zeros((b, self.vocab)).at[rows[:, None], tokens].add(counted)

        single, pairs = count(text, certain), certain[:, :-1] & certain[:, 1:]
        noise = gumbel(key, seq.rows, at, self.vocab, stream=TARGET if self.coupled else DRAFT)
        line, known, tokens, laws = text, certain, [], []
        for i in range(self.length):
            place = _take(self.order, at[:, i : i + 1])[:, 0]
            left = jnp.maximum(place - 1, 0)
            follows = count(text[:, 1:], pairs & (text[:, :-1] == line[rows, left][:, None]))
            usable = (place > 0) & known[rows, left] & (follows.sum(axis=1) > 0)
            counts = jnp.where(usable[:, None], follows, single)
            laws.append(jnp.log(counts) - jnp.log(counts.sum(axis=1, keepdims=True)))
            tokens.append(jnp.argmax(laws[-1] + noise[:, i], axis=-1).astype(jnp.int32))
            line, known = line.at[rows, place].set(tokens[-1]), known.at[rows, place].set(True)
        return Proposal(jnp.stack(tokens, axis=1), jnp.stack(laws, axis=1), at < s), state

    def update(self, state, seq, verdict, taken, log_p, out):
        return state


class Infilled(NamedTuple):
    """What was sampled.

    Attributes:
      tokens: by place; where a row was given up, what it was called with.
      status: FULL or BROKEN, see `speculate`.
      target_calls: of each row, that of the visible tokens not counted.
      draft_calls: of each row, calls of the model for drafts.
    """

    tokens: Int[Array, "b s"]
    status: Int[Array, "b"]
    target_calls: Int[Array, "b"]
    draft_calls: Int[Array, "b"]


def infill(
    ask: Ask,
    drafter: Callable[[PyTree], Proposer],
    rule: Rule,
    *,
    params: PyTree,
    cache: PyTree,
    tokens: Int[Array, "b s"],
    order: Int[Array, "b s"],
    known: Int[Array, "b"],
    key: Key[Array, ""],
    transform: Transform = lambda logits, context: logits.astype(jnp.float32),
    rows: Int[Array, "b"] | None = None,
) -> Infilled:
    """Samples all tokens but the known ones from the model's joint law along an order (Guo and Ermon 2025).

    As `speculate` with the step function `in_order(ask)`, except that drafts are made with the target's own cache. Noise belongs
    to positions of the order: with `Coupled` the tokens are those of sampling one at a time with the same key.

    Call it inside `jax.jit`; `order` and `known` may be traced.

    Args:
      ask: the model.
      drafter: a proposer of a chain, whose state counts its calls of the model, from the target's cache as it is in a round.
      rule: which drafts stay.
      params: passed to `ask`.
      cache: empty, with room for s + k positions.
      tokens: by place; those that are not known do not matter.
      order: a permutation of 0..s-1 a row, the known places first.
      known: how many tokens of a row are known, at least one.
      key: see `speculate`.
      transform: see `speculate`.
      rows: the number of each request; None is 0..b-1.

    Raises:
      ValueError: shapes that differ, a cache without room, or a drafter of something else than a chain.
    """
    if tokens.shape != order.shape:
        raise ValueError(f"tokens {tokens.shape} and order {order.shape} have to be of one shape [b, s]")
    (b, s), topology = tokens.shape, drafter(cache).topology
    if not topology.is_chain:
        raise ValueError("drafts have to be a chain: a place of the order has one token")
    room = getattr(cache, "capacity", None)
    if room is not None and room < s + topology.drafts:
        raise ValueError(f"the cache holds {room} positions; {s} tokens and {topology.drafts} drafts need {s + topology.drafts}")
    queue = jnp.take_along_axis(tokens, order, axis=1)
    view = View(queue[:, :-1], order[:, :-1], jnp.tril(jnp.ones((s - 1, s - 1), bool)))
    nobody = Queries(order[:, :0], jnp.zeros((0,), jnp.int32))
    # Lengths become one a row here; of the places that were read, those of known tokens but the last count.
    cache = ask(params, cache.commit(jnp.zeros((b,), jnp.int32)), view, nobody)[1].commit(known - 1)
    seq = Sequences(jnp.pad(queue, ((0, 0), (0, topology.drafts + 1))), known, jnp.arange(b) if rows is None else rows)
    zeros = jnp.zeros((b,), jnp.int32)
    options = dict(params=params, cond=order, limit=zeros + s, key=key, transform=transform, stop=jnp.zeros((0,), jnp.int32))

    def round_(loop: Loop) -> Loop:
        return advance(in_order(ask), drafter(loop.cache), rule, loop, **options)

    first = Loop(seq, jnp.where(known >= s, FULL, RUNNING), cache, drafter(cache).start(seq, key, 0, None), jnp.int32(0), zeros)
    done = jax.lax.while_loop(lambda loop: (loop.status == RUNNING).any(), round_, first)
    certain = jnp.where(jnp.arange(s) < done.seq.length[:, None], done.seq.tokens[:, :s], queue)
    filled = jnp.zeros_like(queue).at[jnp.arange(b)[:, None], order].set(certain)
    return Infilled(filled, done.status, done.row_calls, done.state)


def _take(order: Int[Array, "b s"], at: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """What stands there; positions behind the end, which drafts may have, read the last one."""
    return jnp.take_along_axis(order, jnp.minimum(at, order.shape[1] - 1), axis=1)
