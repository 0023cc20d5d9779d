"""A trace of some updates of a training, and what the persistent compilation cache did for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from jaxgen import storage

__all__ = ["CompileCache", "Profile"]


class Profile:
    """Records a trace of some updates with JAX's profiler. Use it as a context manager: leaving it ends a trace that runs.

    Args:
      directory: where the trace is written (see `jaxgen.storage.place`), made if missing.
      start: updates before the first that is recorded.
      count: updates to record; 0 records nothing.
      log: told where the trace is.
    """

    def __init__(self, directory: str | os.PathLike, start: int, count: int, log: Callable[[str], None]):
        self._directory, self._start, self._end, self._log = storage.place(directory), start, start + count, log
        self._updates, self._running = 0, False
        self._kept: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *error) -> None:
        self._stop()

    def fit(self, updates: int) -> None:
        """Starts earlier where there will be no more than so many updates. To be called before the first."""
        count = self._end - self._start
        self._start = max(0, min(self._start, updates - count))
        self._end = self._start + count

    def before_update(self) -> None:
        """To be called before each update."""
        if self._start == self._updates < self._end:
            if storage.in_bucket(self._directory):  # the profiler writes to disks only
                self._kept = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(str(self._directory) if self._kept is None else self._kept.name)
            self._running = True
        elif self._updates == self._end:
            self._stop()
        self._updates += 1

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            if self._kept is not None:
                storage.copy_tree(Path(self._kept.name), self._directory)
                self._kept.cleanup()
            self._log(f"a trace of {self._updates - self._start} updates is in {self._directory}")


class CompileCache:
    """Keeps compiled programs in a directory for the next run, and counts.

    JAX's setting holds for the whole process, so that this belongs into scripts.

    Attributes:
      hits: programs that were read from it.
      misses: programs that were compiled and may have been added.

    Args:
      directory: made if missing; several runs may share it. A bucket's will do as well.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory, self.hits, self.misses = storage.place(directory), 0, 0
        jax.config.update("jax_compilation_cache_dir", str(self.directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.monitoring.register_event_listener(self._note)

    def _note(self, event: str, **_) -> None:
        self.hits += event == "/jax/compilation_cache/cache_hits"
        self.misses += event == "/jax/compilation_cache/cache_misses"

    def __str__(self) -> str:
        return f"compile cache {self.directory}: {self.hits} programs read, {self.misses} compiled"
