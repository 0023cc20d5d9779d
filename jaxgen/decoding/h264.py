"""Bytes that are the units of an H.264 stream: their headers, their number, and the bytes that may not follow each other."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.decoding.file_tokens import NEVER

__all__ = ["H264Grammar", "H264State"]

DEAD = -1  # of `unit`: the path has left the grammar
ESCAPED = 3  # of `zeros`: a 3 stands behind two of them
START = 3  # bytes of a start code, 0 0 1


class H264State(NamedTuple):
    """Where a stream stands.

    Attributes:
      unit: that the next byte is of; -1 where the path has left the grammar.
      at: bytes of the unit's header that are read.
      filled: but for zeros, the unit may end here: behind its header, or behind the last escaped zeros, there is something else.
      zeros: the last bytes that were 0, at most two; 3 behind two of them and a 3.
    """

    unit: Int[Array, "*s"]
    at: Int[Array, "*s"]
    filled: Bool[Array, "*s"]
    zeros: Int[Array, "*s"]


@dataclasses.dataclass(frozen=True)
class H264Grammar:
    """The `FileGrammar` of a stream's units (ITU-T H.264, 7.4.1 and annex B): each begins with its own header, has something
    behind it and no zero at its end; 0 0 1 stands between two and nowhere
    else, 0 0 0 and 0 0 2 nowhere, and behind 0 0 3 comes 0 to 3.

    So a reader finds all pictures of the clip in their order. Which bits a unit may have behind its header depends on all that
    was decoded before, and is not checked: readers make up what they cannot decode, or leave a picture out.

    Attributes:
      headers: whole bytes that each unit begins with, its start code left out; none ends with a zero.

    Raises:
      ValueError: no units, or a header that ends with a zero.
    """

    headers: tuple[bytes, ...]

    def __post_init__(self):
        if not self.headers or any(header[-1:] in (b"", b"\0") for header in self.headers):
            raise ValueError(f"headers={self.headers[:3]}: expected some that do not end with a zero")

    @property
    def shortest(self) -> int:
        """See `FileGrammar`."""
        return int(self._tail[0])

    @functools.cached_property
    def _tail(self) -> Int[np.ndarray, "n+1"]:
        """Fewest bytes of the units from each one on."""
        sizes = [len(header) + 1 + START * (i > 0) for i, header in enumerate(self.headers)]
        return np.append(np.cumsum(sizes[::-1])[::-1], 0).astype(np.int32)

    @functools.cached_property
    def _table(self) -> tuple[Int[np.ndarray, "n m"], Int[np.ndarray, "n"]]:
        """(headers, their sizes)"""
        sizes = np.array([len(header) for header in self.headers], np.int32)
        table = np.zeros((len(sizes), sizes.max()), np.int32)
        for row, header in zip(table, self.headers):
            row[: len(header)] = list(header)
        return table, sizes

    def begin(self, shape: tuple[int, ...]) -> H264State:
        """See `FileGrammar`."""
        zero = jnp.zeros(shape, jnp.int32)
        return H264State(zero, zero, jnp.zeros(shape, bool), zero)

    def move(self, state: H264State, byte: Int[Array, "*s"]) -> H264State:
        """See `FileGrammar`."""
        s, count = state, len(self.headers)
        table, sizes = map(jnp.asarray, self._table)
        row = jnp.clip(s.unit, 0, count - 1)
        heading, last = s.at < sizes[row], s.unit == count - 1
        due = table[row, jnp.minimum(s.at, table.shape[1] - 1)]

        starts = ~heading & (s.zeros == 2) & (byte == 1) & s.filled & ~last
        fits = jnp.where(s.zeros == 2, byte >= 3, (s.zeros != ESCAPED) | (byte <= 3)) | starts
        right = (s.unit != DEAD) & jnp.where(heading, byte == due, fits)

        escape, zero = (s.zeros == 2) & (byte == 3), byte == 0
        zeros = jnp.where(escape, ESCAPED, jnp.where(zero, s.zeros % ESCAPED + 1, 0))
        return H264State(
            unit=jnp.where(right, s.unit + starts, DEAD),
            at=jnp.where(starts, 0, s.at + heading),
            filled=~starts & ~escape & (s.filled | (~heading & ~zero)),
            zeros=jnp.where(starts | heading, 0, zeros),
        )

    def least(self, state: H264State) -> Int[Array, "*s"]:
        """See `FileGrammar`."""
        s, sizes, tail = state, jnp.asarray(self._table[1]), jnp.asarray(self._tail)
        count = len(self.headers)
        row = jnp.clip(s.unit, 0, count - 1)
        # Zeros may be those of the next start code; at a stream's end something must come behind them.
        serve = s.filled & (s.zeros > 0) & (s.zeros < ESCAPED) & (row < count - 1)
        closed = serve | (s.filled & (s.zeros == 0))
        header = sizes[row] - s.at
        found = header + ~closed + tail[row + 1] - jnp.where(serve, s.zeros, 0)
        return jnp.where(s.unit == DEAD, NEVER, found)
