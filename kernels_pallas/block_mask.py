"""Attention masks as predicates over per-token metadata, with static plans of empty, partial and full blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

__all__ = ["EMPTY", "FULL", "PARTIAL", "BlockMask", "Lists"]

EMPTY, PARTIAL, FULL = 0, 1, 2
# The predicate is evaluated on at most this many pairs at a time while a plan is made.
_PLAN_PAIRS = 1 << 24


class Lists(NamedTuple):
    """The live blocks of every row of blocks (or column), as padded lists.

    Attributes:
      count: int32 [n], live blocks of row i.
      index: int32 [n, w], their columns, ascending; w is the largest count, at least 1; zeros fill the rest.
      kind: int32 [n, w], PARTIAL or FULL; EMPTY where filled.
    """

    count: np.ndarray
    index: np.ndarray
    kind: np.ndarray


@jax.tree_util.register_static  # a pytree without leaves: it passes through jit, remat and scan as an argument
class BlockMask:
    """Who may attend to whom: `allowed[i, j] = pred(q_meta[:, i], k_meta[:, j])`.

    Immutable and hashable: two masks with the same predicate function, metadata and block are equal, so modules that hold
    equal masks share a compilation. Predicates should therefore be module-level functions, not fresh lambdas.
    `a & b` and `a | b` combine masks of one shape, `~a` inverts, `a[i:j, k:l]` cuts.

    Attributes:
      pred: `(q, k) -> bool array`, element-wise over int32 arrays `q[row]` and `k[row]` that broadcast; kernels call it on
        tiles, so it may index the leading axis, compare, add and combine with `& | ^`, and nothing else.
      q_meta: int32 [m, sq], one column of metadata a query.
      k_meta: int32 [m, sk], the same for keys.
      block: (queries, keys) of a block in `plan`; kernels plan for their own sizes with `planned`.
    """

    __slots__ = ("pred", "q_meta", "k_meta", "block", "_key", "__dict__")

    def __init__(self, pred: Callable[[Any, Any], Any], q_meta, k_meta, block: tuple[int, int] = (128, 64)):
        q_meta, k_meta = (np.array(m, dtype=np.int32) for m in (q_meta, k_meta))
        if q_meta.ndim != 2 or k_meta.ndim != 2 or q_meta.shape[0] != k_meta.shape[0]:
            raise ValueError(f"q_meta {q_meta.shape} and k_meta {k_meta.shape} must be [m, sq] and [m, sk] with one m")
        if 0 in q_meta.shape or 0 in k_meta.shape:
            raise ValueError(f"q_meta {q_meta.shape} and k_meta {k_meta.shape} must not be empty")
        if len(block) != 2 or min(block) < 1:
            raise ValueError(f"block {block} must be two positive sizes")
        _check_element_wise(pred, q_meta, k_meta)
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

    def padded(self, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Metadata for whole blocks: q [m + 1, sq'], k [m + 1, sk'] with zeros added, whose last row is 1 on real tokens."""

        def pad(meta, size):
            meta = np.concatenate([meta, np.ones((1, meta.shape[1]), np.int32)])
            return np.pad(meta, ((0, 0), (0, -meta.shape[1] % size)))

        return pad(self.q_meta, block[0]), pad(self.k_meta, block[1])

    @property
    def plan(self) -> np.ndarray:
        """`planned(block)`."""
        return self.planned(self.block)

    def planned(self, block: tuple[int, int]) -> np.ndarray:
        """int8 [ceil(sq / block_q), ceil(sk / block_k)]: 0 empty, 1 partial, 2 full.

        A ragged block at an end is full when all its real tokens are allowed; a kernel that pads must still mask it.
        """
        plans = self.__dict__.setdefault("plans", {})
        if block not in plans:
            plans[block] = _plan(self, *block)
            plans[block].setflags(write=False)
        return plans[block]

    def rows(self, block: tuple[int, int], *, padding_is_partial: bool = True) -> Lists:
        """For every block of queries, its live blocks of keys.

        Args:
          block: sizes to plan for.
          padding_is_partial: call ragged blocks at the ends PARTIAL, for kernels that pad to whole blocks.
        """
        return _lists(self._padded_plan(block, padding_is_partial))

    def columns(self, block: tuple[int, int], *, padding_is_partial: bool = True) -> Lists:
        """For every block of keys, its live blocks of queries (the backward pass of keys and values)."""
        return _lists(self._padded_plan(block, padding_is_partial).T)

    def _padded_plan(self, block, padding_is_partial) -> np.ndarray:
        plan = self.planned(tuple(block))
        if padding_is_partial:
            plan = plan.copy()
            if self.shape[0] % block[0]:
                plan[-1] = np.minimum(plan[-1], PARTIAL)
            if self.shape[1] % block[1]:
                plan[:, -1] = np.minimum(plan[:, -1], PARTIAL)
        return plan

    @property
    def density(self) -> float:
        """Share of blocks that are not empty."""
        return float((self.plan != EMPTY).mean())

    @functools.cached_property
    def element_density(self) -> float:
        """Share of (query, key) pairs that are allowed."""
        return sum(int(part.sum()) for part in _stripes(self)) / (self.shape[0] * self.shape[1])

    def __and__(self, other: BlockMask) -> BlockMask:
        return _combine("and", self, other)

    def __or__(self, other: BlockMask) -> BlockMask:
        return _combine("or", self, other)

    def __invert__(self) -> BlockMask:
        return BlockMask(_Not(self.pred), self.q_meta, self.k_meta, self.block)

    def __getitem__(self, index: tuple[slice, slice]) -> BlockMask:
        """The mask of some queries and keys: `mask[10:20, :30]`.

        Raises:
          ValueError: anything but two slices, or an empty cut.
        """
        if not (isinstance(index, tuple) and len(index) == 2 and all(isinstance(i, slice) for i in index)):
            raise ValueError(f"a mask is cut by two slices, mask[i:j, k:l], not by {index!r}")
        return BlockMask(self.pred, self.q_meta[:, index[0]], self.k_meta[:, index[1]], self.block)

    def __eq__(self, other) -> bool:
        return isinstance(other, BlockMask) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        name = getattr(self.pred, "__name__", None) or str(self.pred)
        return f"BlockMask({name}, {self.shape[0]}x{self.shape[1]}, block={self.block})"


