"""Saying, while something takes long, what it is and for how long it has been going on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["saying"]


@contextlib.contextmanager
def saying(what: str | Callable[[], str], *, every_s: float, log: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    """Logs `still <what> (20 s)` every `every_s` seconds while the block runs, from a thread of its own.

    Args:
      what: what is done, or a function that says it.
      every_s: seconds between lines, and before the first one.
      log: takes a line.

    Yields:
      A function that takes what is done from now on, and starts to count anew.

    Raises:
      ValueError: no positive number of seconds.

    Example:
      >>> with saying("compiling", every_s=30.0, log=print) as now:
      ...     now("running")
    """
    if not every_s > 0:
        raise ValueError(f"every_s={every_s}: expected seconds above 0")
    done, current = threading.Event(), (what, time.monotonic())

    def now(what: str) -> None:
        nonlocal current
        current = what, time.monotonic()

    def run() -> None:
        said = time.monotonic()
        while not done.wait(max(0.0, max(current[1], said) + every_s - time.monotonic())):
            what, start = current
            if time.monotonic() >= max(start, said) + every_s:
                said = time.monotonic()
                log(f"still {what() if callable(what) else what} ({said - start:.0f} s)")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield now
    finally:
        done.set()
        thread.join()
