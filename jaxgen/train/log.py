"""What a training says: rows in `metrics.jsonl`, progress lines, and optional dashboards."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import jax

from jaxgen import storage

__all__ = ["MetricsLog", "Progress", "write_json"]


class MetricsLog:
    """Appends rows `{"stage": ..., "step": ..., name: float, ...}` to `<workdir>/metrics.jsonl`, from process 0 only.

    A number that is not finite becomes `null`, as JSON has no other word for it. On a disk each row is there at once; in a
    bucket, every half minute and after `flush`.

    Args:
      workdir: the run's directory (see `jaxgen.storage.place`).
      tensorboard: also write TensorBoard events to `<workdir>/tensorboard`.
      wandb: also log to Weights & Biases, as the run named after `workdir`.

    Raises:
      ValueError: a dashboard's package is not installed, or the file cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, *, tensorboard: bool = False, wandb: bool = False):
        self.path = storage.place(workdir) / "metrics.jsonl"
        self._on = jax.process_index() == 0
        self._rows = storage.Lines(self.path)
        self._board = self._wandb = None
        if not self._on:
            return
        bucket, folder = storage.in_bucket(self.path), self.path.parent
        if tensorboard:
            board = _require("tensorboardX", "tensorboard")
            try:
                self._board = board.SummaryWriter(str(folder / "tensorboard"))
            except ImportError as error:  # of the package by which tensorboardX writes to buckets
                raise ValueError(f"tensorboard=True cannot write to {folder / 'tensorboard'}: {error}") from error
        if wandb:
            # What it keeps itself has to be on a disk: in a bucket's case, where the program was started.
            name, kept = folder.name if bucket else folder.resolve().name, None if bucket else str(folder)
            self._wandb = _require("wandb", "wandb").init(project="jaxgen", name=name, dir=kept, resume="allow")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError) if error[0] else self._writable():
            self._rows.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def rewind(self, stage: str, step: int) -> None:
        """Drops the stage's rows after `step`, and a last line that a killed run left unfinished: they will come again."""
        if not self._on:
            return
        with self._writable():
            lines = self._rows.read()
            rows = [row for row in map(_parse, lines) if row is not None]
            rows = [row for row in rows if row.get("stage") != stage or row.get("step", 0) <= step]
            if lines:
                self._rows.replace([json.dumps(row) for row in rows])

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Appends one row; where the file is on a disk, it is on its way there when this returns."""
        if not self._on:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._writable():
            self._rows.add(json.dumps({"stage": stage, "step": step, **row}))
        for name, value in values.items():
            if self._board:
                self._board.add_scalar(f"{stage}/{name}", value, step)
        if self._wandb:
            self._wandb.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def flush(self) -> None:
        """Writes what is not written yet: what a checkpoint counts as done has to be there."""
        with self._writable():
            self._rows.flush()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror or error}") from error


def _parse(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _require(module: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{flag}=True needs the package {module}: pip install 'jaxgen[logging]'") from error


class Progress:
    """A line every few seconds: `stage 120/1000  loss 0.1234  12.3 steps/s  1m11s left`.

    Args:
      stage: named in the line.
      start: updates done before now.
      total: updates in the end.
      every_s: seconds between lines.
      log: takes a line.
      clock: seconds, for the tests.
    """

    def __init__(
        self,
        stage: str,
        start: int,
        total: int,
        every_s: float,
        log: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stage, self._total, self._every, self._log, self._clock = stage, total, every_s, log, clock
        self._last = (clock(), start)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Prints a line if one is due, or if this is the last step; `metrics` are those of `step`."""
        now = self._clock()
        then, before = self._last
        if now - then < self._every and step < self._total:
            return
        self._last = (now, step)
        rate = (step - before) / max(now - then, 1e-9)
        left = _duration((self._total - step) / rate) if rate else "unknown time"
        values = "  ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
        digits = "0f" if rate >= 100 else "3g"
        self._log(f"{self._stage} {step}/{self._total}  {values}  {rate:.{digits}} steps/s  {left} left")


def _duration(seconds: float) -> str:
    """`3h05m`, `4m10s` or `7s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def write_json(path: storage.Place, tree: dict) -> None:
    """Writes `tree` so that the file is never seen half-written."""
    storage.write_text(path, json.dumps(tree, indent=2) + "\n")
