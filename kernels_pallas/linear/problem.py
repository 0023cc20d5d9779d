"""What a call of linear attention is about: all that implementations may decide on."""

from __future__ import annotations

import dataclasses

__all__ = ["FLOOR", "Problem"]

# exp(FLOOR) rounds to 0 in float32, so the floor changes no value; it keeps sums over a chunk finite where log_decay is -inf.
FLOOR = -104.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call.

    Attributes:
      batch: b. For reading and tuning only: under `vmap` and meshes the arrays' own leading axis counts.
      length: t.
      heads: h.
      key_size: dk, of queries and keys.
      value_size: dv.
      dtype: of q, k and v: "float32", "bfloat16" or "float16".
      decay: "none", "scalar" (log_decay [b, t, h]) or "channel" (log_decay [b, t, h, dk]).
      block_size: tokens of a block that see each other, and all blocks before; 1 is causal, t is bidirectional.
    """

    batch: int
    length: int
    heads: int
    key_size: int
    value_size: int
    dtype: str
    decay: str
    block_size: int

    @property
    def causal(self) -> bool:
        """Whether a token sees no later one."""
        return self.block_size == 1
