"""Drafts that are themselves sampled speculatively: a small model drafts for a middle one, which drafts for the target."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.proposers import DraftModel
from jaxgen.decoding.sparse_cache import Exposed, RetrievalCache
from jaxgen.decoding.speculate import Context, Proposal, Sequences, paths_of, prefill
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.decoding.topology import Topology, chain
from jaxgen.decoding.verify import Rejection, Rule, verify

__all__ = ["Hierarchical", "Middle", "Reread", "Retrieved"]

PyTree = Any

# The middle model's verification has noise of its own: what the target accepts must not depend on it.
_MIDDLE = 5


class Middle(Protocol):
    """A model between drafter and target, with a cache that holds all certain tokens but the last."""

    def start(self, seq: Sequences, out: Out | None) -> PyTree:
        """The cache after the prompt; `out` as in `Proposer.start`."""

    def step(self, cache: PyTree, view: View) -> tuple[Out, PyTree]:
        """See `jaxgen.decoding.step`."""

    def follow(self, cache: PyTree, seq: Sequences, taken: Int[Array, "b"], out: Out) -> PyTree:
        """The cache after `taken` tokens became certain; `out` is what the target said of the query that they come from."""


class _State(NamedTuple):
    drafter: PyTree
    cache: PyTree


class _Inner(NamedTuple):
    tokens: Int[Array, "b s"]
    length: Int[Array, "b"]
    laws: Float[Array, "b m v"]
    drafter: PyTree
    cache: PyTree


@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """Samples `length` tokens from a middle model, speculatively, and proposes them with the middle model's law (TriForce, Sun et
    al. 2024, arXiv:2404.11912, algorithm 1).

    The target's verification is exact if the reported law is the one that tokens were drawn from, so the inner rule has to be
    exact: after a rejection it must draw from the residual, not from the middle model's law.

    Attributes:
      proposer: drafts for the middle model, a chain; its `reach` is at least `length` + 1, and its cache has room for twice
        as many positions more than `max_length`.
      middle: the middle model.
      length: tokens to propose.
      rule: of the inner verification; an exact one.
      coupled: sample with the target's own noise, for `Coupled`; then `rule` is to be `Coupled` too.
    """

    proposer: DraftModel
    middle: Middle
    length: int
    rule: Rule = Rejection()
    coupled: bool = False

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")
        if not self.proposer.topology.is_chain or not self.proposer.topology.drafts:
            raise ValueError("a hierarchy's proposer drafts a chain of at least one token")
        if self.proposer.reach <= self.length:
            raise ValueError(f"the proposer's reach={self.proposer.reach} must exceed length={self.length}")

    @property
    def topology(self) -> Topology:
        """A chain."""
        return chain(self.length)

    def start(self, seq, key, vocab, out):
        return _State(self.proposer.start(seq, key, vocab, None), self.middle.start(seq, out))

    def propose(self, state, seq, transform, key):
        b, inner = seq.tokens.shape[0], self.proposer.topology
        key = key if self.coupled else jax.random.fold_in(key, _MIDDLE)
        rows, place, end = jnp.arange(b)[:, None], jnp.arange(inner.drafts + 1), seq.length + self.length
        seen = jnp.asarray(inner.ancestors)

        def round_(carry: _Inner) -> _Inner:
            now = Sequences(carry.tokens, carry.length, seq.rows)
            proposal, drafter = self.proposer.propose(carry.drafter, now, transform, key)
            root = jnp.take_along_axis(now.tokens, now.length[:, None] - 1, axis=1)
            nodes, at = jnp.concatenate([root, proposal.tokens], axis=1), now.length[:, None] - 1 + place
            out, cache = self.middle.step(carry.cache, View(nodes, at, seen))
            if proposal.log_q.shape[-1] != out.params.shape[-1]:
                ours, theirs = proposal.log_q.shape[-1], out.params.shape[-1]
                raise ValueError(f"drafts come from laws over {ours} tokens; the middle model has {theirs}")
            logits = transform(out.params, Context(now, paths_of(nodes, inner.paths), at + 1))
            log_p = jax.nn.log_softmax(logits, axis=-1)
            settings = dict(key=key, rows=seq.rows, pos=now.length)
            verdict = verify(self.rule, inner, log_p, proposal.tokens, proposal.log_q, proposal.valid, **settings)
            drafts = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
            new = jnp.where(place == verdict.accepted[:, None], verdict.token[:, None], drafts)
            taken = jnp.minimum(verdict.accepted + 1, end - now.length)
            # What is written behind the tokens taken is overwritten by the next round, or lies behind the end.
            tokens = carry.tokens.at[rows, now.length[:, None] + place].set(new)
            laws = carry.laws.at[rows, (now.length - seq.length)[:, None] + place].set(log_p)
            now = Sequences(tokens, now.length + taken, seq.rows)
            drafter = self.proposer.update(drafter, now, verdict, taken, log_p, out)
            return _Inner(tokens, now.length, laws, drafter, cache.commit(taken))

        one = View(seq.tokens[:, :1], seq.length[:, None], jnp.ones((1, 1), bool))
        out, _ = jax.eval_shape(lambda: self.middle.step(state.cache, one))
        laws = jnp.zeros((b, self.length + inner.drafts + 1, out.params.shape[-1]))
        tokens = jnp.pad(seq.tokens, ((0, 0), (0, inner.drafts)))
        first = round_(_Inner(tokens, seq.length, laws, state.drafter, state.cache))
        done = jax.lax.while_loop(lambda carry: (carry.length < end).any(), round_, first)
        at = seq.length[:, None] + jnp.arange(self.length)
        laws = done.laws[:, : self.length]
        proposal = Proposal(done.tokens[rows, at], laws, ~jnp.isnan(laws).any(axis=-1))
        # The first round has read all certain tokens; what came after it may not stay.
        drafter = self.proposer.rewind(done.drafter, first.drafter)
        return proposal, _State(drafter, done.cache.restore(state.cache))

    def update(self, state, seq, verdict, taken, log_p, out):
        drafter = self.proposer.update(state.drafter, seq, verdict, taken, log_p, out)
        return _State(drafter, self.middle.follow(state.cache, seq, taken, out))


@dataclasses.dataclass(frozen=True)
class Reread:
    """Any model in the middle: it reads the tokens that became certain itself, in a call of its own.

    Attributes:
      model: its step function.
      params, cond: passed to it.
      cache: empty, with room for `max_length` + `length` + 1 positions.
      prompt: the target's.
      length: that of the hierarchy.
    """

    model: StepFn
    params: PyTree
    cache: PyTree
    cond: PyTree
    prompt: Int[Array, "b p"]
    length: int

    def start(self, seq, out):
        return prefill(self.model, self.params, self.cache, self.cond, self.prompt, seq.length)[0]

    def step(self, cache, view):
        return self.model(self.params, cache, view, self.cond)

    def follow(self, cache, seq, taken, out):
        width = self.length + 1
        pos = (seq.length - 1 - taken)[:, None] + jnp.arange(width)
        tokens = seq.tokens[jnp.arange(pos.shape[0])[:, None], pos]
        _, cache = self.step(cache, View(tokens, pos, jnp.tril(jnp.ones((width, width), bool))))
        return cache.commit(taken)


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The target itself with a `RetrievalCache`, which is made from what the target computed: its step has to be `exposing`.

    Attributes:
      model: the target's step function, not exposing.
      params, cond: the target's.
      cache: an empty cache of the target, of any capacity.
      budget, chunk, recent: see `RetrievalCache.select`.
      slack: positions that rounds may stage: those of the hierarchy and of a query of its proposer's chain.
    """

    model: StepFn
    params: PyTree
    cache: KVCache
    cond: PyTree
    budget: int
    chunk: int
    recent: int
    slack: int

    def start(self, seq, out):
        settings = dict(budget=self.budget, chunk=self.chunk, recent=self.recent, slack=self.slack)
        if out is None:
            n, b, _, h, d = self.cache.k.shape
            empty = jnp.zeros((n, b, 1, h, d), self.cache.k.dtype)
            return RetrievalCache.select(empty, empty, empty[:, :, 0], seq.length - 1, **settings)
        seen: Exposed = out.feats
        last = jnp.maximum(seq.length - 2, 0)[None, :, None, None, None]
        queries = jnp.take_along_axis(seen.queries, last, axis=2)[:, :, 0]
        return RetrievalCache.select(seen.k, seen.v, queries, seq.length - 1, **settings)

    def step(self, cache, view):
        return self.model(self.params, cache, view, self.cond)

    def follow(self, cache, seq, taken, out):
        return cache.stage(slice(None), out.feats.k, out.feats.v).commit(taken)
