"""Drafters that need nothing but a step function or the tokens so far: another model, repeated n-grams."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.decoding.noise import DRAFT, gumbel
from jaxgen.decoding.speculate import Context, Proposal, paths_of, prefill
from jaxgen.decoding.step import StepFn, View
from jaxgen.decoding.topology import Topology, chain

__all__ = ["DraftModel", "NGram", "without"]

PyTree = Any


class _Draft(NamedTuple):
    cache: PyTree
    behind: Int[Array, "b"]  # certain tokens that the draft has not read


@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts with another, cheaper model, one call a level of the topology (Leviathan et al. 2023).

    Attributes:
      step: the draft; it reads the same tokens as the target.
      params: passed to `step`.
      cache: empty, with room for `max_length` + drafts (and `reach`) positions.
      cond: passed to `step`.
      prompt: the target's.
      topology: of the drafts.
      replacement: draw siblings independently (`KSeq`, `Rejection`); else without replacement, each with the law that is left
        (`Rejection`).
      coupled: draw with the target's own noise, for `Coupled`: the nearer q is to p, the more agree.
      reach: how many tokens may have become certain since the last call; 0 is as many as a round of this topology makes.
      chunk: tokens of the prompt to read at once, for caches that hold no more; 0 is all.
    """

    step: StepFn
    params: PyTree
    cache: PyTree
    cond: PyTree
    prompt: Int[Array, "b p"]
    topology: Topology
    replacement: bool = False
    coupled: bool = False
    reach: int = 0
    chunk: int = 0

    def __post_init__(self):
        if self.coupled and self.replacement:
            raise ValueError("coupled=True: siblings that share the target's noise are equal; set replacement=False")

    def start(self, seq, key, vocab, out):
        cache, _ = prefill(self.step, self.params, self.cache, self.cond, self.prompt, seq.length, chunk=self.chunk)
        return _Draft(cache, jnp.ones(seq.length.shape, jnp.int32))

    def propose(self, state, seq, transform, key):
        topology, b = self.topology, seq.tokens.shape[0]
        rows, root = jnp.arange(b)[:, None], seq.length - 1
        # What became certain since the last round, the root at its end; slots behind the root are read but not kept.
        width = max(len(topology.levels) + 1, self.reach)
        pos = (seq.length - state.behind)[:, None] + jnp.arange(width)
        view = View(seq.tokens[rows, pos], pos, jnp.tril(jnp.ones((width, width), bool)))
        out, cache = self.step(self.params, state.cache, view, self.cond)
        logits = jnp.take_along_axis(out.params, jnp.maximum(state.behind - 1, 0)[:, None, None], axis=1)
        certain = cache = cache.commit(state.behind)
        nodes = jnp.zeros((b, topology.drafts + 1), jnp.int32).at[:, 0].set(seq.tokens[rows[:, 0], root])
        laws = jnp.zeros((b, topology.drafts + 1, logits.shape[-1]))
        for d, level in enumerate(((0,), *topology.levels)[:-1]):
            if d:
                logits, cache = self._read(cache, nodes, root, level, d)
            at = jnp.broadcast_to((root + d + 1)[:, None], (b, len(level)))
            context = Context(seq, paths_of(nodes, topology.paths[list(level)]), at)
            log_q = jax.nn.log_softmax(transform(logits, context), axis=-1)
            nodes, laws = self._children(level, log_q, nodes, laws, seq.rows, root + d + 1, key)
        return Proposal(nodes[:, 1:], laws[:, 1:]), state._replace(cache=cache.restore(certain))

    def _read(self, cache, nodes, root, level, d: int):
        """Logits after the nodes of a level. A chain commits node by node; a tree is read anew, so that paths stay apart."""
        if self.topology.is_chain:
            view = View(nodes[:, d : d + 1], (root + d)[:, None], jnp.ones((1, 1), bool))
            out, cache = self.step(self.params, cache, view, self.cond)
            return out.params, cache.commit(1)
        end = level[-1] + 1
        seen = jnp.asarray(self.topology.ancestors[1:end, 1:end])
        view = View(nodes[:, 1:end], root[:, None] + jnp.asarray(self.topology.depth[1:end]), seen)
        out, cache = self.step(self.params, cache, view, self.cond)
        return out.params[:, -len(level) :], cache

    def _children(self, level, log_q, nodes, laws, rows, pos, key):
        """Draws the children of a level: the i-th children of all of its nodes at once."""
        families = [[child for child, parent in enumerate(self.topology.parents, 1) if parent == node] for node in level]
        at = jnp.broadcast_to(pos[:, None], (pos.shape[0], len(level)))
        streams = jnp.zeros(len(level), jnp.int32) if self.coupled else DRAFT + jnp.asarray(level)
        noise = gumbel(key, rows, at, log_q.shape[-1], stream=streams)
        for i in range(max(map(len, families))):
            have = [(j, family[i]) for j, family in enumerate(families) if i < len(family)]
            parents, children = (jnp.asarray(x) for x in zip(*have))
            if self.replacement:
                noise = gumbel(key, rows, at, log_q.shape[-1], stream=DRAFT + jnp.zeros_like(streams).at[parents].set(children))
            token = jnp.argmax(log_q + noise, axis=-1).astype(jnp.int32)
            nodes, laws = nodes.at[:, children].set(token[:, parents]), laws.at[:, children].set(log_q[:, parents])
            if not self.replacement:
                # The largest perturbed logits, one after another, are draws without replacement (Kool et al. 2019).
                log_q = without(log_q, jax.nn.one_hot(token, log_q.shape[-1], dtype=bool))
        return nodes, laws

    def update(self, state, seq, verdict, taken, log_p, out):
        return state._replace(behind=taken)

    def rewind(self, state: _Draft, saved: _Draft) -> _Draft:
        """`saved`, which `state` was made from by proposals and updates that are not to count."""
        return saved._replace(cache=state.cache.restore(saved.cache))


