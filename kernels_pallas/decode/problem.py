"""What a call of decode or tree attention is about: all that implementations may decide on."""

from __future__ import annotations

import dataclasses

__all__ = ["Problem"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call's attention to the cache.

    Attributes:
      batch: b.
      length: s, of the cache.
      queries: t, a sequence: 1 for decode, nodes of a tree.
      heads: h, of queries.
      kv_heads: g, of the cache; divides h. Query head i reads key head i // (h // g).
      head_size: d.
      dtype: of queries and caches: "float32", "bfloat16" or "float16".
      scale: of the products.
    """

    batch: int
    length: int
    queries: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    scale: float

    @property
    def rows(self) -> int:
        """Query rows that read one kv head: n = t * h / g."""
        return self.queries * self.heads // self.kv_heads
