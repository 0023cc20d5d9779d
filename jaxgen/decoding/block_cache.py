"""Which positions a pass of `refine` reads, and whose keys and values are kept: exact and approximate block caches.

`Blocks` is exact for models whose blocks are causal. `DualCache` and `FreeCache` are approximations that read less: they go on
using keys and values that were made when other tokens were not known yet.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.guidance import GuidedCache
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.orders import blocks

__all__ = ["Blocks", "DualCache", "FreeCache", "Layout", "Reading", "SubBlockCache", "Whole"]

PyTree = Any


class Reading(NamedTuple):
    """What came of a pass.

    Attributes:
      out: of the model, for all slots of the window; what it says of slots that are not open means nothing.
      cache: with this pass staged.
      calls: of the model.
      read: positions that it read for each row.
    """

    out: Out
    cache: PyTree
    calls: Int[Array, ""] | int
    read: Int[Array, "b"]


class Layout(Protocol):
    """Windows over the sequence: a row's window begins behind the positions that are kept in the cache."""

    def windows(self, length: int) -> tuple[int, ...]:
        """Widths of the window, falling; the last fits behind every block.

        Raises:
          ValueError: a length that is not whole blocks.
        """

    def begin(self, step: StepFn, params, cache, x, known: Bool[Array, "b l"], cond) -> tuple[PyTree, Int[Array, "b"]]:
        """(cache, where each row's window begins), after what is known."""

    def section(self, masked: Bool[Array, "b w"], start: Int[Array, "b"]) -> tuple[Bool[Array, "b w"], Int[Array, "b"]]:
        """(slots that may be revealed now, a number for what is worked on: an order counts from 0 where it changes)."""

    def settled(self, masked: Bool[Array, "b w"]) -> Int[Array, "b"]:
        """How many positions to keep after a pass that found these slots masked; the window moves on by as many."""

    def read(self, step: StepFn, params, cache, view: View, cond, *, masked, new, running) -> Reading:
        """The pass.

        Args:
          step, params, cache, cond: see `refine`.
          view: the window.
          masked: slots of it that are masked, bool [b, w].
          new: rows whose section has changed, bool [b].
          running: rows that have not stopped, bool [b].
        """


@dataclasses.dataclass(frozen=True)
class Whole:
    """Every pass reads the whole sequence; nothing is kept.

    Attributes:
      size: with a size, blocks of so many positions are filled in from left to right, while later ones are seen as masks
        (the semi-autoregressive order of LLaDA, Nie et al. 2025); None is no blocks.
    """

    size: int | None = None

    def __post_init__(self):
        if self.size is not None:
            _positive(size=self.size)

    def windows(self, length):
        _check_blocks(length, self.size or length)
        return (length,)

    def begin(self, step, params, cache, x, known, cond):
        return cache, jnp.zeros(known.shape[:1], jnp.int32)

    def section(self, masked, start):
        if self.size is None:
            return masked, jnp.zeros_like(start)
        open_, block = _first_unclean(masked, self.size)
        return open_, start // self.size + block

    def settled(self, masked):
        return jnp.zeros(masked.shape[:1], jnp.int32)

    def read(self, step, params, cache, view, cond, *, masked, new, running):
        out, cache = step(params, cache, view, cond)
        b, w = view.pos.shape
        inside = w if view.mask is None else view.mask.any(axis=1).sum(axis=1)
        return Reading(out, cache, 1, jnp.broadcast_to(inside, (b,)))


