"""Variable-length codes as binary trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

__all__ = ["NO_CODE", "Forest"]

NO_CODE = -(1 << 20)  # a bit that no code goes on with


@dataclasses.dataclass(eq=False)
class Forest:
    """Binary trees of codes, whose nodes are numbered throughout.

    Attributes:
      children: of each node: another node's number, -1 - symbol, or `NO_CODE`.
      rest: of each node, the fewest bits to the end of a code and of what its symbol says is to follow.
    """

    children: list[list[int]] = dataclasses.field(default_factory=list)
    rest: list[int] = dataclasses.field(default_factory=list)

    def grow(self, leaves: Iterable[tuple[str, int, int]]) -> int:
        """The root of a tree of (code, symbol, fewest bits that follow)."""
        root = self._node()
        for code, symbol, after in leaves:
            node = root
            for i, bit in enumerate(map(int, code)):
                self.rest[node] = min(self.rest[node], len(code) - i + after)
                if i == len(code) - 1:
                    self.children[node][bit] = -1 - symbol
                elif self.children[node][bit] == NO_CODE:
                    self.children[node][bit] = self._node()
                node = self.children[node][bit]
        return root

    def _node(self) -> int:
        self.children.append([NO_CODE, NO_CODE])
        self.rest.append(1 << 20)
        return len(self.rest) - 1
