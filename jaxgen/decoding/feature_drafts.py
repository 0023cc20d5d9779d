"""Proposers that draft from the target's features: several levels a pass in a designed tree, or a tree grown by beam search."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.decoding.noise import DRAFT, gumbel
from jaxgen.decoding.proposers import without
from jaxgen.decoding.speculate import Context, Proposal, paths_of
from jaxgen.decoding.topology import RuntimeTree, Topology

__all__ = ["BeamDrafts", "BlockDrafts", "Drafter", "designed_tree"]

PyTree = Any

_BRANCHES = "0123456789abcdefghijklmnopqrstuvwxyz"


def designed_tree(paths: str) -> Topology:
    """The tree of some paths, each written as the branch number of every node on it, one digit or letter a branch.

    Branch 0 is a parent's first child, "a" its eleventh. Every path but a first level's continues another one.

    Raises:
      ValueError: a path that is there twice, or one without its parent or its elder sibling.

    Example:
      >>> designed_tree("0 1 00 01 10").parents
      (0, 0, 1, 1, 2)
    """
    ordered = sorted(paths.split(), key=lambda path: (len(path), path))
    number = {"": 0} | {path: i for i, path in enumerate(ordered, 1)}
    if len(number) != len(ordered) + 1 or not ordered:
        raise ValueError(f"tree={paths!r}: expected different paths, such as '0 1 00'")
    for path in ordered:
        branch = _BRANCHES.find(path[-1])
        if path[:-1] not in number or branch < 0 or (branch and path[:-1] + _BRANCHES[branch - 1] not in number):
            raise ValueError(f"tree={paths!r}: {path!r} lacks its parent or its elder sibling")
    return Topology(tuple(number[path[:-1]] for path in ordered))


class Drafter(Protocol):
    """A drafter with its parameters: pairs of a token and the feature before it become vectors, blocks of k vectors features.

    Vector s gives feature s; k - 1 vectors come before the first pair. Keys and values of a vector depend on it alone.

    Attributes:
      block: k, the features that one block gives.
    """

    block: int

    def start(self, batch: int) -> tuple[PyTree, PyTree, Float[Array, "b k-1 d"], Float[Array, "b 1 d"]]:
        """(cache, recurrent state, vectors before the first pair, feature before the first token)."""

    def fuse(self, states: PyTree, tokens: Int[Array, "b q"], features: Float[Array, "b q d"]) -> tuple[PyTree, Any]:
        """(states after each pair [b, q, ...], vectors [b, q, d]), from the state before the first pair."""

    def read(self, x: Float[Array, "b q d"], pos: Int[Array, "b q"], cache: PyTree, mask: Bool[Array, "*b q q"]):
        """(features [b, q, d], cache), the vectors staged."""

    def features(self, feats: Array) -> Array:
        """What it reads of the target's `Out.feats`."""

    def logits(self, features: Array) -> Array:
        """Of the tokens after features."""


class _Behind(NamedTuple):
    """Where a drafter stands.

    Attributes:
      cache: all vectors before `window`.
      state: recurrent, after all pairs.
      window: the last vectors.
      old: how many of them lie before the last block.
    """

    cache: PyTree
    state: PyTree
    window: Float[Array, "b w d"]
    old: Int[Array, "b"]


def _start(drafter: Drafter, levels: int, seq, out) -> _Behind:
    """Reads the prompt, whose rows differ in length. Where the target has not told its features, the first one stands for all."""
    (b, room), last = seq.tokens.shape, (seq.length - 1)[:, None]
    cache, state, before, first = drafter.start(b)
    if out is None:
        features = jnp.broadcast_to(first, (b, room, first.shape[-1]))
    else:
        features = jnp.concatenate([first, drafter.features(_known(out))], axis=1)
    p, k = features.shape[1], drafter.block
    states, x = drafter.fuse(state, seq.tokens[:, :p], features)
    x = jnp.concatenate([before, x], axis=1)
    q = x.shape[1]
    cache = cache.commit(jnp.zeros((b,), jnp.int32))  # a length a row from here on
    _, cache = drafter.read(x, jnp.broadcast_to(jnp.arange(q), (b, q)), cache, jnp.tril(jnp.ones((q, q), bool)))
    tail = jnp.take_along_axis(x, (last + jnp.arange(k))[..., None], axis=1)
    window = jnp.pad(tail, ((0, 0), (0, levels + 1), (0, 0)))
    return _Behind(cache.commit(seq.length - 1), _at(states, last[:, 0]), window, jnp.zeros((b,), jnp.int32))


def _known(out) -> Float[Array, "b q d"]:
    if out.feats is None:
        raise ValueError("the target's step returns no feats, which this drafter reads")
    return out.feats


