"""The shape of one speculative query: which drafted token follows which."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

__all__ = ["RuntimeTree", "Shape", "Topology", "branches", "chain", "chains"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A tree of nodes 0..n: node 0 is the root, the last token that is certain; the others are drafts.

    Attributes:
      parents: the parent of node 1, 2, ...; every parent comes before its children.
      probes: tokens that are read behind every node besides, each seeing the node's path and the probes before it, and seen by
        nothing else: masks whose outputs the next drafts are made from. In a query they follow the nodes, node by node.

    Example:
      >>> tree = Topology((0, 0, 1))
      >>> tree.depth.tolist(), tree.levels
      ([0, 1, 1, 2], ((1, 2), (3,)))
    """

    parents: tuple[int, ...] = ()
    probes: tuple[int, ...] = ()

    def __post_init__(self):
        for node, parent in enumerate(self.parents, 1):
            if not 0 <= parent < node:
                raise ValueError(f"parents {self.parents}: node {node} must have a parent in 0..{node - 1}, not {parent}")

    @property
    def drafts(self) -> int:
        """n, the number of drafted tokens."""
        return len(self.parents)

    @property
    def queries(self) -> int:
        """Positions of a query: the root, the drafts and all probes."""
        return (self.drafts + 1) * (1 + len(self.probes))

    @property
    def is_chain(self) -> bool:
        """Whether the nodes of every path are 0, 1, 2, ..."""
        return self.parents == tuple(range(self.drafts))

    def shape(self, parents: Int[Array, "b n"] | None, batch: int) -> Shape:
        """The query's shape; the same for all rows, so `parents` is None."""
        if parents is not None:
            raise ValueError("a proposal with parents needs a RuntimeTree as its proposer's topology")
        nodes, probes = self.drafts + 1, len(self.probes)
        depth = np.concatenate([self.depth, (self.depth[:, None] + 1 + np.arange(probes)).reshape(-1)])
        seen = np.zeros((self.queries, self.queries), bool)
        seen[:nodes, :nodes] = self.ancestors
        seen[nodes:, :nodes] = np.repeat(self.ancestors, probes, axis=0)
        seen[nodes:, nodes:] = np.kron(np.eye(nodes, dtype=bool), np.tril(np.ones((probes, probes), bool)))
        above = np.broadcast_to(np.array(self.parents, np.int32).reshape(-1), (batch, self.drafts))
        return Shape(jnp.asarray(above), jnp.asarray(depth), jnp.asarray(seen), jnp.asarray(self.paths))

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """int32 [n + 1]: steps from the root."""
        depth = [0]
        for parent in self.parents:
            depth.append(depth[parent] + 1)
        return np.array(depth, np.int32)

    @functools.cached_property
    def ancestors(self) -> np.ndarray:
        """bool [n + 1, n + 1]: node i sees node j: its ancestors and itself."""
        seen = np.eye(self.drafts + 1, dtype=bool)
        for node, parent in enumerate(self.parents, 1):
            seen[node] |= seen[parent]
        return seen

    @functools.cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of depth 1, of depth 2, ..."""
        return tuple(tuple(np.flatnonzero(self.depth == d).tolist()) for d in range(1, int(self.depth.max()) + 1))

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """int32 [n + 1, d + 1]: the nodes from the root to each node, then -1; d is the largest depth."""
        paths = np.full((self.drafts + 1, len(self.levels) + 1), -1, np.int32)
        paths[0, 0] = 0
        for node, parent in enumerate(self.parents, 1):
            paths[node] = paths[parent]
            paths[node, self.depth[node]] = node
        return paths


class Shape(NamedTuple):
    """What one query looks like, of m positions: the root, n drafts, then probes.

    Attributes:
      parents: of each draft.
      depth: of each position; [m], or [b, m] where rows differ.
      mask: which positions each sees; [m, m] or [b, m, m].
      paths: the nodes on the way to each node, then -1; [n + 1, d] or [b, n + 1, d].
    """

    parents: Int[Array, "b n"]
    depth: Int[Array, "*b m"]
    mask: Bool[Array, "*b m m"]
    paths: Int[Array, "*b n+1 d"]


@dataclasses.dataclass(frozen=True)
class RuntimeTree:
    """A tree whose shape is found while sampling, another one for each row: the proposal brings the parents.

    Attributes:
      drafts: n.
      height: depth of the deepest draft there can be.
    """

    drafts: int
    height: int

    def __post_init__(self):
        if not 1 <= self.height <= self.drafts:
            raise ValueError(f"height={self.height}: must be in 1..drafts={self.drafts}")

    @property
    def probes(self) -> tuple[int, ...]:
        """None."""
        return ()

    @property
    def queries(self) -> int:
        """The root and the drafts."""
        return self.drafts + 1

    @property
    def is_chain(self) -> bool:
        """Not known beforehand."""
        return False

    @property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Every draft may be at every depth."""
        return (tuple(range(1, self.drafts + 1)),) * self.height

    def shape(self, parents: Int[Array, "b n"] | None, batch: int) -> Shape:
        """The shape that `parents` give; a parent comes before its children, and depths are at most `height`."""
        if parents is None or parents.shape != (batch, self.drafts):
            got = "none" if parents is None else parents.shape
            raise ValueError(f"a RuntimeTree of {self.drafts} drafts needs parents [{batch}, {self.drafts}]; got {got}")
        nodes = self.drafts + 1
        above = jnp.pad(parents, ((0, 0), (1, 0)))
        node = jnp.broadcast_to(jnp.arange(nodes), (batch, nodes))
        way = [node]
        for _ in range(self.height):
            node = jnp.take_along_axis(above, node, axis=1)
            way.append(node)
        up = jnp.stack(way, axis=-1)  # [b, n + 1, height + 1]: the node, its parent, ..., then the root for ever
        depth = (up > 0).sum(-1)
        place = depth[..., None] - jnp.arange(self.height + 1)
        paths = jnp.where(place >= 0, jnp.take_along_axis(up, jnp.maximum(place, 0), axis=-1), -1)
        seen = (up[..., None] == jnp.arange(nodes)).any(axis=2)
        return Shape(parents, depth, seen, paths)


def chain(length: int) -> Topology:
    """`length` drafts, one after another."""
    return Topology(tuple(range(length)))


def chains(count: int, length: int) -> Topology:
    """`count` independent chains from the root (SpecTr, Sun et al. 2023); level by level."""
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    return Topology(tuple(max(0, node - count) for node in range(1, count * length + 1)))


def branches(counts: Sequence[int]) -> Topology:
    """A full tree: every node of depth i has `counts[i]` children; level by level.

    Example:
      >>> branches((2, 1)).parents
      (0, 0, 1, 2)
    """
    if any(count < 1 for count in counts):
        raise ValueError(f"counts {tuple(counts)} must be positive")
    parents, level = [], [0]
    for count in counts:
        start = len(parents) + 1
        parents += [node for node in level for _ in range(count)]
        level = list(range(start, len(parents) + 1))
    return Topology(tuple(parents))
