"""Parquet files as the Hugging Face hub has them: a column `image` of bytes and a column `label`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator

from jaxgen.data.shard_rows import NO_LABEL, Row

__all__ = ["ParquetShards"]

IMAGES, LABELS, CAPTIONS = ("image", "img"), ("label", "labels", "fine_label"), ("caption", "text")


@dataclasses.dataclass(frozen=True)
class ParquetShards:
    """Reads images, labels and captions (a column `caption` or `text`) through pyarrow (`pip install 'jaxgen[parquet]'`).

    `image` is a column of encoded images, or of pairs `{"bytes", "path"}`. An example's place is its row group, its size the
    row in there. Parquet is read a row group at a time, of which the last few are kept: where these are large, shuffled
    reading is slow, and `write_tar` makes shards that are not.
    """

    suffixes: tuple[str, ...] = (".parquet",)

    def index(self, path: str) -> Iterator[Row]:
        """The examples of a shard: the labels are read, the images are not.

        Raises:
          ValueError: the shard is damaged, or lacks the column of images.
        """
        file = _open(path)
        _column(path, file, IMAGES)
        label = _column(path, file, LABELS, optional=True)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            labels = [NO_LABEL] * rows
            if label is not None:
                labels = _guard(path, lambda g=group: file.read_row_group(g, columns=[label])[label].to_pylist())
            for row, value in enumerate(labels):
                yield Row(place=group, size=row, label=NO_LABEL if value is None else value)

    def read(self, path: str, row: Row) -> bytes:
        """The image file of an example.

        Raises:
          ValueError: the shard is damaged, or names the image's file without holding its bytes.
        """
        value = _guard(path, lambda: _values(path, row.place, IMAGES)[row.size].as_py())
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"{path}: row {row.size} of row group {row.place} has no image bytes")
        return data

    def caption(self, path: str, row: Row) -> str | None:
        """What the column `caption` or `text` says, if there is one; raises as `read`."""
        column = _guard(path, lambda: _values(path, row.place, CAPTIONS))
        value = None if column is None else column[row.size].as_py()
        return None if value is None else str(value)

    def class_names(self, path: str) -> tuple[str, ...] | None:
        """From the hub's description of the columns, if it is there."""
        file = _open(path)
        label = _column(path, file, LABELS, optional=True)
        text = (file.schema_arrow.metadata or {}).get(b"huggingface")
        try:
            names = json.loads(text)["info"]["features"][label]["names"] if text else None
        except (ValueError, KeyError, TypeError):
            return None
        return tuple(map(str, names)) if names else None


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("parquet files need pyarrow: pip install 'jaxgen[parquet]'") from error
    return pyarrow


def _guard(path: str, call):
    """What `call` returns; pyarrow's errors name the shard."""
    pyarrow = _pyarrow()
    try:
        return call()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from error


def _open(path: str):
    pyarrow = _pyarrow()
    return _guard(path, lambda: pyarrow.parquet.ParquetFile(path))


def _column(path: str, file, names: tuple[str, ...], optional: bool = False) -> str | None:
    found = [name for name in names if name in file.schema_arrow.names]
    if not found and not optional:
        raise ValueError(f"{path}: columns {', '.join(file.schema_arrow.names)}; expected {' or '.join(names)}")
    return found[0] if found else None


@functools.lru_cache(maxsize=8)
def _values(path: str, group: int, names: tuple[str, ...]):
    """The column of one of these names in a row group, in pyarrow's memory; None if there is none."""
    file = _open(path)
    name = _column(path, file, names, optional=names != IMAGES)
    return None if name is None else file.read_row_group(group, columns=[name])[name]