def _follow(drafter: Drafter, behind: _Behind, seq, verdict, taken, out) -> _Behind:
    """Takes in what was accepted: the target's own features take the place of guesses."""
    k = drafter.block
    feats = jnp.take_along_axis(_known(out), verdict.path[..., None], axis=1)
    at = (seq.length - taken)[:, None] + jnp.arange(feats.shape[1])
    tokens = jnp.take_along_axis(seq.tokens, jnp.minimum(at, seq.tokens.shape[1] - 1), axis=1)
    states, x = drafter.fuse(behind.state, tokens, drafter.features(feats))
    state = jax.tree.map(
        lambda new, old: jnp.where((taken > 0)[:, None], new, old), _at(states, jnp.maximum(taken - 1, 0)), behind.state
    )
    tail = jnp.take_along_axis(behind.window, (behind.old[:, None] + jnp.arange(k))[..., None], axis=1)
    return _Behind(behind.cache, state, jnp.concatenate([tail, x], axis=1), taken)


def _read_last(drafter: Drafter, behind: _Behind, seq):
    """(features that the last block gives, cache of all vectors before it)."""
    k, old = drafter.block, behind.old[:, None]
    slots = jnp.arange(behind.window.shape[1])
    pos = (seq.length - 1)[:, None] - old + slots
    known = (slots < old + k)[:, None, :]
    mask = jnp.broadcast_to(known, (*pos.shape, pos.shape[1]))
    features, cache = drafter.read(behind.window, pos, behind.cache, mask)
    features = jnp.take_along_axis(features, (old + jnp.arange(k))[..., None], axis=1)
    return features, cache.commit(behind.old)


def _forget(behind: _Behind, cache) -> _Behind:
    """After the old vectors went into the cache: the window begins with the last block."""
    width = behind.window.shape[1]
    slots = jnp.minimum(behind.old[:, None] + jnp.arange(width), width - 1)
    window = jnp.take_along_axis(behind.window, slots[..., None], axis=1)
    return behind._replace(cache=cache, window=window, old=jnp.zeros_like(behind.old))


def _blocks_below(drafter: Drafter, states: PyTree, features, above: Int[Array, "b n"], tokens: Int[Array, "b n k"]):
    """(states [b, n, d], vectors [b, n k, d]) of blocks of drafts: their tokens with the features [b, m, k, d] guessed above."""
    b, n, k = tokens.shape
    states, features = jax.tree.map(lambda x: _rows(x, above).reshape(b * n, *x.shape[2:]), (states, features))
    states, x = drafter.fuse(states, tokens.reshape(b * n, k), features)
    return jax.tree.map(lambda x: x[:, -1].reshape(b, n, -1), states), x.reshape(b, n * k, -1)


def _rows(x: Array, index: Int[Array, "b n"]) -> Array:
    """x[b, index[b, i]]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _at(states: PyTree, index: Int[Array, "b"]) -> PyTree:
    """The states after pair `index` of each row."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0], states)


