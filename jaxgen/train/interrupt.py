"""Stopping cleanly on SIGTERM and Ctrl-C: in a run of several processes at the same step, whichever of them is told."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

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
      handlers, it always returns 0. Several processes have to call it equally often: it then returns SIGTERM in all of
      them at the same call, soon after any of them was told to stop.
    """
    with _agreed() if jax.process_count() > 1 else _alone() as stop:
        yield stop


@contextlib.contextmanager
def _alone() -> Iterator[Callable[[], int]]:
    received = []
    with _handlers((signal.SIGTERM, signal.SIGINT), received.append):
        yield lambda: received[0] if received else 0


@contextlib.contextmanager
def _agreed() -> Iterator[Callable[[], int]]:
    """JAX's runtime notes SIGTERM by itself and finds a call that no process has made yet; Ctrl-C becomes SIGTERM."""
    calls = itertools.count()
    came = []

    def stop() -> int:
        if not came and multihost_utils.reached_preemption_sync_point(next(calls)):
            came.append(signal.SIGTERM)
        return came[0] if came else 0

    with _handlers((signal.SIGINT,), lambda signum: os.kill(os.getpid(), signal.SIGTERM)):
        yield stop


@contextlib.contextmanager
def _handlers(numbers: tuple[int, ...], note: Callable[[int], None]) -> Iterator[None]:
    """Calls `note` for the first of the signals; after it they do what they do by default."""
    before = {}

    def handle(signum, frame):
        note(signum)
        for number in before:
            signal.signal(number, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
