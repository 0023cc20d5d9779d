"""Images in many shard files, found and indexed once, then read at random without holding them.

The index is a file of 36 bytes an example that is mapped, not read, so that memory does not grow with the data. It is kept in
the user's cache folder under a name that changes when a shard does.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import glob
import hashlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data.array_records import ArrayRecordShards
from jaxgen.data.parquet_shards import ParquetShards
from jaxgen.data.shard_rows import NO_LABEL, ROW, Row, ShardFormat
from jaxgen.data.sources import Example, check_split, decode
from jaxgen.data.tar_shards import TarShards

__all__ = ["HeldOut", "ShardSource", "find_shards", "shard_source"]

FORMATS: tuple[ShardFormat, ...] = (TarShards(), ParquetShards(), ArrayRecordShards())
FOLDERS = ("data", "train", "val", "validation", "test")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
EVERY, FIRST = 10, 4  # where no shard is for testing, examples 4, 14, 24, ... are
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HeldOut(Sequence):
    """Numbers of one in ten examples ("test") or of the others ("train"), computed when they are asked for.

    Example:
      >>> list(HeldOut(23, "test")), list(HeldOut(7, "train"))
      ([4, 14], [0, 1, 2, 3, 5, 6])
    """

    total: int
    split: str

    def __len__(self) -> int:
        test = max(0, -(-(self.total - FIRST) // EVERY))
        return test if self.split == "test" else self.total - test

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.split == "test":
            return EVERY * index + FIRST
        tens, rest = divmod(index, EVERY - 1)
        return EVERY * tens + rest + (rest >= FIRST)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ShardSource:
    """Images in shards; each is read and decoded when it is asked for.

    Attributes:
      paths: the shards.
      format: how they are read.
      index_path: a file of `ROW`s, one an example.
      rows: which of them these are.
      num_classes: as in `Source`.
      class_names: as in `Source`.
      left_out: shards that are damaged, and what is wrong with them.
    """

    paths: tuple[str, ...]
    format: ShardFormat
    index_path: str
    rows: Sequence[int]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    left_out: tuple[str, ...] = ()

    @functools.cached_property
    def _index(self) -> np.ndarray:
        return np.memmap(self.index_path, ROW, "r")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the index itself; pickled, it would be a copy.
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        label = int(self._row(index)["label"])
        return {"image": decode(self.read(index), self.name(index)), "label": max(label, 0)}

    def _row(self, index: int) -> np.void:
        return self._index[self.rows[index]]

    def name(self, index: int) -> str:
        row, shard = self._row(index), int(self._row(index)["shard"])
        first = bisect.bisect_left(self._index, shard, key=lambda row: row["shard"])
        return f"{self.paths[shard]}[{self.rows[index] - first}] (byte or row {int(row['place'])})"

    def read(self, index: int) -> bytes:
        """The encoded image."""
        return self.format.read(*self._place(index))

    def caption(self, index: int) -> str | None:
        """What is said of an image."""
        return self.format.caption(*self._place(index))

    def _place(self, index: int) -> tuple[str, Row]:
        *row, shard = self._row(index).tolist()
        return self.paths[shard], Row(*row)

    def subset(self, indices: Iterable[int]) -> ShardSource:
        """The source of these examples only."""
        return dataclasses.replace(self, rows=np.array([self.rows[int(i)] for i in indices]))


def find_shards(path: str) -> tuple[ShardFormat, tuple[str, ...]] | None:
    """The shards that a path names, in order: a file, a pattern with `*`, or a folder (and its `data`, `train`, `val`,
    `validation` and `test`). None if there are none.

    Raises:
      ValueError: shards of two formats, or compressed ones, in which nothing can be found without reading all.
    """
    if "*" in path:
        names = glob.glob(path)
    elif os.path.isdir(path):
        folders = [path, *(os.path.join(path, name) for name in FOLDERS if os.path.isdir(os.path.join(path, name)))]
        names = [entry.path for folder in folders for entry in os.scandir(folder) if not entry.name.startswith(".")]
    else:
        names = [path] if os.path.isfile(path) else []
    packed = next((name for name in sorted(names) if name.lower().endswith(COMPRESSED)), None)
    if packed:
        raise ValueError(f"{packed}: a compressed shard cannot be read at random; decompress it to .tar")
    found = {form: tuple(sorted(n for n in names if n.lower().endswith(form.suffixes))) for form in FORMATS}
    found = {form: shards for form, shards in found.items() if shards}
    if len(found) > 1:
        first = [shards[0] for shards in found.values()]
        raise ValueError(f"{path}: shards of several formats ({', '.join(first)})")
    return next(iter(found.items()), None)


def _split_of(name: str, root: str) -> str | None:
    """Which part of the data a shard belongs to: a word of its name, such as `train` in `x-train-01.tar`, or of its folder's."""
    folder, file = os.path.split(os.path.relpath(name, root).lower())
    words = [word for text in (file, folder) for word in re.split(r"[^a-z]+", text)]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def shard_source(
    path: str, split: str, *, skip_bad: bool = False, cache: str | os.PathLike | None = None, log_every_s: float = 5.0
) -> ShardSource | None:
    """The images in shards, or None where `path` names none.

    Where no shard's name says `val`, `valid`, `validation` or `test`, one example in ten is held out; `val` is preferred, as
    ImageNet's `test` has no labels.

    Args:
      path: see `find_shards`.
      split: "train" or "test".
      skip_bad: leave damaged shards out; each is named, and all are counted, in warnings of the log. Otherwise they are an
        error that names them all.
      cache: where the index is kept; `$XDG_CACHE_HOME/jaxgen/shards` by default.
      log_every_s: seconds between lines about a first look at many shards.

    Raises:
      ValueError: see `find_shards` and `skip_bad`; no shards for training, no example, or labels for some examples only.
    """
    check_split(split)
    found = find_shards(path)
    if found is None:
        return None
    form, paths = found
    root = path if os.path.isdir(path) else os.path.dirname(path) or "."
    parts = collections.defaultdict(list)
    for name in paths:
        parts[_split_of(name, root)].append(name)
    held = next((part for part in ("val", "test") if part in parts), None)
    train = tuple(parts[None] + parts["train"])
    if not train:
        raise ValueError(f"{path}: has shards such as {paths[0]}, but none for training")
    # Class names and their number come from the training shards, whichever part is asked for.
    source = _indexed(form, train, skip_bad, Path(cache or _cache_folder()), log_every_s)
    if held and split == "test":
        test = _indexed(form, tuple(parts[held]), skip_bad, Path(cache or _cache_folder()), log_every_s)
        classes = max(source.num_classes, test.num_classes)
        return dataclasses.replace(test, num_classes=classes, class_names=source.class_names)
    return source if held else dataclasses.replace(source, rows=HeldOut(len(source), split))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "jaxgen" / "shards"