@dataclasses.dataclass(frozen=True)
class BlockDrafts:
    """Semi-autoregressive drafts in a designed tree: every pass fills k levels (Falcon, Gao et al. 2024, section 3.4).

    A block's k laws are made at once, so that the law of its second level does not know which token its first level drew. After
    every k levels, each path of k drafts that has children becomes a block: its tokens with the features that its parent block
    guessed. Siblings are drawn without replacement, each recorded with the law that was left when it was drawn, which recursive
    rejection (`Rejection`) needs to be exact. Families below one block and depth share their draws: only the family of the
    accepted node is ever looked at.

    Attributes:
      drafter: see `Drafter`; its cache has room for `max_length` + 2 k + k * drafts + 1 vectors besides what it holds.
      topology: of the drafts; with k = 1 and any tree these are EAGLE's drafts.
      coupled: draw with the target's own noise, for `Coupled`.
    """

    drafter: Drafter
    topology: Topology
    coupled: bool = False

    def start(self, seq, key, vocab, out):
        return _start(self.drafter, len(self.topology.levels), seq, out)

    def update(self, state, seq, verdict, taken, log_p, out):
        return _follow(self.drafter, state, seq, verdict, taken, out)

    def propose(self, state, seq, transform, key):
        drafter, k, b, tree = self.drafter, self.drafter.block, seq.tokens.shape[0], self.topology
        features, cache = _read_last(drafter, state, seq)
        kept, beyond = _forget(state, cache), cache.commit(k)  # the latter while drafts below the last block are read
        root = jnp.take_along_axis(seq.tokens, seq.length[:, None] - 1, axis=1)
        nodes = jnp.zeros((b, tree.drafts + 1), jnp.int32).at[:, 0].set(root[:, 0])
        features, carry = features[:, None], jax.tree.map(lambda x: x[:, None], state.state)  # [b, blocks, ...]
        laws, x = None, jnp.zeros((b, 0, features.shape[-1]))
        for i, ends in enumerate(self._passes):
            nodes, laws = self._draw(i, ends, features, nodes, laws, seq, transform, key)
            if i + 1 == len(self._passes):
                break
            # Blocks below: their tokens with the features that the block above guessed.
            below = self._passes[i + 1]
            above = np.array([ends.index(tree.paths[node, i * k]) for node in below])
            members = np.stack([tree.paths[node, i * k + 1 : i * k + k + 1] for node in below])
            above = jnp.broadcast_to(above, (b, len(below)))
            carry, new = _blocks_below(drafter, carry, features, above, nodes[:, members])
            x = jnp.concatenate([x, new], axis=1)
            depth, mask = self._query(i + 1)
            out, _ = drafter.read(x, (seq.length + k - 2)[:, None] + depth, beyond, mask)
            features = out[:, -len(below) * k :].reshape(b, len(below), k, -1)
        return Proposal(nodes[:, 1:], laws), kept

    @functools.cached_property
    def _passes(self) -> tuple[tuple[int, ...], ...]:
        """For each pass the nodes that its blocks end with; the first reads the last certain tokens, whose end is the root."""
        tree, k = self.topology, self.drafter.block
        inner = set(tree.parents)
        passes = [(0,)]
        for depth in range(k, len(tree.levels), k):
            passes.append(tuple(node for node in tree.levels[depth - 1] if node in inner))
        return tuple(passes)

    def _query(self, passes: int):
        """(depth, mask) of the vectors of passes 1..`passes`: a vector sees its own block and those above."""
        tree, k = self.topology, self.drafter.block
        ends = [node for level in self._passes[1 : passes + 1] for node in level]
        depth = np.concatenate([tree.depth[node] - k + 1 + np.arange(k) for node in ends])
        seen = tree.ancestors[np.ix_(ends, ends)]
        return jnp.asarray(depth), jnp.asarray(np.kron(seen, np.ones((k, k), bool)))

    def _draw(self, i, ends, features, nodes, laws, seq, transform, key):
        """Draws the children of all nodes of k levels, from the laws of pass i."""
        tree, k, b = self.topology, self.drafter.block, nodes.shape[0]
        logits = self.drafter.logits(features.reshape(b, -1, features.shape[-1]))
        # The path of each law as far as its block knows it: down to the block's end.
        known = paths_of(nodes, np.repeat(tree.paths[list(ends)], k, axis=0))
        pos = seq.length[:, None] + i * k + np.tile(np.arange(k), len(ends))
        log_q = jax.nn.log_softmax(transform(logits, Context(seq, known, pos)), axis=-1).reshape(b, len(ends), k, -1)
        vocab = log_q.shape[-1]
        if laws is None:
            laws = jnp.zeros((b, tree.drafts, vocab))
        streams = jnp.zeros(len(ends), jnp.int32) if self.coupled else DRAFT + jnp.asarray(ends)
        for offset, level in enumerate(tree.levels[i * k : i * k + k]):
            at = jnp.broadcast_to((seq.length + i * k + offset)[:, None], (b, len(ends)))
            noise, law = gumbel(key, seq.rows, at, vocab, stream=streams), log_q[:, :, offset]
            ranks = {}  # which of its siblings a node is
            for node in level:
                rank = sum(tree.parents[other - 1] == tree.parents[node - 1] for other in level if other < node)
                ranks.setdefault(rank, []).append(node)
            for rank in sorted(ranks):
                children = np.array(ranks[rank])
                block = np.array([ends.index(tree.paths[node, i * k]) for node in children])
                token = jnp.argmax(law + noise, axis=-1).astype(jnp.int32)
                nodes, laws = nodes.at[:, children].set(token[:, block]), laws.at[:, children - 1].set(law[:, block])
                law = without(law, jax.nn.one_hot(token, vocab, dtype=bool))
        return nodes, laws


