"""The shape of one speculative query: which drafted token follows which."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

__all__ = ["Topology", "branches", "chain", "chains"]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A tree of nodes 0..n: node 0 is the root, the last token that is certain; the others are drafts.

    Attributes:
      parents: the parent of node 1, 2, ...; every parent comes before its children.

    Example:
      >>> tree = Topology((0, 0, 1))
      >>> tree.depth.tolist(), tree.levels
      ([0, 1, 1, 2], ((1, 2), (3,)))
    """

    parents: tuple[int, ...] = ()

    def __post_init__(self):
        for node, parent in enumerate(self.parents, 1):
            if not 0 <= parent < node:
                raise ValueError(f"parents {self.parents}: node {node} must have a parent in 0..{node - 1}, not {parent}")

    @property
    def drafts(self) -> int:
        """n, the number of drafted tokens."""
        return len(self.parents)

    @property
    def is_chain(self) -> bool:
        """Whether the nodes of every path are 0, 1, 2, ..."""
        return self.parents == tuple(range(self.drafts))

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
