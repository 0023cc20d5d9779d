"""What a call of block-sparse attention is about: all that implementations may decide on."""

from __future__ import annotations

import dataclasses

from kernels_pallas.block_mask import BlockMask

__all__ = ["Problem"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call.

    Attributes:
      mask: who may attend to whom; its shape is (sq, sk).
      batch: b.
      heads: h, of queries.
      kv_heads: g, of keys and values; divides h. Query head i reads key head i // (h // g).
      head_size: d.
      dtype: of q, k and v: "float32", "bfloat16" or "float16".
      scale: of the products.
    """

    mask: BlockMask
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    scale: float

    @property
    def bucket(self) -> dict:
        """What `kernels_pallas.tuning.tuned` compares; density is the share of allowed elements."""
        length, density = max(self.mask.shape), self.mask.element_density
        return {"dtype": self.dtype, "head_size": self.head_size, "length": length, "density": density}

    @classmethod
    def of(cls, q, k, mask: BlockMask, scale: float) -> Problem:
        """The problem of arrays q [b, sq, h, d] and k [b, sk, g, d]."""
        b, _, h, d = q.shape
        return cls(mask, b, h, k.shape[2], d, str(q.dtype), scale)