@dataclasses.dataclass(frozen=True)
class BeamDrafts:
    """A tree found at run time (EAGLE-2, Li et al. 2024, arXiv:2406.16858, section 4): a beam search, then the best nodes.

    At every depth each of the `beam` nodes of the frontier is given its `beam` most probable children; the `beam` children
    with the largest product of probabilities along their path are the next frontier. At the end, of all children ever scored
    the `topology.drafts` best are kept. A path's product never grows, so that a node's parent is kept with it. Drafts are chosen,
    not drawn: a rule accepts them with the target's probability.

    Attributes:
      drafter: see `Drafter`, of block 1; its cache has room for `max_length` + beam * drafts + 3 vectors besides what it holds.
      topology: how many drafts are kept, and how deep they may lie.
      beam: nodes expanded at each depth; at most the vocabulary.
    """

    drafter: Drafter
    topology: RuntimeTree
    beam: int

    def __post_init__(self):
        n, beam, height = self.topology.drafts, self.beam, self.topology.height
        if self.drafter.block != 1:
            raise ValueError(f"block={self.drafter.block}: a beam expands one level a pass, so its drafter's block is 1")
        most = beam + (height - 1) * beam * beam
        if beam < 1 or n > most:
            raise ValueError(f"beam={beam} scores {most} nodes down to depth {height}; the tree keeps drafts={n}")

    def start(self, seq, key, vocab, out):
        if self.beam > vocab:
            raise ValueError(f"beam={self.beam} is larger than the vocabulary, {vocab}")
        return _start(self.drafter, self.topology.height, seq, out)

    def update(self, state, seq, verdict, taken, log_p, out):
        return _follow(self.drafter, state, seq, verdict, taken, out)

    def propose(self, state, seq, transform, key):
        drafter, beam, b = self.drafter, self.beam, seq.tokens.shape[0]
        features, cache = _read_last(drafter, state, seq)
        kept = _forget(state, cache)
        beyond = cache.commit(1)
        root = jnp.take_along_axis(seq.tokens, seq.length[:, None] - 1, axis=1)
        score = jnp.zeros((b, 1))  # of the frontier
        carry = jax.tree.map(lambda x: x[:, None], state.state)
        path = root[:, None]  # tokens down to the frontier [b, frontier, depth + 1]
        seen = jnp.zeros((b, 1, 0), bool)  # which vectors the frontier's nodes see
        x, mask, depths = jnp.zeros((b, 0, features.shape[-1])), jnp.zeros((b, 0, 0), bool), []
        origin = jnp.full((b, 1), -1)  # the frontier's nodes among all scored
        tokens, scores, parents = [], [], []
        for depth in range(1, self.topology.height + 1):
            at = jnp.broadcast_to((seq.length + depth - 1)[:, None], path.shape[:2])
            law = jax.nn.log_softmax(transform(drafter.logits(features), Context(seq, path, at)), axis=-1)
            best, token = jax.lax.top_k(jnp.where(jnp.isnan(law), -jnp.inf, law), beam)
            total = (score[..., None] + best).reshape(b, -1)
            count = sum(t.shape[1] for t in tokens)
            tokens.append(token.reshape(b, -1))
            scores.append(total)
            parents.append(jnp.repeat(origin, beam, axis=1))
            if depth == self.topology.height:
                break
            score, chosen = jax.lax.top_k(total, beam)
            above, origin = chosen // beam, count + chosen
            token = jnp.take_along_axis(tokens[-1], chosen, axis=1)
            path = jnp.concatenate([_rows(path, above), token[..., None]], axis=2)
            carry, new = _blocks_below(drafter, carry, features[:, :, None], above, token[..., None])
            x = jnp.concatenate([x, new], axis=1)
            # All vectors of the tree so far are read anew, since a cache is either sure of a vector or does not hold it.
            own = jnp.broadcast_to(jnp.eye(beam, dtype=bool), (b, beam, beam))
            seen = jnp.concatenate([_rows(seen, above), own], axis=2)
            mask = jnp.concatenate([jnp.pad(mask, ((0, 0), (0, 0), (0, beam))), seen], axis=1)
            depths += [depth] * beam
            out, _ = drafter.read(x, (seq.length - 1)[:, None] + jnp.array(depths), beyond, mask)
            features = out[:, -beam:]
        return _keep_best(tokens, scores, parents, self.topology.drafts), kept


def _keep_best(tokens, scores, parents, count: int) -> Proposal:
    """The best of all scored nodes, in the order in which they were scored, parents before children."""
    tokens, scores, parents = (jnp.concatenate(x, axis=1) for x in (tokens, scores, parents))
    best, index = jax.lax.top_k(scores, count)
    order = jnp.argsort(index, axis=1)
    best, index = (jnp.take_along_axis(x, order, axis=1) for x in (best, index))
    # A scored node's number in the tree; ties go to the node scored first, so that no child comes without its parent.
    rows = jnp.arange(tokens.shape[0])[:, None]
    number = jnp.zeros(scores.shape, jnp.int32).at[rows, index].set(jnp.arange(1, count + 1))
    above = jnp.take_along_axis(parents, index, axis=1)
    above = jnp.where(above < 0, 0, jnp.take_along_axis(number, jnp.maximum(above, 0), axis=1))
    return Proposal(jnp.take_along_axis(tokens, index, axis=1), None, jnp.isfinite(best), above)
