"""Attention masks as predicates over per-token metadata, with a static plan of empty, partial and full blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BlockMask"]

EMPTY, PARTIAL, FULL = 0, 1, 2


class BlockMask:
    """Who may attend to whom: `allowed[i, j] = pred(q_meta[:, i], k_meta[:, j])`.

    Immutable and hashable: two masks with the same predicate function, metadata and block are equal, so modules that hold
    equal masks share a compilation. Predicates should therefore be module-level functions, not fresh lambdas.

    Attributes:
      pred: `(q, k) -> bool array`, element-wise over broadcast int32 arrays `q` [m, sq, 1] and `k` [m, 1, sk]; NumPy or JAX.
      q_meta: int32 [m, sq], one column of metadata a query.
      k_meta: int32 [m, sk], the same for keys.
      block: (queries, keys) of a block in the plan.
    """

    __slots__ = ("pred", "q_meta", "k_meta", "block", "_key", "__dict__")

    def __init__(self, pred: Callable[[Any, Any], Any], q_meta, k_meta, block: tuple[int, int] = (128, 64)):
        q_meta, k_meta = (np.array(m, dtype=np.int32) for m in (q_meta, k_meta))
        if q_meta.ndim != 2 or k_meta.ndim != 2 or q_meta.shape[0] != k_meta.shape[0]:
            raise ValueError(f"q_meta {q_meta.shape} and k_meta {k_meta.shape} must be [m, sq] and [m, sk] with one m")
        if min(block) < 1:
            raise ValueError(f"block {block} must be positive")
        got = np.shape(pred(q_meta[:, :, None], k_meta[:, None, :]))
        if got != (q_meta.shape[1], k_meta.shape[1]):
            raise ValueError(f"pred must be element-wise: it gave shape {got} for {q_meta.shape} and {k_meta.shape}")
        for array in (q_meta, k_meta):
            array.setflags(write=False)
        self.pred, self.q_meta, self.k_meta, self.block = pred, q_meta, k_meta, tuple(block)
        self._key = (pred, q_meta.shape, q_meta.tobytes(), k_meta.shape, k_meta.tobytes(), self.block)

    @classmethod
    def build(cls, pred: Callable[[Any, Any], Any], q_meta, k_meta, block: tuple[int, int] = (128, 64)) -> BlockMask:
        """The mask of `pred` over metadata `q_meta` [m, sq] and `k_meta` [m, sk].

        Raises:
          ValueError: metadata of another rank, or a predicate that is not element-wise.

        Example:
          >>> causal = lambda q, k: q[0] >= k[0]
          >>> BlockMask.build(causal, [range(4)], [range(4)]).dense().sum()
          10
        """
        return cls(pred, q_meta, k_meta, block)

    @property
    def shape(self) -> tuple[int, int]:
        """(sq, sk)."""
        return self.q_meta.shape[1], self.k_meta.shape[1]

    def dense(self) -> np.ndarray:
        """bool [sq, sk], on the host; for tests and drawings."""
        return np.asarray(self.pred(self.q_meta[:, :, None], self.k_meta[:, None, :]), bool)

    def traced(self):
        """bool [sq, sk] computed inside the program from the metadata: XLA fuses it, no [sq, sk] constant is stored."""
        import jax.numpy as jnp

        return self.pred(jnp.asarray(self.q_meta)[:, :, None], jnp.asarray(self.k_meta)[:, None, :])

    @functools.cached_property
    def plan(self) -> np.ndarray:
        """int8 [ceil(sq / block_q), ceil(sk / block_k)]: 0 empty, 1 partial, 2 full."""
        allowed, (bq, bk) = self.dense(), self.block
        rows = np.add.reduceat(allowed.astype(np.int64), range(0, self.shape[0], bq), axis=0)
        live = np.add.reduceat(rows, range(0, self.shape[1], bk), axis=1)
        size_q = np.diff(np.append(np.arange(0, self.shape[0], bq), self.shape[0]))
        size_k = np.diff(np.append(np.arange(0, self.shape[1], bk), self.shape[1]))
        full = live == size_q[:, None] * size_k[None, :]
        return np.where(full, FULL, np.where(live > 0, PARTIAL, EMPTY)).astype(np.int8)

    @property
    def density(self) -> float:
        """Share of blocks that are not empty."""
        return float((self.plan != EMPTY).mean())

    def __eq__(self, other) -> bool:
        return isinstance(other, BlockMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        name = getattr(self.pred, "__name__", "pred")
        return f"BlockMask({name}, {self.shape[0]}x{self.shape[1]}, block={self.block})"