def without(log_q: Float[Array, "*b v"], taken: Bool[Array, "*b v"]) -> Float[Array, "*b v"]:
    """The law without some tokens, normalised; where nothing is left, as it was."""
    left = jnp.where(taken, -jnp.inf, log_q)
    total = jax.nn.logsumexp(left, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(total), left - jnp.where(jnp.isfinite(total), total, 0.0), log_q)


@dataclasses.dataclass(frozen=True)
class NGram:
    """Proposes what followed the latest earlier occurrence of the last `order` tokens (prompt lookup, Saxena 2023).

    Attributes:
      length: tokens to propose.
      order: tokens that must match.
    """

    length: int
    order: int = 2

    def __post_init__(self):
        if self.length < 1 or self.order < 1:
            raise ValueError(f"length={self.length} and order={self.order} must be at least 1")

    @property
    def topology(self) -> Topology:
        """A chain."""
        return chain(self.length)

    def start(self, seq, key, vocab, out):
        return ()

    def propose(self, state, seq, transform, key):
        b, s = seq.tokens.shape
        ends = jnp.arange(s)  # an occurrence that ends before position `ends`
        match = (ends[None] >= self.order) & (ends[None] < seq.length[:, None])
        for i in range(1, self.order + 1):
            last = jnp.take_along_axis(seq.tokens, jnp.maximum(seq.length - i, 0)[:, None], axis=1)
            match &= jnp.roll(seq.tokens, i, axis=1) == last
        found = match.any(axis=1) & (seq.length > self.order)
        start = s - 1 - jnp.argmax(match[:, ::-1], axis=1)
        at = start[:, None] + jnp.arange(self.length)
        valid = found[:, None] & (at < seq.length[:, None])
        tokens = jnp.take_along_axis(seq.tokens, jnp.minimum(at, s - 1), axis=1)
        return Proposal(tokens, None, valid), state

    def update(self, state, seq, verdict, taken, log_p, out):
        return state
