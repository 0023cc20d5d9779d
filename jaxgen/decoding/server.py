"""Continuous batching on the host: a queue, slots, cancellation, time-outs, and tokens as they are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from jaxgen.decoding.batcher import Batcher, Request
from jaxgen.decoding.speculate import RUNNING

__all__ = ["CANCELLED", "TIMED_OUT", "Outcome", "QueueFull", "Server"]

# How a request ends besides STOPPED, FULL and BROKEN.
CANCELLED, TIMED_OUT = 5, 6

PyTree = Any


class QueueFull(RuntimeError):
    """The queue holds as many requests as it may: try again after `step`, or submit with `wait`."""


class Outcome(NamedTuple):
    """What became of a request.

    Attributes:
      tokens: generated; a stop token included.
      status: STOPPED, FULL, BROKEN (the model's logits were not numbers), CANCELLED or TIMED_OUT.
      calls: model calls while it was in a slot.
      submitted, started, ended: by the server's clock; `started` is None for one that never had a slot.
    """

    tokens: list[int]
    status: int
    calls: int
    submitted: float
    started: float | None
    ended: float


class _Job(NamedTuple):
    request: Request
    deadline: float | None
    submitted: float


class _Running:
    """A request in a slot."""

    def __init__(self, number: int, job: _Job, started: float):
        self.number, self.job, self.started = number, job, started
        self.tokens: list[int] = []


class Server:
    """Serves requests from one thread: whoever calls `step`, `stream`, `result` or `drain` does the work.

    A request waits in the queue, first come first served, until a slot is free. Its tokens depend on its own prompt, key and
    settings alone, whatever else the server does.

    Args:
      batcher: the compiled part.
      params: of the model.
      cache: empty, a row a slot, see `Batcher.start`.
      cond: an example of a request's, without the batch's axis.
      steps: decoding steps between two looks at the queue; a run ends before if a slot gets free and somebody waits.
      queue: how many requests may wait.
      widths: smaller numbers of slots to run with when there is little to do, each compiled once; running requests are moved
        together, so that a model call costs what they need.
      clock: seconds, for time-outs; a test brings its own.

    Example:
      >>> batcher = Batcher(step=step, max_length=64)    # doctest: +SKIP
      >>> server = Server(batcher, params, model.init_cache(8, batcher.capacity))    # doctest: +SKIP
      >>> number = server.submit([1, 2, 3], key=jax.random.key(0), settings=Sampling(temperature=0.8))    # doctest: +SKIP
      >>> for token in server.stream(number): print(token)    # doctest: +SKIP
    """

    def __init__(
        self,
        batcher: Batcher,
        params: PyTree,
        cache: PyTree,
        cond: PyTree = None,
        *,
        steps: int = 8,
        queue: int = 64,
        widths: Sequence[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._batcher, self._params, self._cond, self._clock = batcher, params, cond, clock
        self._slots = batcher.start(params, cache, cond)
        full = self._slots.limit.shape[0]
        for name, value in (("steps", steps), ("queue", queue), *(("widths", width) for width in widths)):
            if value < 1 or (name == "widths" and value > full):
                raise ValueError(f"{name}={value}: must be at least 1" + f" and at most {full}" * (name == "widths"))
        self._steps, self._most, self._widths = steps, queue, sorted({*widths, full})
        self._queue: dict[int, _Job] = {}  # in order of arrival
        self._running: list[_Running | None] = [None] * full
        self._outcomes: dict[int, Outcome] = {}
        self._next, self.calls = 0, 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return sum(one is not None for one in self._running)

    @property
    def slots(self) -> int:
        """Slots at present, one of `widths`."""
        return len(self._running)

    def warm_up(self) -> None:
        """Compiles all that requests may need, at all widths, so that none waits for a compiler.

        Raises:
          ValueError: requests are running.
        """
        if self.running:
            raise ValueError(f"{self.running} requests are running; warm up before")
        b, params, here = self._batcher, self._params, self._slots
        request = b.request([0], key=jax.random.key(0), cond=self._cond)
        for width in self._widths:
            slots = b.reorder(params, here, np.full(width, -1, np.int32))
            for other in self._widths:
                b.reorder(params, slots, np.full(other, -1, np.int32))
            slots = b.insert(params, slots, np.int32(0), request)
            slots = b.run(params, slots, np.int32(0), np.bool_(False))
            b.free(slots, np.ones(width, bool))

    def submit(
        self,
        prompt: Sequence[int],
        *,
        key: Key[Array, ""],
        row: int = 0,
        max_new: int | None = None,
        stop: Sequence[int] = (),
        settings: PyTree = None,
        cond: PyTree = None,
        timeout: float | None = None,
        wait: bool = False,
    ) -> int:
        """Puts a request at the end of the queue.

        Args:
          prompt, key, row, max_new, stop, settings, cond: see `Batcher.request`.
          timeout: seconds from now after which it ends with what it has, looked at between runs; None is never.
          wait: if the queue is full, work until it is not. Tokens made meanwhile are in `stream` and `result`.

        Returns:
          The request's number.

        Raises:
          ValueError: naming what is wrong with the request.
          QueueFull: it is, and `wait` is false.
        """
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout}: must be > 0")
        options = dict(max_new=max_new, stop=stop, settings=settings, cond=cond)
        request = self._batcher.request(prompt, key=key, row=row, **options)
        while len(self._queue) >= self._most:
            if not wait:
                raise QueueFull(f"{len(self._queue)} requests wait, as many as may")
            self.step()
        now, number = self._clock(), self._next
        self._next += 1
        self._queue[number] = _Job(request, None if timeout is None else now + timeout, now)
        return number

    def cancel(self, number: int) -> bool:
        """Ends a request with what it has; whether there was anything to end."""
        now = self._clock()
        if number in self._queue:
            self._finish_waiting(number, CANCELLED, now)
            return True
        for slot, one in enumerate(self._running):
            if one is not None and one.number == number:
                self._evict({slot: CANCELLED}, now)
                return True
        self._known(number)
        return False

    def step(self) -> dict[int, list[int]]:
        """Ends what has timed out, fills free slots, takes some decoding steps; the new tokens of each request."""
        self._expire()
        self._fit()
        self._admit()
        if not self.running:
            return {}
        self._slots = self._batcher.run(self._params, self._slots, np.int32(self._steps), np.bool_(len(self._queue)))
        loop = self._slots.loop
        tokens, length, status, row_calls, calls = jax.device_get(
            (loop.seq.tokens, loop.seq.length, loop.status, loop.row_calls, loop.calls)
        )
        self.calls += int(calls)
        now, new = self._clock(), {}
        for slot, one in enumerate(self._running):
            if one is None:
                continue
            made = tokens[slot, int(one.job.request.length) + len(one.tokens) : length[slot]].tolist()
            one.tokens += made
            if made:
                new[one.number] = made
            if status[slot] != RUNNING:
                self._finish(slot, int(status[slot]), int(row_calls[slot]), now)
        return new

    def stream(self, number: int) -> Iterator[int]:
        """The request's tokens as they are made, from the first on; its outcome stays for `result`."""
        sent = 0
        while True:
            outcome = self._outcomes.get(number)
            tokens = self._tokens(number) if outcome is None else outcome.tokens
            new = tokens[sent:]  # not a view: the list grows while the caller holds this generator
            sent += len(new)
            yield from new
            if outcome is not None:
                return
            self.step()

    def result(self, number: int) -> Outcome:
        """Works until the request has ended; hands its outcome out, once.

        Raises:
          KeyError: no such request, or its outcome was handed out.
        """
        while number not in self._outcomes:
            self._known(number)
            self.step()
        return self._outcomes.pop(number)

    def drain(self) -> dict[int, Outcome]:
        """Works until nothing waits or runs; hands out all outcomes that there are."""
        while self._queue or self.running:
            self.step()
        outcomes, self._outcomes = self._outcomes, {}
        return outcomes

    def _tokens(self, number: int) -> list[int]:
        self._known(number)
        return next((one.tokens for one in self._running if one is not None and one.number == number), [])

    def _known(self, number: int) -> None:
        live = number in self._queue or number in self._outcomes
        if not live and all(one is None or one.number != number for one in self._running):
            raise KeyError(f"request {number}: there is none, or its outcome was handed out")

    def _expire(self) -> None:
        now = self._clock()

        def late(job):
            return job.deadline is not None and now >= job.deadline

        for number in [number for number, job in self._queue.items() if late(job)]:
            self._finish_waiting(number, TIMED_OUT, now)
        self._evict({i: TIMED_OUT for i, one in enumerate(self._running) if one is not None and late(one.job)}, now)

    def _admit(self) -> None:
        for slot, one in enumerate(self._running):
            if one is None and self._queue:
                number = next(iter(self._queue))
                job = self._queue.pop(number)
                self._slots = self._batcher.insert(self._params, self._slots, np.int32(slot), job.request)
                self._running[slot] = _Running(number, job, self._clock())

    def _fit(self) -> None:
        """As few slots as the requests need."""
        need = self.running + len(self._queue)
        width = next((width for width in self._widths if width >= need), self._widths[-1])
        if width == len(self._running):
            return
        order = [slot for slot, one in enumerate(self._running) if one is not None]
        order += [-1] * (width - len(order))
        self._slots = self._batcher.reorder(self._params, self._slots, np.array(order, np.int32))
        self._running = [None if slot < 0 else self._running[slot] for slot in order]

    def _evict(self, slots: dict[int, int], now: float) -> None:
        if not slots:
            return
        calls = np.asarray(self._slots.loop.row_calls)
        which = np.isin(np.arange(len(self._running)), list(slots))
        self._slots = self._batcher.free(self._slots, which)
        for slot, status in slots.items():
            self._finish(slot, status, int(calls[slot]), now)

    def _finish(self, slot: int, status: int, calls: int, now: float) -> None:
        one, self._running[slot] = self._running[slot], None
        self._outcomes[one.number] = Outcome(one.tokens, status, calls, one.job.submitted, one.started, now)

    def _finish_waiting(self, number: int, status: int, now: float) -> None:
        job = self._queue.pop(number)
        self._outcomes[number] = Outcome([], status, 0, job.submitted, None, now)
