"""Whether a training waits for its data or for its devices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

__all__ = ["Throughput"]

# Below this share of the time, waiting is noise.
LITTLE = 0.1


class Throughput:
    """Adds up where a training loop's time goes.

    The loop runs ahead of the devices: it takes a batch, starts an update, and waits for an older one. Where the data is slow the
    loop waits for batches and never for the devices; where the devices are slow it is the other way round.

    Args:
      clock: seconds, for the tests.

    Example:
      >>> meter = Throughput()
      >>> for _ in range(steps):
      ...     with meter.input():
      ...         batch = next(data)
      ...     state, row = update(state, batch)          # returns at once
      ...     with meter.device():
      ...         jax.block_until_ready(older_row)
      ...     meter.step(examples=256)
      >>> print(meter.line())
      811 examples/s  waits: data 2%, devices 95%  the devices are the bottleneck
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Starts again: after compiling, or after each report."""
        self._start, self._input, self._device, self._steps, self._examples = self._clock(), 0.0, 0.0, 0, 0

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Around what waits for a batch, its transfer to the devices included."""
        start = self._clock()
        try:
            yield
        finally:
            self._input += self._clock() - start

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Around what waits for the devices."""
        start = self._clock()
        try:
            yield
        finally:
            self._device += self._clock() - start

    def step(self, examples: int) -> None:
        """One update more, of so many examples over all hosts."""
        self._steps += 1
        self._examples += examples

    def report(self) -> dict[str, float | str]:
        """Since the last `reset`.

        Returns:
          "steps_per_s" and "examples_per_s"; "input_share" and "device_share", the shares of the time spent waiting for each;
          and "bottleneck": "input", "device", or "host" where the loop hardly waits for either, so that Python is what is slow.
        """
        total = max(self._clock() - self._start, 1e-9)
        shares = {"input": self._input / total, "device": self._device / total}
        slowest = max(shares, key=shares.get)
        return {
            "steps_per_s": self._steps / total,
            "examples_per_s": self._examples / total,
            "input_share": shares["input"],
            "device_share": shares["device"],
            "bottleneck": slowest if shares[slowest] >= LITTLE else "host",
        }

    def line(self) -> str:
        """`report` as text."""
        found = self.report()
        words = {"input": "the data is", "device": "the devices are", "host": "the loop is"}
        return (
            f"{found['examples_per_s']:.3g} examples/s  waits: data {found['input_share']:.0%}, "
            f"devices {found['device_share']:.0%}  {words[found['bottleneck']]} the bottleneck"
        )
