"""Byte pairs: a vocabulary of bytes and of the pairs that are frequent in some files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

__all__ = ["BYTES", "END", "Pairs", "learn_pairs"]

END = 256  # the token behind a file's last byte
_BORDER = -1  # between files, while pairs are learnt


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Bytes <-> tokens: a byte is its own token, and each merge adds one, which stands for two earlier ones (byte-pair encoding;
    Sennrich et al. 2016, arXiv:1508.07909).

    Merges are applied in the order in which they were learnt, from left to right. No merges leave the bytes as they are.

    Attributes:
      merges: the two tokens of each merge, one merge after another. The i-th makes the token `END` + 1 + i.

    Raises:
      ValueError: an odd number of tokens, or a merge of tokens that are none before it.

    Example:
      >>> pairs = Pairs((97, 98))                        # "ab" becomes 257
      >>> pairs.encode(b"abba").tolist()
      [257, 98, 97]
    """

    merges: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.merges) % 2:
            raise ValueError(f"merges: {len(self.merges)} tokens, expected two for each merge")
        for i, token in enumerate(self.merges):
            if not 0 <= token <= END + i // 2 or token == END:
                raise ValueError(f"merges[{i}]={token}: merge {i // 2} joins bytes and the tokens of merges before it")

    def __len__(self) -> int:
        return len(self.merges) // 2

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of each token, `END`'s none."""
        found = [bytes([i]) for i in range(END)] + [b""]
        for i in range(len(self)):
            left, right = self.merges[2 * i : 2 * i + 2]
            found.append(found[left] + found[right])
        return tuple(found)

    def encode(self, data: bytes) -> Int[np.ndarray, "l"]:
        """The tokens of some bytes."""
        tokens = np.frombuffer(data, np.uint8).astype(np.int32)
        for i in range(len(self)):
            tokens = _merge(tokens, self.merges[2 * i], self.merges[2 * i + 1], END + 1 + i)
        return tokens

    def decode(self, tokens: Int[np.ndarray, "l"]) -> bytes:
        """The bytes of tokens; those that no merge made have none."""
        return b"".join(self.pieces[token] for token in tokens if token < len(self.pieces))


BYTES = Pairs()  # nothing but bytes


def learn_pairs(files: Iterable[bytes], count: int) -> Pairs:
    """The merges of the most frequent pairs in some files, one after another; of equally frequent ones the smaller comes first.

    There are fewer than `count` where no pair is left that comes twice.
    """
    parts = [np.append(np.frombuffer(file, np.uint8).astype(np.int32), _BORDER) for file in files]
    tokens, merges = np.concatenate([*parts, np.zeros(0, np.int32)]), []
    for token in range(END + 1, END + 1 + count):
        left, right = tokens[:-1], tokens[1:]
        inside = (left >= 0) & (right >= 0)
        counts = np.bincount(left[inside] * token + right[inside], minlength=1)
        best = int(counts.argmax())  # the first of the most frequent
        if counts[best] < 2:
            break
        merges += divmod(best, token)
        tokens = _merge(tokens, *divmod(best, token), token)
    return Pairs(tuple(merges))


def _merge(tokens: Int[np.ndarray, "l"], left: int, right: int, new: int) -> Int[np.ndarray, "m"]:
    """Each pair as one token."""
    found = np.flatnonzero((tokens[:-1] == left) & (tokens[1:] == right))
    if left == right and len(found):  # of pairs that overlap, every other one, from the left
        starts = np.append(True, np.diff(found) > 1)
        run = np.flatnonzero(starts)[np.cumsum(starts) - 1]
        found = found[(np.arange(len(found)) - run) % 2 == 0]
    tokens = tokens.copy()
    tokens[found] = new
    return np.delete(tokens, found + 1)
