"""Sampling by refinement: everything starts masked and each pass of the model reveals some of it, in one compiled loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxgen.decoding.block_cache import Layout, Whole
from jaxgen.decoding.kernels import Kernel
from jaxgen.decoding.next_scale import Known
from jaxgen.decoding.reveal import RevealOrder, Slots
from jaxgen.decoding.speculate import BROKEN, FULL, RUNNING, STOPPED
from jaxgen.decoding.step import StepFn, View

__all__ = ["Refined", "refine"]

PyTree = Any


class Refined(NamedTuple):
    """What was sampled.

    Attributes:
      tokens: ids [b, l], or vectors [b, l, d]; behind a row's length, `pad`.
      length: of each row: l, or up to a stop token, that one included, or in a broken row the certain prefix.
      status: STOPPED, FULL or BROKEN.
      revealed: the row's own pass, from 0, at which each position became known; -1 where it was given or is not known.
      calls: of the model, for the whole batch, prefilling not counted.
      row_calls: passes while the row was running, those that only store a finished block included.
      row_reads: positions that those passes read.
    """

    tokens: Array
    length: Int[Array, "b"]
    status: Int[Array, "b"]
    revealed: Int[Array, "b l"]
    calls: Int[Array, ""]
    row_calls: Int[Array, "b"]
    row_reads: Int[Array, "b"]


class _Carry(NamedTuple):
    x: Array
    masked: Bool[Array, "b l"]
    status: Int[Array, "b"]
    cache: PyTree
    start: Int[Array, "b"]  # of the window
    section: Int[Array, "b"]
    step: Int[Array, "b"]  # passes over the section
    total: Int[Array, "b"]  # open slots when it began
    revealed: Int[Array, "b l"]
    calls: Int[Array, ""]
    row_calls: Int[Array, "b"]
    row_reads: Int[Array, "b"]


def refine(
    step: StepFn,
    order: RevealOrder,
    kernel: Kernel,
    *,
    params: PyTree,
    cache: PyTree = (),
    cond: PyTree | Callable[[Slots], PyTree] = None,
    batch: int,
    length: int,
    key: Key[Array, ""],
    layout: Layout | None = None,
    known: Known | None = None,
    n_steps: Any = None,
    stop: tuple[int, ...] = (),
    rows: Int[Array, "b"] | None = None,
    pad: int = 0,
) -> Refined:
    """Samples until nothing is masked.

    Here the law that `step` gives at `view.pos` = j is that of position j itself, given the tokens of the view, masks among
    them, and what the cache holds; all positions of a view see one another unless `view.mask` says otherwise.

    Call it inside `jax.jit`; all but `step`, `batch`, `length`, `stop`, `pad` and the static fields of `layout` may be traced,
    the numbers in orders and kernels included.

    Args:
      step: the model, or `guide(step)`.
      order: which slots a pass reveals.
      kernel: how their values are drawn and put in.
      params: passed to `step`.
      cache: empty, for layouts that keep keys and values, with room for `length` positions; a `GuidedCache` for a guided step.
      cond: passed to `step`; or a function of the pass (`Slots`) that gives it, for guidance that changes with the passes.
      batch: b.
      length: l.
      key: of the call; a row's noise depends on it, on the row's number, the position and the row's own pass only.
      layout: what a pass reads and what is kept of it; None is `Whole()`.
      known: tokens that are given: a prompt, or any others for in-filling.
      n_steps: most passes over a section (the sequence, or a block of the layout): the last one reveals all that is left.
        None is no bound but `length`, which orders that reveal something at each pass never meet.
      stop: tokens that end a row, once it and all before it are known and it was not given.
      rows: the number of each request; None is 0..b-1.
      pad: fills what lies behind a row's end.

    Raises:
      ValueError: sizes below 1, known tokens of another shape, a length that is not whole blocks of the layout, or a cache
        without room.
    """
    if batch < 1 or length < 1:
        raise ValueError(f"batch={batch} and length={length} must be at least 1")
    if isinstance(n_steps, int) and n_steps < 1:
        raise ValueError(f"n_steps={n_steps} must be at least 1")
    room = getattr(cache, "capacity", None)
    if room is not None and room < length:
        raise ValueError(f"the cache holds {room} positions; length={length}")
    layout = Whole() if layout is None else layout
    widths = layout.windows(length)
    most = length if n_steps is None else n_steps
    rows = jnp.arange(batch) if rows is None else rows
    x, keep = _start(kernel, batch, length, known)
    generated, everyone = ~keep, jnp.arange(batch)[:, None]

    def cond_of(slots: Slots) -> PyTree:
        return cond(slots) if callable(cond) else cond

    def pass_(width: int, c: _Carry) -> _Carry:
        window = _window(c, width, layout, rows, key)
        slots, running = window.slots, c.status == RUNNING
        mask = jnp.broadcast_to(window.inside[:, None], (batch, width, width)) if len(widths) > 1 else None
        view = View(c.x[everyone, slots.pos], slots.pos, mask, order.time(slots))
        reading = layout.read(step, params, c.cache, view, cond_of(slots), masked=window.masked, new=window.new, running=running)
        drawn = kernel.draw(reading.out, slots)
        broken = (slots.open & jnp.isnan(drawn.score)).any(axis=1)
        chosen = slots.open & (order.reveal(slots, drawn) | (slots.step + 1 >= most)[:, None]) & ~broken[:, None]

        def put(all_, here):
            return all_.at[everyone, jnp.where(window.inside, slots.pos, length)].set(here, mode="drop")

        x = put(c.x, kernel.move(view.tokens, drawn, chosen))
        masked = put(c.masked, window.masked & ~chosen)
        when = jnp.where(chosen, c.row_calls[:, None], c.revealed[everyone, slots.pos])
        settled = jnp.where(running & ~broken, layout.settled(window.masked), 0)
        status = jnp.where(running & ~masked.any(axis=1), FULL, c.status)
        status = jnp.where(running & _end(x, masked, generated, stop)[1], STOPPED, status)
        return _Carry(
            x,
            masked,
            jnp.where(broken, BROKEN, status),
            reading.cache.commit(settled) if keeps else reading.cache,
            c.start + settled,
            window.section,
            slots.step + 1,
            slots.total,
            put(c.revealed, when),
            c.calls + reading.calls,
            c.row_calls + running,
            c.row_reads + jnp.where(running, reading.read, 0),
        )

    none = jnp.zeros((batch,), jnp.int32)
    keeps = hasattr(cache, "commit")
    if keeps:
        cache = cache.commit(none)  # a length a row from here on
    status = jnp.where(generated.any(axis=1), RUNNING, FULL)
    revealed = jnp.full((batch, length), -1, jnp.int32)
    carry = _Carry(x, generated, status, cache, none, none - 1, none, none, revealed, jnp.int32(0), none, none)
    cache, start = layout.begin(step, params, cache, x, keep, cond_of(_window(carry, length, Whole(), rows, key).slots))
    carry = carry._replace(cache=cache, start=start)
    for width, narrower in zip(widths, (*widths[1:], 0)):
        # This width is needed as long as a running row's window begins before the next narrower one does.
        def wide(c: _Carry, first=length - narrower if narrower else length):
            return ((c.status == RUNNING) & (c.start < first)).any()

        carry = jax.lax.while_loop(wide, lambda c, width=width: pass_(width, c), carry)
    return _result(carry, generated, stop, pad)


class _Window(NamedTuple):
    """The positions that a row's pass is about.

    Attributes:
      inside: which of them exist: a row that is ahead of the window's width reaches over the end.
      masked: which of them are masked.
      section: what is worked on.
      new: rows for which that has changed.
      slots: for the order and the kernel; positions that do not exist stand for the last one, and are not open.
    """

    inside: Bool[Array, "b w"]
    masked: Bool[Array, "b w"]
    section: Int[Array, "b"]
    new: Bool[Array, "b"]
    slots: Slots


def _window(c: _Carry, width: int, layout: Layout, rows, key) -> _Window:
    length = c.masked.shape[1]
    at = c.start[:, None] + jnp.arange(width)
    inside, pos = at < length, jnp.minimum(at, length - 1)
    masked = jnp.take_along_axis(c.masked, pos, axis=1) & inside
    open_, section = layout.section(masked, c.start)
    open_ &= (c.status == RUNNING)[:, None]
    new = section != c.section
    total = jnp.where(new, open_.sum(axis=1), c.total)
    slots = Slots(open_, total, jnp.where(new, 0, c.step), pos, rows, key, c.x)
    return _Window(inside, masked, section, new, slots)


def _start(kernel: Kernel, batch: int, length: int, known: Known | None):
    """(x at the start, which positions are given)."""
    x = kernel.blank(batch, length)
    if known is None:
        return x, jnp.zeros((batch, length), bool)
    if known.keep.shape != (batch, length) or known.tokens.shape != x.shape:
        raise ValueError(
            f"known tokens {known.tokens.shape} and keep {known.keep.shape}: expected {x.shape} and {(batch, length)}"
        )
    keep = jnp.asarray(known.keep, bool)
    return jnp.where(keep.reshape(*keep.shape, *(1,) * (x.ndim - 2)), known.tokens.astype(x.dtype), x), keep


def _end(x, masked: Bool[Array, "b l"], generated: Bool[Array, "b l"], stop: tuple[int, ...]):
    """(length of each row's certain part, whether that ends with a generated stop token)."""
    length = masked.shape[1]
    certain = jnp.where(masked.any(axis=1), jnp.argmax(masked, axis=1), length)
    if not stop:
        return certain, jnp.zeros(certain.shape, bool)
    stops = (x[..., None] == jnp.asarray(stop)).any(axis=-1) & generated & ~masked
    first = jnp.where(stops.any(axis=1), jnp.argmax(stops, axis=1), length)
    return jnp.where(first < certain, first + 1, certain), first < certain


def _result(c: _Carry, generated, stop, pad) -> Refined:
    length, _ = _end(c.x, c.masked, generated, stop)
    inside = jnp.arange(c.masked.shape[1]) < length[:, None]
    tokens = jnp.where(inside.reshape(*inside.shape, *(1,) * (c.x.ndim - 2)), c.x, pad)
    return Refined(tokens, length, c.status, c.revealed, c.calls, c.row_calls, c.row_reads)
