"""Files as tokens of one or more bytes: from a grammar of bytes to what tokens may follow, within a length."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.decoding.bits import last_axes

__all__ = ["NEVER", "FileGrammar", "FileState", "FileTokens", "widen"]

NEVER = 1 << 28  # more bytes than a file can have
OPEN, ENDED, DEAD = range(3)  # a file is being written, it is whole, or the path has left the grammar

PyTree = Any


class FileGrammar(Protocol):
    """Which bytes are a file. Hashable; its state is a pytree of arrays [*s], and more dimensions behind them.

    Attributes:
      shortest: bytes of the shortest file.
    """

    shortest: int

    def begin(self, shape: tuple[int, ...]) -> PyTree:
        """The state before the first byte, in arrays of `shape`."""

    def move(self, state: PyTree, byte: Int[Array, "*s"]) -> PyTree:
        """The state after a byte."""

    def moves(self, state: PyTree) -> PyTree:
        """The states after each of the 256 bytes, in arrays [*s, 256]."""

    def least(self, state: PyTree) -> Int[Array, "*s"]:
        """Fewest bytes with which a file can be ended: 0 where it is whole, at least `NEVER` where the path has left the grammar,
        and from there on. One of the bytes that may follow makes it less by one, as long as it is neither."""


class FileState(NamedTuple):
    """Where a row of tokens stands.

    Attributes:
      phase: `OPEN`, `ENDED` or `DEAD`.
      left: tokens that may follow before the end.
      bytes: the grammar's state.
    """

    phase: Int[Array, "*s"]
    left: Int[Array, "*s"]
    bytes: PyTree


@dataclasses.dataclass(frozen=True)
class FileTokens:
    """The `Automaton` of files of at most `length` tokens, written with a vocabulary in which every byte is a token.

    A token may follow if the grammar takes all its bytes, and if as many tokens are left as the shortest end of the file has
    bytes, which can then be written byte by byte: so no row is ever stuck, and each ends as a whole file.

    Attributes:
      grammar: of the bytes.
      length: most tokens, `end` not counted.
      pieces: the bytes of each token from 0; those of the first 256 are themselves, and a piece without bytes is never allowed.
      vocab: v, tokens of the model; what is beyond `pieces` is never allowed.
      end: the token behind a file, for ever.

    Raises:
      ValueError: a length that no file has.
    """

    grammar: FileGrammar
    length: int
    pieces: tuple[bytes, ...]
    vocab: int
    end: int = 256

    def __post_init__(self):
        if self.length < self.grammar.shortest:
            raise ValueError(f"length={self.length}: the shortest file has {self.grammar.shortest} bytes")

    def begin(self, shape: tuple[int, ...]) -> FileState:
        """See `Automaton`."""
        left = jnp.full(shape, self.length, jnp.int32)
        return FileState(jnp.full(shape, OPEN, jnp.int32), left, self.grammar.begin(shape))

    def move(self, state: FileState, token: Int[Array, "*s"]) -> FileState:
        """See `Automaton`."""
        spelling, sizes = map(jnp.asarray, self._spelling)
        size = sizes[token]

        def one(i, bytes_):
            moved = self.grammar.move(bytes_, spelling[token, i])
            return jax.tree.map(lambda x, y: jnp.where(widen(i < size, x), x, y), moved, bytes_)

        bytes_ = one(0, state.bytes) if spelling.shape[1] == 1 else jax.lax.fori_loop(0, sizes.max(), one, state.bytes)
        whole = (state.phase == ENDED) | (self.grammar.least(state.bytes) == 0)
        goes_on = (state.phase == OPEN) & (size > 0) & (self.grammar.least(bytes_) < state.left)
        phase = jnp.where(token == self.end, jnp.where(whole, ENDED, DEAD), jnp.where(goes_on, OPEN, DEAD))
        return FileState(jnp.where(state.phase == DEAD, DEAD, phase), state.left - (size > 0), bytes_)

    def allowed(self, state: FileState) -> Bool[Array, "*s v"]:
        """See `Automaton`."""
        least, (where, known) = self._least_after(state.bytes), self._places
        fits = jnp.where(known, least[..., where], NEVER) < state.left[..., None]
        whole = (state.phase == ENDED) | (self.grammar.least(state.bytes) == 0)
        ends = whole[..., None] & (np.arange(self.vocab) == self.end)
        return (state.phase == DEAD)[..., None] | ends | (fits & (state.phase == OPEN)[..., None])

    @functools.cached_property
    def _spelling(self) -> tuple[Int[np.ndarray, "v n"], Int[np.ndarray, "v"]]:
        """(Bytes of each token, how many)."""
        sizes = np.array([*map(len, self.pieces), *[0] * (self.vocab - len(self.pieces))], np.int32)
        sizes[self.end] = 0
        table = np.zeros((self.vocab, sizes.max()), np.int32)
        for row, piece in zip(table, self.pieces):
            row[: len(piece)] = list(piece)
        return table, sizes

    @functools.cached_property
    def _levels(self) -> list[dict[bytes, int]]:
        """What tokens of two bytes and more begin with, by number of bytes from 2: the place of each beginning among its like."""
        starts = {piece[:n] for piece in self.pieces for n in range(2, len(piece) + 1)}
        found: list[dict[bytes, int]] = []
        for start in sorted(starts, key=lambda start: (len(start), start)):
            if len(found) < len(start) - 1:
                found.append({})
            found[-1][start] = len(found[-1])
        return found

    @functools.cached_property
    def _places(self) -> tuple[Int[np.ndarray, "v"], Bool[np.ndarray, "v"]]:
        """(Where `_least_after` says something of each token, whether it does)."""
        width = max((len(level) for level in self._levels), default=0)
        where, known = np.zeros(self.vocab, np.int32), np.zeros(self.vocab, bool)
        for token, piece in enumerate(self.pieces):
            if piece and token != self.end:
                n = len(piece)
                where[token] = piece[0] if n == 1 else 256 + width * (n - 2) + self._levels[n - 2][piece]
                known[token] = True
        return where, known

    def _least_after(self, bytes_: PyTree) -> Int[Array, "*s m"]:
        """`FileGrammar.least` after each byte, then after each of `_levels`: what tokens have in common is read once."""
        levels, axes = self._levels, last_axes(self.grammar.begin(()))

        def take(states, places):
            return jax.tree.map(lambda x, axis: jnp.take(x, places, axis), states, axes)

        first = self.grammar.moves(bytes_)
        found = [self.grammar.least(first)]
        if levels:
            width = max(map(len, levels))
            parents, last = np.zeros((2, len(levels), width), np.int32)
            for i, level in enumerate(levels):
                for start, place in level.items():
                    parents[i, place] = start[0] if i == 0 else levels[i - 1][start[:-1]]
                    last[i, place] = start[-1]

            def deeper(states, step):
                states = self.grammar.move(take(states, step[0]), step[1])
                return states, self.grammar.least(states)

            states = self.grammar.move(take(first, parents[0]), jnp.asarray(last[0]))
            _, rest = jax.lax.scan(deeper, states, (jnp.asarray(parents[1:]), jnp.asarray(last[1:])))
            found += [self.grammar.least(states), *rest]
        return jnp.concatenate(found, axis=-1)


def widen(condition: Bool[Array, "*s"], like: Array) -> Array:
    """With as many dimensions as `like` has."""
    return condition.reshape(condition.shape + (1,) * (like.ndim - condition.ndim))
