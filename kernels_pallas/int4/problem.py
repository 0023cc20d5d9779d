"""What a product with 4-bit weights is about: all that implementations may decide on."""

from __future__ import annotations

import dataclasses

from kernels_pallas.int4.pack import nests

__all__ = ["Problem", "power"]


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call, y [m, n] = x [m, k] w.

    Attributes:
      m: rows of x, all its leading axes together.
      k: columns of x.
      n: columns of w.
      group, tile, layout: of the weights, see `PackedInt4`.
      dtype: of x and y: "float32", "bfloat16" or "float16".
      scale_dtype: of the scales.
    """

    m: int
    k: int
    n: int
    group: int
    tile: int
    layout: str
    dtype: str
    scale_dtype: str

    @property
    def bucket(self) -> dict:
        """What `kernels_pallas.tuning.tuned` compares: columns stand for head sizes, rows of x for lengths."""
        return {"dtype": self.dtype, "head_size": power(self.n), "length": self.m}

    @property
    def block(self) -> int:
        """Rows of w that a block of words holds."""
        return 4 * self.tile

    @property
    def span(self) -> int:
        """Consecutive rows of a block that share a scale."""
        return min(self.group, self.block)

    def step(self, most: int, multiple: int) -> int | None:
        """The largest number of rows up to `most` that divides k, in whole blocks and whole groups (or a group in whole steps).

        Args:
          most: rows.
          multiple: of which it is one, unless it is k itself.

        Returns:
          The step; None if there is none, or if groups and blocks do not nest.
        """
        if not nests(self.group, self.tile):
            return None
        for step in range(most - most % self.block, 0, -self.block):
            whole = step % self.group == 0 or self.group % step == 0
            if self.k % step == 0 and whole and (step % multiple == 0 or step == self.k):
                return step
        return None