@dataclasses.dataclass(frozen=True)
class FreeCache(Whole):
    """Keys and values of the clean prefix of a bidirectional model are frozen, block by block (FreeCache, Hu et al. 2025).

    A block is frozen by the first pass that finds it and all before it clean; from then on passes start behind it. That is
    approximate, since frozen positions no longer see what becomes known behind them; for one layer it is exact. The authors'
    code freezes what the pass before the block's last reveal had read, some of it masks.

    The loop is compiled once for each block, with a window that is shorter each time: choose blocks that are not many.

    Attributes:
      size: positions of a block.
      in_order: fill in blocks from left to right; else slots anywhere may be revealed.
    """

    size: int = 32
    in_order: bool = False

    def __post_init__(self):
        _positive(size=self.size or 0)

    def windows(self, length):
        _check_blocks(length, self.size)
        return tuple(range(length, 0, -self.size))

    def section(self, masked, start):
        return super().section(masked, start) if self.in_order else (masked, jnp.zeros_like(start))

    def settled(self, masked):
        return _clean_blocks(masked, self.size) * self.size


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block by block, keys and values kept when a block is done: exact where blocks are causal (BD3-LM, Arriola et al. 2025).

    Passes see the block that is worked on, whole, and the kept ones. A clean block is read once more to be kept.

    Attributes:
      size: positions of a block.
      prefill: the first positions, whole blocks, are read in one call; each row keeps those of its leading known blocks.
      sub: with it, sub-blocks of so many positions are filled in from left to right; None is no sub-blocks.
    """

    size: int
    prefill: int = 0
    sub: int | None = None

    def __post_init__(self):
        _positive(size=self.size)
        if self.sub is not None:
            _positive(sub=self.sub)
            if self.size % self.sub:
                raise ValueError(f"sub={self.sub} does not divide size={self.size}")
        if self.prefill % self.size or self.prefill < 0:
            raise ValueError(f"prefill={self.prefill} must be whole blocks of {self.size}")

    def windows(self, length):
        _check_blocks(length, self.size)
        if self.prefill > length:
            raise ValueError(f"prefill={self.prefill} exceeds the length {length}")
        return (self.size,)

    def begin(self, step, params, cache, x, known, cond):
        q, b = self.prefill, known.shape[0]
        if not q:
            return cache, jnp.zeros((b,), jnp.int32)
        block = jnp.asarray(blocks(q, self.size).step_of)
        pos = jnp.broadcast_to(jnp.arange(q), (b, q))
        _, cache = step(params, cache, View(x[:, :q], pos, block[:, None] >= block, jnp.zeros((b,))), cond)
        kept = _clean_blocks(~known[:, :q], self.size) * self.size
        return cache.commit(kept), kept

    def section(self, masked, start):
        sub = self.sub or self.size
        open_, part = _first_unclean(masked, sub)
        return open_, start // sub + part

    def settled(self, masked):
        return jnp.where(masked.any(axis=1), 0, self.size)

    def read(self, step, params, cache, view, cond, *, masked, new, running):
        out, cache = step(params, cache, view, cond)
        return Reading(out, cache, 1, jnp.full(new.shape, self.size))


@dataclasses.dataclass(frozen=True)
class DualCache(Blocks):
    """Blocks whose sub-blocks are filled in from left to right; most passes read one sub-block (Fast-dLLM v2, Wu et al. 2025b).

    Keys and values of the whole block are made anew when a sub-block begins and while its first slot is masked; passes
    between read the sub-block and write its own. That is approximate where the rest of the block would have changed its
    keys with the sub-block's tokens; with one sub-block, or one layer, it is exact.

    Rows that need the whole block and rows that don't are read by separate calls, so that a row does not depend on others. It
    needs a `KVCache`, or a `GuidedCache` of one.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.sub is None:
            raise ValueError("sub=None: DualCache needs sub-blocks; without them it is Blocks")

    def read(self, step, params, cache, view, cond, *, masked, new, running):
        b, w = masked.shape
        rows = jnp.arange(b)[:, None]
        first = _first_unclean(masked, self.sub)[1] * self.sub
        begins = new | jnp.take_along_axis(masked, first[:, None], axis=1)[:, 0] | ~masked.any(axis=1)
        whole, part = running & begins, running & ~begins
        slots = first[:, None] + jnp.arange(self.sub)

        def read_whole(cache):
            out, cache = step(params, _sub_blocks(cache, jnp.zeros_like(first), whole, w), view, cond)
            return out, _unwrapped(cache)

        def read_part(cache):
            small = View(view.tokens[rows, slots], view.pos[rows, slots], None, view.time)
            out, cache = step(params, _sub_blocks(cache, first, part, w), small, cond)
            spread = jax.tree.map(lambda x: jnp.zeros((b, w, *x.shape[2:]), x.dtype).at[rows, slots].set(x), out)
            return spread, _unwrapped(cache)

        def skip(cache):
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read_whole, cache)[0]), cache

        a, cache = jax.lax.cond(whole.any(), read_whole, skip, cache)
        c, cache = jax.lax.cond(part.any(), read_part, skip, cache)
        out = jax.tree.map(lambda x, y: jnp.where(whole.reshape(b, *(1,) * (x.ndim - 1)), x, y), a, c)
        calls = whole.any().astype(jnp.int32) + part.any()
        return Reading(out, cache, calls, jnp.where(begins, w, self.sub))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SubBlockCache:
    """A cache whose staged positions are a block: a query writes a part of it, and sees the kept positions and the whole block.

    Attributes:
      cache: with a length a row.
      offset: where in the block the query's positions are written.
      writes: rows that write at all.
      block: staged positions that are seen.
    """

    cache: KVCache
    offset: Int[Array, "b"]
    writes: Bool[Array, "b"]
    block: int = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """See `KVCache.capacity`."""
        return self.cache.capacity

    def stage(self, layer, k, v) -> SubBlockCache:
        """See `KVCache.stage`."""
        length = self.cache.length
        # Writes behind the end are dropped.
        at = jnp.where(self.writes, length + self.offset, self.capacity)
        cache = dataclasses.replace(self.cache, length=at).stage(layer, k, v)
        return dataclasses.replace(self, cache=dataclasses.replace(cache, length=length))

    def read(self, layer, q: int, mask=None):
        """See `KVCache.read`; the query sees the block whatever its own size."""
        if mask is not None:
            raise ValueError("a query of a sub-block sees the whole block; its view has no mask")
        return self.cache.read(layer, self.block)


def _sub_blocks(cache, offset, writes, block: int):
    if isinstance(cache, GuidedCache):
        return GuidedCache(_sub_blocks(cache.cache, *(jnp.concatenate([x, x]) for x in (offset, writes)), block))
    if not isinstance(cache, KVCache):
        raise ValueError(f"DualCache writes into parts of a KVCache; this cache is a {type(cache).__name__}")
    return SubBlockCache(cache, offset, writes, block)


def _unwrapped(cache):
    return GuidedCache(cache.cache.cache) if isinstance(cache, GuidedCache) else cache.cache


def _clean_blocks(masked: Bool[Array, "b w"], size: int) -> Int[Array, "b"]:
    """How many blocks are clean before the first that is not."""
    b, w = masked.shape
    clean = ~masked.reshape(b, w // size, size).any(axis=2)
    return jnp.cumprod(clean, axis=1).sum(axis=1)


def _first_unclean(masked: Bool[Array, "b w"], size: int) -> tuple[Bool[Array, "b w"], Int[Array, "b"]]:
    """(masked slots of the first block that has any, the block's number; the last if none has)."""
    last = masked.shape[1] // size - 1
    first = jnp.minimum(_clean_blocks(masked, size), last)
    return masked & (jnp.arange(masked.shape[1]) // size == first[:, None]), first


def _check_blocks(length: int, size: int) -> None:
    if length % size:
        raise ValueError(f"length={length} is not whole blocks of {size}")


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
