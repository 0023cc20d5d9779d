"""Bytes that are a baseline JPEG: Huffman codes, blocks, stuffing and markers as an automaton."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.decoding.bits import after_all_bits, after_byte, last_axes
from jaxgen.decoding.code_trees import NO_CODE, Forest
from jaxgen.decoding.file_tokens import NEVER

__all__ = ["JpegGrammar", "JpegState"]

# What the next byte is: of the fixed head, a byte of coded blocks, the zero behind a coded 0xFF, the first or second byte of a
# marker, nothing more; or the path has left the grammar.
HEAD, SCAN, STUFFED, MARKER, CODE, END, DEAD = range(7)

END_OF_BLOCK, SIXTEEN_ZEROS = 0x00, 0xF0


class JpegState(NamedTuple):
    """Where a file stands, whole bytes read.

    Attributes:
      phase: what the next byte is.
      head: bytes of the head that are read.
      mcu, block: units that are whole, and blocks of the next one that are.
      coefficient: that the next code is about; 0 is the DC one, 64 when only `bits` of the last one are missing.
      node: of the Huffman tree, where a code's first bits are read.
      bits: of a coefficient's value that are still to come.
      full: all blocks up to the next marker are there, and what is left of the byte is ones.
    """

    phase: Int[Array, "*s"]
    head: Int[Array, "*s"]
    mcu: Int[Array, "*s"]
    block: Int[Array, "*s"]
    coefficient: Int[Array, "*s"]
    node: Int[Array, "*s"]
    bits: Int[Array, "*s"]
    full: Bool[Array, "*s"]


@dataclasses.dataclass(frozen=True)
class JpegGrammar:
    """The `FileGrammar` of the files of one size and one set of tables (ITU-T T.81, annexes B, F and F.1.2.3).

    A table of its states would have some 10^5 a block. Instead a state says how far the bits have come, and a byte is eight
    steps in Huffman trees. DC values may leave their range, which decoders clip.

    Attributes:
      tables: Huffman tables: how many codes have 1 to 16 bits, and the codes' symbols in order. They are those of annex K, whose
        shortest way to end a file from anywhere has no byte 0xFF in it, which would need another.
      blocks: of an MCU, as (index of the DC table, index of the AC table).
      mcus: minimum coded units of the image.
      restart: MCUs between restart markers; 0 is no markers.
      head: bytes that all files begin with.

    Raises:
      ValueError: tables with more codes than there can be.
    """

    tables: tuple[tuple[tuple[int, ...], bytes], ...]
    blocks: tuple[tuple[int, int], ...]
    mcus: int
    restart: int = 0
    head: bytes = b""

    def __post_init__(self):
        self._trees  # noqa: B018  raises

    @property
    def shortest(self) -> int:
        """See `FileGrammar`."""
        return len(self.head) + int(self._tail[0])

    @functools.cached_property
    def _trees(self) -> Int[np.ndarray, "t n 2"]:
        """Children of all nodes of all trees; one that is a symbol s is -1 - s."""
        trees = [_tree(counts, symbols) for counts, symbols in self.tables]
        children = np.full((len(trees), max(map(len, trees)), 2), NO_CODE, np.int32)
        for i, tree in enumerate(trees):
            children[i, : len(tree)] = tree
        return children

    @functools.cached_property
    def _rest(self) -> Int[np.ndarray, "p n 65"]:
        """Fewest bits from a node, for coefficient k, to the end of a block, by kind of block: DC then AC trees of each."""
        children = self._trees
        kinds = sorted(set(self.blocks))
        rest = np.full((2 * len(kinds), children.shape[1], 65), NEVER, np.int64)
        for i, (dc, ac) in enumerate(kinds):
            rest[2 * i + 1, :, 64] = 0
            for k in range(63, 0, -1):
                self._fill(rest[2 * i + 1], children[ac], k, rest[2 * i + 1, 0])
            self._fill(rest[2 * i], children[dc], 0, rest[2 * i + 1, 0])
        return np.minimum(rest, NEVER).astype(np.int32)

    @staticmethod
    def _fill(rest, tree, k: int, after) -> None:
        """The fewest bits for coefficient k, of all nodes; children have larger numbers."""
        for node in range(len(tree) - 1, -1, -1):
            for child in tree[node]:
                if child >= 0:
                    bits = rest[child, k]
                elif child == NO_CODE:
                    continue
                else:
                    size, following = _read(-1 - int(child), k)
                    bits = NEVER if following is None else size + after[following]
                rest[node, k] = min(rest[node, k], 1 + bits)

    @functools.cached_property
    def _unit(self) -> Int[np.ndarray, "m+1"]:
        """Fewest bits of the blocks of an MCU from each one on."""
        kinds = sorted(set(self.blocks))
        least = [self._rest[2 * kinds.index(pair), 0, 0] for pair in self.blocks]
        return np.append(np.cumsum(least[::-1])[::-1], 0).astype(np.int32)

    @functools.cached_property
    def _tail(self) -> Int[np.ndarray, "i+1"]:
        """Fewest bytes of the intervals from each one on, their markers included."""
        every = self.restart or self.mcus
        sizes = [min(every, self.mcus - start) for start in range(0, self.mcus, every)]
        least = [-(-size * int(self._unit[0]) // 8) + 2 for size in sizes]
        return np.append(np.cumsum(least[::-1])[::-1], 0).astype(np.int32)

    def begin(self, shape: tuple[int, ...]) -> JpegState:
        """See `FileGrammar`."""
        zero = jnp.zeros(shape, jnp.int32)
        phase = jnp.full(shape, HEAD if self.head else SCAN, jnp.int32)
        return JpegState(phase, *[zero] * 6, jnp.zeros(shape, bool))

    def move(self, state: JpegState, byte: Int[Array, "*s"]) -> JpegState:
        """See `FileGrammar`."""
        s = JpegState(*jnp.broadcast_arrays(*state, byte)[:-1])
        return self._close(s, after_byte(self._step, s, byte), byte)

    def moves(self, state: JpegState) -> JpegState:
        """See `FileGrammar`."""
        axes = last_axes(self.begin(()))
        before = jax.tree.map(jnp.expand_dims, state, axes)
        read = after_all_bits(self._step, after_all_bits(self._step, before, axes, count=6), axes, first=6, count=2)
        return self._close(before, read, jnp.arange(256))

    def _close(self, s: JpegState, read: JpegState, byte: Int[Array, "*s"]) -> JpegState:
        """The state after a byte, from the one before it and the one after its bits, which are of coded blocks or of nothing."""
        phase = jnp.where(byte == 0xFF, STUFFED, jnp.where(read.full, MARKER, SCAN))
        read = read._replace(phase=jnp.where(read.phase == DEAD, DEAD, phase))
        head, after = s.head + (s.phase == HEAD), jnp.where(s.full, MARKER, SCAN)
        phase = jnp.select(
            [s.phase == HEAD, s.phase == STUFFED, s.phase == MARKER, s.phase == CODE],
            [jnp.where(head == len(self.head), SCAN, HEAD), after, CODE, jnp.where(s.mcu == self.mcus, END, SCAN)],
            DEAD,
        )
        phase = jnp.where(byte == self._due(s), phase, DEAD)
        forced = s._replace(phase=phase, head=head, full=s.full & (s.phase != CODE))
        return JpegState(*(jnp.where(s.phase == SCAN, x, y) for x, y in zip(read, forced)))

    def _due(self, s: JpegState) -> Int[Array, "*s"]:
        """The one byte that may follow, outside of the coded blocks; none behind the file."""
        head = jnp.asarray(np.frombuffer(self.head + b"\0", np.uint8), jnp.int32)[s.head]
        marks = (s.mcu - 1) // self.restart if self.restart else 0
        code = jnp.where(s.mcu == self.mcus, 0xD9, 0xD0 + marks % 8)
        phases = [s.phase == HEAD, s.phase == STUFFED, s.phase == MARKER, s.phase == CODE]
        return jnp.select(phases, [head, jnp.zeros_like(head), jnp.full_like(head, 0xFF), code], -1)

    def _kind(self, block) -> tuple[Int[Array, "*s"], Int[Array, "*s"], Int[Array, "*s"]]:
        """(kind, DC table, AC table) of a block of an MCU."""
        kinds = sorted(set(self.blocks))
        table = jnp.asarray([(kinds.index(pair), *pair) for pair in self.blocks], jnp.int32)[block]
        return table[..., 0], table[..., 1], table[..., 2]

    def _step(self, i, s: JpegState, bit: Int[Array, "*s"]) -> JpegState:
        """The state after a bit, which is of a value, of a code, or behind all of them; one that breaks a code is `DEAD`."""
        _, dc, ac = self._kind(s.block)
        first = s.coefficient == 0
        child = jnp.asarray(self._trees)[jnp.where(first, dc, ac), s.node, bit]
        in_value, in_code = ~s.full & (s.bits > 0), ~s.full & (s.bits == 0)
        read = in_code & (child < 0)
        symbol = jnp.where(child < 0, -1 - child, 0)
        size, following, valid = _read(symbol, s.coefficient)
        broken = jnp.where(s.full, bit == 0, in_code & ((child == NO_CODE) | (read & ~valid)))
        bits = jnp.where(read, size, s.bits - in_value)
        coefficient = jnp.where(read, following, s.coefficient)
        node = jnp.where(in_code & ~read, jnp.maximum(child, 0), 0)
        whole = ~s.full & (bits == 0) & (coefficient == 64)
        unit = whole & (s.block == len(self.blocks) - 1)
        mcu = s.mcu + unit
        every = self.restart or self.mcus
        return s._replace(
            phase=jnp.where(broken, DEAD, s.phase),
            mcu=mcu,
            block=jnp.where(unit, 0, s.block + whole),
            coefficient=jnp.where(whole, 0, coefficient),
            node=node,
            bits=jnp.where(broken, 0, bits),
            full=s.full | (unit & ((mcu % every == 0) | (mcu == self.mcus))),
        )

    def least(self, state: JpegState) -> Int[Array, "*s"]:
        """See `FileGrammar`."""
        s, every, unit = state, self.restart or self.mcus, jnp.asarray(self._unit)
        kind = self._kind(s.block)[0]
        bits = s.bits + jnp.asarray(self._rest)[2 * kind + (s.coefficient > 0), s.node, s.coefficient]
        interval = jnp.maximum(s.mcu - s.full, 0) // every
        units = jnp.minimum((interval + 1) * every, self.mcus) - s.mcu - 1
        bits = jnp.where(s.full, 0, jnp.minimum(bits, NEVER) + unit[s.block + 1] + units * int(self._unit[0]))
        tail = jnp.asarray(self._tail)[jnp.minimum(interval + 1, len(self._tail) - 1)]
        scan = -(-bits // 8) + (s.phase == STUFFED) + 2 - (s.phase == CODE) + tail + len(self.head) - s.head
        return jnp.select([s.phase == DEAD, s.phase == END], [NEVER, 0], scan)


def _read(symbol, k):
    """What a symbol says about coefficient k: (bits of its value, the coefficient after it), and of arrays whether it may stand.

    Of an integer that may not stand, the coefficient is None.
    """
    if isinstance(symbol, int):
        size, following = (symbol & 15, k + (symbol >> 4) + 1) if k else (symbol, 1)
        if k and symbol == END_OF_BLOCK:
            following = 64
        return size, None if following > 64 - (k > 0 and symbol == SIXTEEN_ZEROS) else following
    first = k == 0
    following = jnp.where(first, 1, jnp.where(symbol == END_OF_BLOCK, 64, k + (symbol >> 4) + 1))
    valid = following <= 64 - (~first & (symbol == SIXTEEN_ZEROS))
    return jnp.where(first, symbol, symbol & 15), jnp.minimum(following, 64), valid


def _tree(counts: tuple[int, ...], symbols: bytes) -> list[list[int]]:
    """Children of each node of a Huffman table (T.81, annex C): a node's number, -1 - symbol, or `NO_CODE`.

    Raises:
      ValueError: more codes than there can be.
    """
    leaves, code, at = [], 0, 0
    for length, count in enumerate(counts, start=1):
        for symbol in symbols[at : at + count]:
            if code >> length:
                raise ValueError(f"counts={counts}: more codes of {length} bits than there are")
            leaves.append((format(code, f"0{length}b"), symbol, 0))
            code += 1
        at += count
        code <<= 1
    forest = Forest()
    forest.grow(leaves)
    return forest.children
