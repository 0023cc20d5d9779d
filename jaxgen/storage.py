"""Files in folders of this machine and in buckets (`gs://bucket/folder`), written so that none is ever seen half there.

A place is a `pathlib.Path`, or for a bucket an `etils.epath.Path`, which has the same methods but for a few: those are here. A
bucket has no folders of its own, an object appears when it is complete, and nothing can be added to its end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from etils import epath

__all__ = [
    "Lines",
    "Place",
    "copy_tree",
    "exists",
    "in_bucket",
    "on_disk",
    "place",
    "read_text",
    "remove_tree",
    "size",
    "whole",
    "write_text",
]

Place = Path | epath.Path


def place(path: str | os.PathLike) -> Place:
    """A path or URL as something to join names to, and to look up, read and list.

    Args:
      path: of this machine (`runs/a`, `file:///runs/a`), or in Google's cloud storage (`gs://bucket/runs/a`).

    Raises:
      ValueError: another kind of URL, which arrays cannot be written to; one that lost a slash on its way through
        `pathlib.Path`; or the package that reads buckets is not installed.

    Example:
      >>> place("file:///runs/a") / "config.json", place("gs://bucket/runs") / "a"
      (PosixPath('/runs/a/config.json'), PosixGPath('gs://bucket/runs/a'))
    """
    text = os.fspath(path)
    scheme, slashes, rest = re.match(r"(?:(\w{2,}):(/+))?(.*)", text, re.DOTALL).groups()
    if scheme is None:
        return path if isinstance(path, Path) else Path(text)
    if slashes == "/":
        raise ValueError(f"{text}: has one slash where a URL has two (pathlib.Path makes one of them); give the URL as text")
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: a file of another machine ({parts.netloc}); file:///folder has three slashes")
        return Path(unquote(parts.path))
    if scheme != "gs" or not rest:
        raise ValueError(f"{text}: expected a folder of this machine, file:///folder or gs://bucket/folder")
    _check_reader(text)
    return epath.Path(text)


def _check_reader(url: str) -> None:
    """That something can read buckets: etils does it with TensorFlow where that is installed, else with gcsfs."""
    import fsspec

    try:
        if importlib.util.find_spec("tensorflow") is None:
            fsspec.get_filesystem_class("gs")
    except ImportError as error:
        raise ValueError(f"{url}: buckets need the package gcsfs: pip install 'jaxgen[gcs]'") from error


def in_bucket(path: Place) -> bool:
    """Whether it is not on a disk of this machine."""
    return not isinstance(path, Path)


def on_disk(path: str | os.PathLike, what: str) -> Path:
    """A place for what needs a file that can be mapped into memory.

    Raises:
      ValueError: naming `path`, and `what` cannot be in a bucket.
    """
    found = place(path)
    if in_bucket(found):
        raise ValueError(f"{path}: {what} cannot be in a bucket; copy it to a disk of this machine")
    return found


@contextlib.contextmanager
def _os_errors(path: Place) -> Iterator[None]:
    """Libraries that read buckets have errors of their own; here they become `OSError`, as a disk's are."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not in_bucket(path):
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def exists(path: Place) -> bool:
    """Whether there is such a file or folder.

    Raises:
      OSError: the bucket cannot be asked.
    """
    with _os_errors(path):
        return path.exists()


def read_text(path: Place) -> str:
    """A text file.

    Raises:
      OSError: it cannot be read.
    """
    with _os_errors(path):
        return path.read_text()


@contextlib.contextmanager
def whole(path: Place) -> Iterator[Path]:
    """A name on this machine to write a file to, which in the end is at `path`, all of it or, after an error, nothing of it.

    Missing folders are made. The name ends as that of `path` does.

    Raises:
      OSError: it cannot be written; what was at `path` is still there.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            _upload(Path(folder) / path.name, path)
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # where its folder cannot be made, there is no file either
            temporary.unlink(missing_ok=True)


def _upload(source: Path, path: Place) -> None:
    with _os_errors(path), source.open("rb") as theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as ours:
            shutil.copyfileobj(theirs, ours, 16 * 2**20)


def write_text(path: Place, text: str) -> None:
    """A text file, as in `whole`."""
    with whole(path) as temporary:
        temporary.write_text(text)


def size(path: Place) -> int | None:
    """Bytes of a file; None if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.length if in_bucket(path) else found.st_size


def remove_tree(path: Place) -> None:
    """A folder with all that is in it."""
    if in_bucket(path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def copy_tree(source: Path, path: Place) -> None:
    """The files of a folder of this machine to another place."""
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        _upload(file, path.joinpath(*file.relative_to(source).parts))


class Lines:
    """Adds lines to a text file: each at once on a disk; in a bucket, where it is written anew, a while after the last time.

    Args:
      path: of the file, which may exist.
      every_s: seconds between two times.
      clock: seconds, for the tests.
    """

    def __init__(self, path: Place, *, every_s: float = 30.0, clock: Callable[[], float] = time.monotonic):
        self._path, self._every, self._clock = path, every_s, clock
        self._file = None
        self._text: list[str] | None = None
        self._written, self._changed = clock(), False

    def read(self) -> list[str]:
        """The lines so far, those included that are still to be written."""
        if self._text is not None:
            return "".join(self._text).splitlines()
        return read_text(self._path).splitlines() if exists(self._path) else []

    def add(self, line: str) -> None:
        """At the end."""
        if not in_bucket(self._path):
            self._file = self._path.open("a") if self._file is None else self._file
            self._file.write(line + "\n")
            self._file.flush()
            return
        if self._text is None:
            self._text = [earlier + "\n" for earlier in self.read()]
        self._text.append(line + "\n")
        self._changed = True
        if self._clock() - self._written >= self._every:
            self.flush()

    def replace(self, lines: list[str]) -> None:
        """By these."""
        self.close()
        self._text = None
        write_text(self._path, "".join(line + "\n" for line in lines))

    def flush(self) -> None:
        """Writes what was added so far."""
        if self._changed:
            write_text(self._path, "".join(self._text))
            self._written, self._changed = self._clock(), False

    def close(self) -> None:
        """Ends the writing."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None
