"""Which positions come at which step.

An order partitions the positions 0..l-1 of a sequence into steps S_1..S_K; a model generates all of S_k at once, given
S_1..S_{k-1}. Positions are numbered so that every step is a contiguous run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

__all__ = ["Neighbours", "Order", "blocks", "raster", "scales"]


@dataclasses.dataclass(frozen=True)
class Order:
    """Steps of a sequence.

    Attributes:
      shapes: the grid of each step: (h, w) for images, (n,) for plain runs.

    Example:
      >>> order = scales((1, 2, 4))
      >>> order.length, order.span(1)
      (21, (1, 5))
    """

    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if not self.shapes or any(n < 1 for shape in self.shapes for n in shape):
            raise ValueError(f"shapes {self.shapes}: an order needs at least one step and positive sizes")

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Positions of each step."""
        return tuple(int(np.prod(shape)) for shape in self.shapes)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """One past the last position of each step."""
        return tuple(np.cumsum(self.sizes).tolist())

    @property
    def steps(self) -> int:
        """K."""
        return len(self.shapes)

    @property
    def length(self) -> int:
        """l, all positions."""
        return self.ends[-1]

    def span(self, step: int) -> tuple[int, int]:
        """(start, end) of a step's positions."""
        return self.ends[step] - self.sizes[step], self.ends[step]

    @functools.cached_property
    def step_of(self) -> np.ndarray:
        """int32 [l], the step of each position."""
        out = np.repeat(np.arange(self.steps, dtype=np.int32), self.sizes)
        out.setflags(write=False)
        return out

    @functools.cached_property
    def coords(self) -> np.ndarray:
        """int32 [n, l], where each position lies in the n-dimensional grid of its step: rows (h, w) for images.

        Raises:
          ValueError: steps whose grids differ in rank.
        """
        if len({len(shape) for shape in self.shapes}) > 1:
            raise ValueError(f"shapes {self.shapes}: coordinates need grids of one rank")
        out = np.concatenate([np.indices(shape).reshape(len(shape), -1) for shape in self.shapes], axis=1).astype(np.int32)
        out.setflags(write=False)
        return out

    def split(self, x, axis: int = 1) -> list:
        """`x` cut along `axis` into one array a step."""
        if x.shape[axis] != self.length:
            raise ValueError(f"axis {axis} of {x.shape} has {x.shape[axis]} positions; the order has {self.length}")
        index = [slice(None)] * x.ndim
        out = []
        for step in range(self.steps):
            index[axis] = slice(*self.span(step))
            out.append(x[tuple(index)])
        return out


def raster(length: int) -> Order:
    """One position a step: next-token prediction."""
    return Order(((1,),) * length)


def blocks(length: int, size: int) -> Order:
    """Runs of `size` positions a step, the last one shorter where `size` does not divide `length`: block diffusion, frames.

    Raises:
      ValueError: a length or size below 1.
    """
    if length < 1 or size < 1:
        raise ValueError(f"length={length} and size={size} must be at least 1")
    return Order(tuple((min(size, length - start),) for start in range(0, length, size)))


def scales(patch_nums: Sequence[int | tuple[int, int]]) -> Order:
    """Next-scale order: step k is a whole token map of size `patch_nums[k]`, coarse to fine (Tian et al. 2024, eq. 4).

    Raises:
      ValueError: an empty list, or sizes that are not whole, positive and non-decreasing.
    """
    shapes = tuple((p, p) if np.ndim(p) == 0 else tuple(p) for p in patch_nums)
    if any(len(shape) != 2 or any(int(n) != n for n in shape) for shape in shapes):
        raise ValueError(f"patch_nums {tuple(patch_nums)} must be whole numbers, or pairs of them")
    shapes = tuple((int(h), int(w)) for h, w in shapes)
    order = Order(shapes)
    if any(b[0] < a[0] or b[1] < a[1] for a, b in zip(shapes, shapes[1:])):
        raise ValueError(f"patch_nums {tuple(patch_nums)} must not decrease")
    return order


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Next-neighbour order: a step takes all cells at one Manhattan distance from the first (NAR, He et al. 2025, section 3.1).

    A cell has up to n neighbours one step nearer, one along each axis of an n-dimensional grid; h x w cells take h + w - 1 steps,
    t frames of them t + h + w - 2.

    Attributes:
      shape: cells along each axis, at least one.

    Example:
      >>> neighbours = Neighbours((2, 3))
      >>> neighbours.order.sizes, neighbours.index.tolist()
      ((1, 2, 2, 1), [0, 1, 3, 2, 4, 5])
    """

    shape: tuple[int, ...]

    @functools.cached_property
    def order(self) -> Order:
        """One step a distance.

        Raises:
          ValueError: no axis, or one that is not positive.
        """
        if not self.shape or any(n < 1 for n in self.shape):
            raise ValueError(f"shape={self.shape}: a grid needs at least one axis and positive sizes")
        return Order(tuple((int(n),) for n in np.bincount(np.indices(self.shape).sum(0).reshape(-1))))

    @functools.cached_property
    def index(self) -> np.ndarray:
        """int32 [l], which cell, counted row by row, each position is; at one distance they come in that order, too."""
        distance = np.indices(self.shape).sum(0).reshape(-1)
        return np.argsort(distance, kind="stable").astype(np.int32)

    @functools.cached_property
    def coords(self) -> np.ndarray:
        """int32 [l, n], where each position lies."""
        return np.stack(np.unravel_index(self.index, self.shape), axis=1).astype(np.int32)

    @functools.cached_property
    def before(self) -> np.ndarray:
        """int32 [l, n], which position is one step back along each axis; -1 where the grid ends."""
        position = np.full(tuple(n + 1 for n in self.shape), -1)  # index -1 of an axis is outside the grid
        position[tuple(self.coords.T)] = np.arange(len(self.index))
        steps = self.coords[:, None] - np.eye(len(self.shape), dtype=int)
        return position[tuple(np.moveaxis(steps, -1, 0))].astype(np.int32)

    def split(self, x):
        """What is [b, l, ...] row by row, in this order."""
        return x[:, self.index]

    def join(self, x):
        """The inverse of `split`."""
        return x[:, np.argsort(self.index)]