@dataclasses.dataclass(frozen=True)
class _Combined:
    """`a` on the first `split` rows of metadata, `b` on the rest (on all, where split is 0)."""

    how: str
    a: Callable
    b: Callable
    split: int

    def __call__(self, q, k):
        first = self.a(q[: self.split], k[: self.split]) if self.split else self.a(q, k)
        second = self.b(q[self.split :], k[self.split :])
        return first & second if self.how == "and" else first | second

    def __str__(self) -> str:
        names = [getattr(f, "__name__", None) or str(f) for f in (self.a, self.b)]
        return f"({f' {self.how} '.join(names)})"


@dataclasses.dataclass(frozen=True)
class _Not:
    pred: Callable

    def __call__(self, q, k):
        return self.pred(q, k) ^ True  # Mosaic GPU cannot lower ~ of a bool

    def __str__(self) -> str:
        return f"not {getattr(self.pred, '__name__', None) or self.pred}"


def _combine(how: str, a: BlockMask, b: BlockMask) -> BlockMask:
    if not isinstance(b, BlockMask):
        raise ValueError(f"a mask is combined with a mask, not with {type(b).__name__}")
    if a.shape != b.shape:
        raise ValueError(f"masks of one shape are combined; got {a!r} and {b!r}")
    if np.array_equal(a.q_meta, b.q_meta) and np.array_equal(a.k_meta, b.k_meta):
        return BlockMask(_Combined(how, a.pred, b.pred, 0), a.q_meta, a.k_meta, a.block)
    q_meta, k_meta = (np.concatenate(pair) for pair in ((a.q_meta, b.q_meta), (a.k_meta, b.k_meta)))
    return BlockMask(_Combined(how, a.pred, b.pred, a.q_meta.shape[0]), q_meta, k_meta, a.block)


def _check_element_wise(pred: Callable, q_meta: np.ndarray, k_meta: np.ndarray) -> None:
    """A corner of the mask must be bool, and the same when its rows and columns are taken apart and reversed."""
    q, k = q_meta[:, :33, None], k_meta[:, None, :33]
    corner = pred(q, k)
    if np.shape(corner) != (q.shape[1], k.shape[2]):
        raise ValueError(f"pred must be element-wise: it gave shape {np.shape(corner)} for {q.shape} and {k.shape}")
    if np.asarray(corner).dtype != bool:
        raise ValueError(f"pred must give bool, not {np.asarray(corner).dtype}")
    again = np.asarray(pred(q[:, ::-2], k[:, :, ::-3]))
    if not np.array_equal(again, np.asarray(corner)[::-2, ::-3]):
        raise ValueError("pred must be element-wise: an element of the mask changes with its neighbours")


def _stripes(mask: BlockMask, rows: int = 1):
    """The dense mask in stripes of a multiple of `rows` queries, each of bounded size."""
    sq, sk = mask.shape
    step = max(1, _PLAN_PAIRS // sk // rows) * rows
    for start in range(0, sq, step):
        yield np.asarray(mask.pred(mask.q_meta[:, start : start + step, None], mask.k_meta[:, None, :]), bool)


def _plan(mask: BlockMask, block_q: int, block_k: int) -> np.ndarray:
    parts = []
    for stripe in _stripes(mask, block_q):
        starts = [np.arange(0, n, size) for n, size in zip(stripe.shape, (block_q, block_k))]
        anyone = np.logical_or.reduceat(np.logical_or.reduceat(stripe, starts[1], axis=1), starts[0], axis=0)
        everyone = np.logical_and.reduceat(np.logical_and.reduceat(stripe, starts[1], axis=1), starts[0], axis=0)
        parts.append(np.where(everyone, FULL, np.where(anyone, PARTIAL, EMPTY)).astype(np.int8))
    return np.concatenate(parts)


def _lists(plan: np.ndarray) -> Lists:
    live = plan != EMPTY
    count = live.sum(axis=1).astype(np.int32)
    width = max(1, int(count.max()))
    # A stable sort of "not live" brings the live columns to the front in ascending order.
    index = np.argsort(~live, axis=1, kind="stable")[:, :width].astype(np.int32)
    kind = np.take_along_axis(plan, index, axis=1).astype(np.int32)
    return Lists(count, np.where(kind == EMPTY, 0, index).astype(np.int32), kind)
