"""Where the examples of a shard are, the same for every format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["NO_LABEL", "ROW", "Row", "ShardFormat"]

NO_LABEL = -1
# As rows are written to an index: 36 bytes an example.
ROW = np.dtype([("place", "<i8"), ("size", "<i8"), ("label", "<i4"), ("text", "<i8"), ("text_size", "<i4"), ("shard", "<i4")])


class Row(NamedTuple):
    """An example's place in its shard, in the units of the shard's format.

    Attributes:
      place: where it begins.
      size: how long it is, or where it is within its place.
      label: its class, or NO_LABEL.
      text: where its caption begins, in formats that keep it apart.
      text_size: how long the caption is; negative where it is in a JSON object; 0 is none.
    """

    place: int
    size: int
    label: int
    text: int = 0
    text_size: int = 0


class ShardFormat(Protocol):
    """How files of one kind are read. A format is a value: two equal ones read alike, and it can be pickled.

    Attributes:
      suffixes: of the files' names.
    """

    suffixes: tuple[str, ...]

    def index(self, path: str) -> Iterator[Row]:
        """The examples of a shard, in order; ValueError naming `path` if it is damaged."""
        ...

    def read(self, path: str, row: Row) -> bytes:
        """The encoded image of an example; ValueError naming `path` if it cannot be read."""
        ...

    def caption(self, path: str, row: Row) -> str | None:
        """What is said of an example, if anything is; ValueError naming `path` if it cannot be read."""
        ...

    def class_names(self, path: str) -> tuple[str, ...] | None:
        """The classes, where the file names them."""
        ...
