"""Images in folders, and which of them cannot be read."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import logging
import os
import time
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxgen.data.sources import EncodedImages, Example, check_split, decode, held_out

__all__ = ["FileSource", "folder", "leave_out_unreadable", "stamp"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
TRAIN, HELD_OUT = "train", ("val", "test")  # "val" first: ImageNet's "test" has no labels
METADATA = "metadata.jsonl"
CHUNK = 256

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=4)
def _metadata(path: str, stamp: tuple[int, int]) -> dict[str, str]:
    """Texts by file, of the Hugging Face hub's list beside a folder of images: lines {"file_name": ..., "text": ...}.

    Raises:
      ValueError: a line that is something else.
    """
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found[os.path.normpath(row["file_name"])] = str(row["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no object with file_name and text") from error
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileSource:
    """Image files; each is decoded when it is asked for.

    Attributes:
      root: the folder.
      files: paths below it.
      labels: of the files, in [0, num_classes).
      num_classes: as in `Source`.
      class_names: as in `Source`.
    """

    root: str
    files: tuple[str, ...]
    labels: Int[np.ndarray, "n"]
    num_classes: int
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return {"image": decode(self.read(index), self.name(index)), "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def read(self, index: int) -> bytes:
        """The content of the file."""
        try:
            return Path(self.name(index)).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read image {self.name(index)}: {error.strerror}") from error

    def caption(self, index: int) -> str | None:
        """The text of the image in `metadata.jsonl`, or else in the `.txt` file beside it; None if there is neither."""
        path = os.path.join(self.root, METADATA)
        if os.path.exists(path) and self.files[index] in (listed := _metadata(path, stamp(path))):
            return listed[self.files[index]]
        beside = Path(self.name(index)).with_suffix(".txt")
        return beside.read_text(encoding="utf-8").strip() if beside.is_file() else None

    def subset(self, indices: Int[np.ndarray, "m"]) -> FileSource:
        """The source of these files only."""
        files = tuple(self.files[i] for i in indices)
        return dataclasses.replace(self, files=files, labels=self.labels[indices])


def folder(root: str, split: str) -> FileSource:
    """The images (`EXTENSIONS`, in any case) below a folder, laid out in one of these ways:

    - `root/train/...` and perhaps `root/val/...` or `root/test/...`, each as below;
    - `root/<class>/...`: class ids in the order of the sorted names of the training folders;
    - images in `root` itself: one class.

    Where there is neither `val` nor `test`, a tenth of each class is held out (see `held_out`). Files and folders whose
    name starts with a dot are passed over. Captions are in `metadata.jsonl` (lines {"file_name": "0001.png", "text": "a cat"}) of
    `root`, `root/train` and so on, or beside an image, in a file of its name that ends in `.txt`.

    Args:
      root: the folder.
      split: "train" or "test"; the latter is `val` if there is one.

    Raises:
      ValueError: no such folder; no images in it or in one of its class folders; images beside class folders; a class
        that is in `val` or `test` alone.
    """
    check_split(split)
    top = Path(root)
    if not top.is_dir():
        raise ValueError(f"{root}: no such folder")
    others = [name for name in HELD_OUT if (top / name).is_dir()]
    if not (top / TRAIN).is_dir():
        if others:
            raise ValueError(f"{root}: has a folder {others[0]!r} but none called {TRAIN!r}")
        source = _scan(top)
    elif not others:
        source = _scan(top / TRAIN)
    elif split == "train":
        return _scan(top / TRAIN)
    else:
        return _scan(top / others[0], classes=_class_folders(top / TRAIN))
    return source.subset(held_out(source.labels, split, every=10, where=root))


def _class_folders(base: Path) -> list[str]:
    return sorted(entry.name for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(base: Path) -> list[str]:
    """Images in `base` itself."""
    return sorted(e.name for e in os.scandir(base) if _is_image(e.name) and not e.is_dir())


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_below(base: Path, name: str) -> list[str]:
    """Images in the folder `name` and its subfolders, as paths from `base`."""
    found = []
    for path, folders, names in os.walk(base / name, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [os.path.relpath(os.path.join(path, n), base) for n in names if _is_image(n)]
    return sorted(found)


def _scan(base: Path, classes: list[str] | None = None) -> FileSource:
    """The images in `base`, of `classes` if they are known from another folder."""
    own, loose = _class_folders(base), _images(base)
    classes = own if classes is None else classes
    if own and loose:
        raise ValueError(f"{base}: has images (such as {loose[0]}) beside folders (such as {own[0]})")
    if not own and not loose:
        raise ValueError(f"{base}: no images (looked for {', '.join(EXTENSIONS)})")
    unknown = sorted(set(own) - set(classes))
    if unknown or (loose and classes):
        raise ValueError(f"{base}: {'class ' + unknown[0] if unknown else loose[0]!r} is in no training class folder")
    if loose:
        return FileSource(root=str(base), files=tuple(loose), labels=np.zeros(len(loose), np.int32), num_classes=1)

    files, labels = [], []
    for name in own:
        found = _images_below(base, name)
        if not found:
            raise ValueError(f"{base / name}: no images (looked for {', '.join(EXTENSIONS)})")
        files += found
        labels += [classes.index(name)] * len(found)
    return FileSource(
        root=str(base),
        files=tuple(files),
        labels=np.array(labels, np.int32),
        num_classes=len(classes),
        class_names=tuple(classes),
    )


def leave_out_unreadable(source: EncodedImages) -> EncodedImages:
    """`source` without the images that cannot be decoded; each is named, and all are counted, in warnings of the log.

    Every image is read once, JPEGs at an eighth of their size, with one thread a core. Files that have not changed
    since the last call are not read again.

    Raises:
      ValueError: no image can be read.
    """
    if isinstance(source, FileSource):
        stamps = tuple(stamp(source.name(i)) for i in range(len(source)))
        problems = _file_problems(source.root, source.files, stamps)
    else:
        problems = _find_problems(source)
    if len(problems) == len(source):
        raise ValueError(f"none of {len(source)} images can be read; the first: {problems[0]}")
    return source.subset(np.setdiff1d(np.arange(len(source)), list(problems))) if problems else source


def stamp(path: str) -> tuple[int, int]:
    """What changes when a file does."""
    try:
        stat = os.stat(path)
    except OSError:  # a broken link: reading it will say so
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_size)


# A run opens its data once for each stage, and reading all of a large folder takes minutes.
@functools.lru_cache(maxsize=2)
def _file_problems(root: str, files: tuple[str, ...], stamps: tuple[tuple[int, int], ...]) -> dict[int, str]:
    labels = np.zeros(len(files), np.int32)
    return _find_problems(FileSource(root=root, files=files, labels=labels, num_classes=1))


def _find_problems(source: EncodedImages) -> dict[int, str]:
    """Which images cannot be read, and why; in warnings of the log too."""
    starts = range(0, len(source), CHUNK)
    problems, last = {}, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start, found in zip(starts, pool.map(functools.partial(_problems, source), starts)):
            problems |= found
            if time.monotonic() - last > 5:
                last = time.monotonic()
                log.info("checked %d of %d images, %d unreadable", start, len(source), len(problems))
    for problem in problems.values():
        log.warning("left out: %s", problem)
    if problems:
        log.warning("left out %d unreadable of %d images", len(problems), len(source))
    return problems


def _problems(source: EncodedImages, start: int) -> dict[int, str]:
    """What is wrong with which of the `CHUNK` images from `start` on."""
    found = {}
    for i in range(start, min(start + CHUNK, len(source))):
        try:
            decode(source.read(i), source.name(i), thumbnail=True)
        except ValueError as error:
            found[i] = str(error)
    return found
