"""Continuous batching: requests at different positions share every model call, in slots that are filled and emptied.

The compiled part of Flover (S038, Yao et al. 2023, arXiv:2305.13484). `insert` puts a request into a slot; `run` takes decoding
steps over all slots (temporal fusion); `reorder` moves the slots that still run to the front of a smaller batch (buffer
reordering). `jaxgen.decoding.server` decides when.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.speculate import (
    RUNNING,
    Context,
    Loop,
    Proposer,
    Sequences,
    Sequential,
    advance,
    prefill,
    vocabulary,
)
from jaxgen.decoding.step import StepFn
from jaxgen.decoding.transforms import Sampling, apply_sampling, check_settings
from jaxgen.decoding.verify import Coupled, Rule

__all__ = ["FREE", "Batcher", "Request", "Slots"]

# Status of a slot that holds no request; otherwise see `jaxgen.decoding.speculate`.
FREE = -1

PyTree = Any


class Request(NamedTuple):
    """What a slot needs of a request; made by `Batcher.request`.

    Attributes:
      prompt: tokens, left-aligned.
      length: of the prompt.
      limit: of prompt and continuation.
      key: that all of its noise comes from.
      row: its number among those with the same key.
      stop: tokens that end it, then -1.
      settings: see `Batcher.settings`.
      cond: passed to the step, without the batch's axis.
    """

    prompt: Int[Array, "s"]
    length: Int[Array, ""]
    limit: Int[Array, ""]
    key: Key[Array, ""]
    row: Int[Array, ""]
    stop: Int[Array, "m"]
    settings: PyTree
    cond: PyTree


class Slots(NamedTuple):
    """The state of n slots.

    Attributes:
      loop: sequences, statuses, cache and drafts. `loop.calls` are the model calls of the last run, `loop.row_calls` those of
        each slot's request.
      limit, key, stop, settings, cond: those of the requests, one a slot.
      empty: the cache of one slot without a token.
    """

    loop: Loop
    limit: Int[Array, "n"]
    key: Key[Array, "n"]
    stop: Int[Array, "n m"]
    settings: PyTree
    cond: PyTree
    empty: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batcher:
    """Slots for requests. A request's tokens are those of `speculate` with its prompt and key alone, whatever else runs.

    Each method is compiled once for a number of slots; requests come and go as data.

    Attributes:
      step: the model.
      max_length: s, the longest prompt and continuation together.
      chunk: prompt tokens that are read in one call; a prompt is read chunk by chunk, the last one padded.
      stops: m, the most stop tokens that a request may have.
      settings: numbers that each request may replace, as they are when it does not: a tree that `transform` understands.
      transform: `(logits, context, settings) -> logits`, where `settings` has an array [n] for each number.
      proposer: drafts; one that starts from the tokens alone, such as `Sequential`, `NGram` or `Jacobi`.
      rule: which drafts stay.
    """

    step: StepFn
    max_length: int
    chunk: int = 32
    stops: int = 4
    settings: PyTree = Sampling()
    transform: Callable[[Float[Array, "n q v"], Context, PyTree], Float[Array, "n q v"]] = apply_sampling
    proposer: Proposer = Sequential()
    rule: Rule = Coupled()

    def __post_init__(self):
        for name, least in (("max_length", 2), ("chunk", 1), ("stops", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {least}")

    @property
    def capacity(self) -> int:
        """Positions that a slot of the cache needs: the longest sequence, and a query or a padded chunk behind its end."""
        return self.max_length + max(self.proposer.topology.queries, self.chunk) - 1

    def start(self, params: PyTree, cache: PyTree, cond: PyTree = None) -> Slots:
        """Free slots, as many as the cache has rows.

        Args:
          params: passed to the step.
          cache: empty, with `take(rows)`, see `KVCache`; a row a slot.
          cond: an example of a request's, without the batch's axis.

        Raises:
          ValueError: a cache that is too small or has no `take`.
        """
        if not hasattr(cache, "take"):
            raise ValueError(f"the cache {type(cache).__name__} has no take(rows), which slots need")
        room = getattr(cache, "capacity", None)
        if room is not None and room < self.capacity:
            raise ValueError(
                f"the cache holds {room} positions; max_length={self.max_length}, chunk={self.chunk} and queries of "
                f"{self.proposer.topology.queries} need {self.capacity}"
            )
        return self._start(params, cache, jax.tree.map(jnp.asarray, cond))

    @functools.partial(jax.jit, static_argnums=0)
    def _start(self, params, cache, cond) -> Slots:
        axes = _row_axes(lambda b: cache.take(jnp.arange(b)))
        n = next(x.shape[axis] for x, axis in zip(jax.tree.leaves(cache), axes) if axis >= 0)
        return self._free_slots(params, cache.commit(jnp.zeros((n,), jnp.int32)), cond, n)  # a length a row from here on

    def _free_slots(self, params, cache, cond, n: int) -> Slots:
        def rows(x):
            return jnp.zeros((n, *x.shape), x.dtype) + x

        seq, keys = self._sequences(n), jnp.broadcast_to(jax.random.key(0), (n,))
        settings = jax.tree.map(lambda x: rows(_strong(x)), self.settings)
        cond = jax.tree.map(rows, cond)
        drafts = self.proposer.start(seq, keys, vocabulary(self.step, params, cache, cond, n), None)
        counts = jnp.zeros((n,), jnp.int32)
        loop = Loop(seq, jnp.full((n,), FREE), cache, drafts, jnp.int32(0), counts)
        stop = jnp.full((n, self.stops), -1, jnp.int32)
        return Slots(loop, counts, keys, stop, settings, cond, cache.take(jnp.arange(1)))

    def _sequences(self, n: int) -> Sequences:
        width = self.max_length + len(self.proposer.topology.levels) + 1
        return Sequences(jnp.zeros((n, width), jnp.int32), jnp.ones((n,), jnp.int32), jnp.zeros((n,), jnp.int32))

    def request(
        self,
        prompt: Sequence[int],
        *,
        key: Key[Array, ""],
        row: int = 0,
        max_new: int | None = None,
        stop: Sequence[int] = (),
        settings: PyTree = None,
        cond: PyTree = None,
    ) -> Request:
        """A checked request.

        Args:
          prompt: at least one token.
          key: that all of its noise comes from, with `row`, as in `speculate`.
          row: see `key`.
          max_new: tokens to make; None is as many as `max_length` leaves.
          stop: tokens that end it.
          settings: in place of `self.settings`.
          cond: as in `start`.

        Raises:
          ValueError: naming what is wrong.
        """
        tokens = np.asarray(prompt)
        if tokens.ndim != 1 or not 1 <= tokens.size < self.max_length or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"prompt of shape {tokens.shape}: expected 1 to {self.max_length - 1} tokens")
        if tokens.min() < 0:
            raise ValueError(f"prompt has the token {tokens.min()}: must be at least 0")
        room = self.max_length - tokens.size
        if max_new is not None and not 1 <= max_new <= room:
            raise ValueError(f"max_new={max_new}: must be in 1..{room} for {tokens.size} of max_length={self.max_length} tokens")
        if len(stop) > self.stops or any(token < 0 for token in stop):
            raise ValueError(f"stop={tuple(stop)}: expected at most {self.stops} tokens >= 0")
        if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
            raise ValueError(f"key={key!r}: expected one of jax.random.key")
        settings = self.settings if settings is None else settings
        if isinstance(settings, Sampling):
            check_settings(**settings._asdict())
        if jax.tree.structure(settings) != jax.tree.structure(self.settings):
            raise ValueError(f"settings={settings}: expected the structure of {self.settings}")
        return Request(
            np.pad(tokens, (0, room)).astype(np.int32),
            np.int32(tokens.size),
            np.int32(self.max_length if max_new is None else tokens.size + max_new),
            key,
            np.int32(row),
            np.pad(np.asarray(stop, np.int32), (0, self.stops - len(stop)), constant_values=-1),
            jax.tree.map(lambda x, like: np.asarray(x, _strong(like).dtype), settings, self.settings),
            jax.tree.map(np.asarray, cond),
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def insert(self, params: PyTree, slots: Slots, slot: Int[Array, ""], request: Request) -> Slots:
        """The slots with a request in one of them, its prompt read up to the last token. The given ones are used up."""
        cond, key = jax.tree.map(lambda x: x[None], request.cond), request.key[None]
        prompt, length = request.prompt[None], request.length[None]
        cache, _ = prefill(self.step, params, slots.empty, cond, prompt, length, chunk=self.chunk)
        tokens = self._sequences(1).tokens.at[:, : self.max_length].set(prompt)
        seq = Sequences(tokens, length, request.row[None])
        vocab = vocabulary(self.step, params, cache, cond, 1)
        drafts = self.proposer.start(seq, key, vocab, None)
        row = Loop(seq, jnp.array([RUNNING]), cache, drafts, slots.loop.calls, jnp.zeros((1,), jnp.int32))
        new = jax.tree.map(lambda x: x[None], request._replace(cond=None))
        filled = Slots(row, new.limit, new.key, new.stop, new.settings, cond, slots.empty)

        def put(x, row, axis):
            return x if axis < 0 else x.at[(slice(None),) * axis + (slot,)].set(jnp.squeeze(row, axis))

        return self._map(put, params, slots, filled)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def run(self, params: PyTree, slots: Slots, steps: Int[Array, ""], wake: Bool[Array, ""]) -> Slots:
        """The slots after some rounds, each of one model call. The given ones are used up.

        Args:
          params: passed to the step.
          slots: the state.
          steps: rounds at most; fewer if all requests end before.
          wake: stop as soon as one request ends, so that its slot can be filled.
        """

        def transform(logits, context):
            return self.transform(logits, context, slots.settings)

        options = dict(params=params, cond=slots.cond, limit=slots.limit, key=slots.key, transform=transform, stop=slots.stop)

        def running(loop):
            return (loop.status == RUNNING).sum()

        def more(loop):
            count = running(loop)
            return (loop.calls < steps) & (count > 0) & ~(wake & (count < before))

        before = running(slots.loop)
        loop = jax.lax.while_loop(
            more,
            lambda loop: advance(self.step, self.proposer, self.rule, loop, **options),
            slots.loop._replace(calls=jnp.int32(0)),
        )
        return slots._replace(loop=loop)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def free(self, slots: Slots, which: Bool[Array, "n"]) -> Slots:
        """The slots with some of them free. The given ones are used up."""
        loop = slots.loop
        return slots._replace(loop=loop._replace(status=jnp.where(which, FREE, loop.status)))

    @functools.partial(jax.jit, static_argnums=0)
    def reorder(self, params: PyTree, slots: Slots, order: Int[Array, "m"]) -> Slots:
        """m slots, slot i being what `order[i]` was; -1 makes a free one."""
        rows = jnp.maximum(order, 0)

        def take(x, axis):
            return x if axis < 0 else x[(slice(None),) * axis + (rows,)]

        slots = self._map(take, params, slots)
        status = jnp.where(order < 0, FREE, slots.loop.status)
        return slots._replace(loop=slots.loop._replace(status=status))

    def _map(self, fn, params, slots: Slots, *others: Slots) -> Slots:
        """`fn(array, *other arrays, axis along which slots lie or -1)` of all arrays of the slots."""
        cond = jax.tree.map(lambda x: x[0], slots.cond)
        axes = _row_axes(lambda b: self._free_slots(params, slots.empty.take(jnp.zeros((b,), jnp.int32)), cond, b))
        leaves, tree = jax.tree.flatten(slots)
        return tree.unflatten(map(fn, leaves, *map(jax.tree.leaves, others), axes))


def _row_axes(make: Callable[[int], PyTree]) -> list[int]:
    """The axis along which each array of `make(b)` has its b rows, -1 where there is none; found by making one and two."""

    def axis(one, two):
        differs = [i for i, sizes in enumerate(zip(one.shape, two.shape)) if sizes[0] != sizes[1]]
        return differs[0] if differs else -1

    one, two = (jax.tree.leaves(jax.eval_shape(functools.partial(make, b))) for b in (1, 2))
    return list(map(axis, one, two))


def _strong(x):
    """A number as an array of a definite type, so that 1 and 1.0 do not compile twice."""
    x = np.asarray(x)
    return x.astype(np.float32 if np.issubdtype(x.dtype, np.floating) else np.int32)