def _indexed(form: ShardFormat, paths: tuple[str, ...], skip_bad: bool, cache: Path, log_every_s: float) -> ShardSource:
    """All examples of some shards, from the index in `cache`, which is made if it is not there."""
    stats = [os.stat(path) for path in paths]
    state = [[os.path.abspath(path), s.st_size, s.st_mtime_ns] for path, s in zip(paths, stats)]
    name = hashlib.sha256(json.dumps([skip_bad, state, str(ROW)]).encode()).hexdigest()[:32]
    index, note = cache / f"{name}.rows", cache / f"{name}.json"
    if not (index.exists() and note.exists()):
        _build(form, paths, skip_bad, index, note, log_every_s)
    about = json.loads(note.read_text())
    for problem in about["problems"]:
        log.warning("left out: %s", problem)
    if about["problems"]:
        log.warning("left out %d damaged of %d shards", len(about["problems"]), len(paths))
    names = form.class_names(paths[about["first"]]) if about["labelled"] else None
    return ShardSource(
        paths=paths,
        format=form,
        index_path=str(index),
        rows=range(about["examples"]),
        num_classes=max(about["classes"], len(names or ())),
        class_names=names,
        left_out=tuple(about["problems"]),
    )


def _build(form: ShardFormat, paths: tuple[str, ...], skip_bad: bool, index: Path, note: Path, log_every_s: float) -> None:
    """Writes the index of some shards, one shard in memory at a time."""
    index.parent.mkdir(parents=True, exist_ok=True)
    # Hosts may share the cache folder.
    mark = uuid.uuid4().hex
    temporary = index.with_name(f"{index.name}.{mark}.tmp")
    about = {"examples": 0, "classes": 1, "labelled": 0, "problems": [], "first": None}
    last = time.monotonic()
    try:
        with open(temporary, "wb") as file:
            for number, path in enumerate(paths):
                try:
                    rows = np.array([(*row, number) for row in form.index(path)], ROW)
                except ValueError as error:
                    about["problems"].append(str(error))
                    continue
                rows.tofile(file)
                about["first"] = number if about["first"] is None else about["first"]
                about["examples"] += len(rows)
                about["classes"] = max(about["classes"], 1 + int(rows["label"].max(initial=0)))
                about["labelled"] += int((rows["label"] != NO_LABEL).sum())
                if time.monotonic() - last > log_every_s:
                    last = time.monotonic()
                    log.info("indexed %d of %d shards, %d examples", number + 1, len(paths), about["examples"])
        _check(paths, about, skip_bad)
        os.replace(temporary, index)
    finally:
        temporary.unlink(missing_ok=True)
    written = note.with_name(f"{note.name}.{mark}.tmp")
    written.write_text(json.dumps(about))
    os.replace(written, note)


def _check(paths: tuple[str, ...], about: dict[str, Any], skip_bad: bool) -> None:
    problems, count = about["problems"], about["examples"]
    if problems and not skip_bad:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{len(problems)} of {len(paths)} shards are damaged (data.skip_bad leaves them out): {listed}")
    if not count:
        raise ValueError(f"no images in {len(paths)} shards such as {paths[0]}" + (f": {problems[0]}" if problems else ""))
    if about["labelled"] not in (0, count):
        raise ValueError(f"{count - about['labelled']} of {count} images in shards such as {paths[0]} have no label")
