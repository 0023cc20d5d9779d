"""What a call of the gated delta rule is about: all that implementations may decide on."""

from __future__ import annotations

import dataclasses

__all__ = ["Problem"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call.

    Attributes:
      batch: b.
      length: t.
      heads: h.
      key_size: dk.
      value_size: dv.
      dtype: of q, k and v: "float32", "bfloat16" or "float16".
    """

    batch: int
    length: int
    heads: int
    key_size: int
    value_size: int
    dtype: str
