"""Stopping cleanly on SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

__all__ = ["Interrupted", "signals"]


class Interrupted(Exception):
    """A signal stopped the training after it had saved.

    Attributes:
      exit_code: what a shell expects of the process: 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, signum: int, stage: str, step: int):
        super().__init__(f"{signal.Signals(signum).name}: saved stage {stage!r} at step {step}; run again to go on")
        self.exit_code = 128 + signum


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Notes SIGTERM and SIGINT instead of dying; the second one kills.

    Yields:
      A function that returns the number of the signal that came, or 0. Outside the main thread, where Python allows no
      handlers, it always returns 0.
    """
    received, before = [], {}

    def note(signum, frame):
        received.append(signum)
        for number in before:
            signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
