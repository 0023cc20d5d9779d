"""Bytes that are a clip's H.264 stream: units, slices, macroblocks and their CAVLC codes as an automaton."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.decoding import cavlc
from jaxgen.decoding.bits import after_all_bits, after_byte, last_axes
from jaxgen.decoding.code_trees import NO_CODE, Forest
from jaxgen.decoding.file_tokens import NEVER, widen

__all__ = ["H264Grammar", "H264State"]

# What the next bit is of. Codes: macroblocks to skip, a macroblock's kind, motion, which blocks there are, how colours are
# predicted, the quantiser's change; of a block its number of coefficients, zeros in front of them all and of each, a value's
# size. Bits as they are: signs, a value's rest. Then a slice's header, its last one, the zeros behind it; a start code; nothing
# more; or the path has left the grammar.
SKIP, KIND, ACROSS, DOWN, PATTERN, COLOUR, CHANGE, TOKEN, ZEROS, RUN, SIZE, SIGNS, REST, HEADER, STOP, PADDING = range(16)
START, END, DEAD = range(16, 19)

START_CODE = (0, 0, 1)
ESCAPED = 3  # of `zeros`: a 3 stands behind two of them
MOTION = 1023  # most quarters of a pixel by which motion differs from what is expected, in each direction
CELLS = 24  # blocks of 4 x 4 numbers in a macroblock: 16 of brightness, 4 of each colour
BLOCKS = 27  # in their order: the constant parts of brightness, 16 of it, the constant parts of two colours, 4 of each
MOST = (16, 15, 4)  # coefficients of a block
TOKEN_BITS = 6  # of a block without coefficients, at most


class H264State(NamedTuple):
    """Where a stream stands, whole bytes read.

    Attributes:
      element: what the next bit is of.
      unit: a slice, that the next byte is of.
      node: of a code's tree; bits of a header or bytes of a start code that are read; bits as they are that are still to come.
      zeros: the last bytes that were 0, at most two; 3 behind two of them and a 3, which stands for six bits that are 0.
      mb: macroblocks of the slice that are whole.
      intra: the macroblock is predicted from its own picture.
      pattern: which of its blocks have coefficients, see `cavlc.INTER_PATTERNS`.
      block: one of `BLOCKS`.
      total: its coefficients.
      left: values, then places of coefficients that are still to come.
      suffix: bits that a value has as they are, mostly.
      first: what is added to the first value, as it cannot be a one.
      prefix, value: the parts of a value that are read.
      empty: zeros that are to be shared out.
      counts: coefficients of each cell of the slice's macroblocks.
    """

    element: Int[Array, "*s"]
    unit: Int[Array, "*s"]
    node: Int[Array, "*s"]
    zeros: Int[Array, "*s"]
    mb: Int[Array, "*s"]
    intra: Int[Array, "*s"]
    pattern: Int[Array, "*s"]
    block: Int[Array, "*s"]
    total: Int[Array, "*s"]
    left: Int[Array, "*s"]
    suffix: Int[Array, "*s"]
    first: Int[Array, "*s"]
    prefix: Int[Array, "*s"]
    value: Int[Array, "*s"]
    empty: Int[Array, "*s"]
    counts: Int[Array, "*s c"]


class _Roots(NamedTuple):
    """Numbers of the trees' roots.

    Attributes:
      skip: by macroblocks that are left.
      kind: by whether the picture is the first, and the neighbours that there are: 1 to the left, 2 above, 4 between these.
      motion, pattern, change, size: there is one.
      colour: by neighbours.
      token: by kind of code and most coefficients.
      zeros: by most coefficients and their number.
      run: by zeros and coefficients that are left.
    """

    skip: Int[np.ndarray, "m"]
    kind: Int[np.ndarray, "2 8"]
    motion: int
    pattern: int
    colour: Int[np.ndarray, "8"]
    change: int
    token: Int[np.ndarray, "5 3"]
    zeros: Int[np.ndarray, "3 17"]
    run: Int[np.ndarray, "17 17"]
    size: int


@dataclasses.dataclass(frozen=True)
class H264Grammar:
    """The `FileGrammar` of streams of a narrow baseline profile (ITU-T H.264, 7.3, 7.4.1, 9.1, 9.2 and annex B), down to the last
    bit: what it takes, a decoder reads without an error.

    The first picture has macroblocks that are predicted as a whole from their own picture (Intra 16 x 16), all others these and
    macroblocks of one motion from the picture before (P 16 x 16), or none. The quantiser never changes, and slices begin with
    headers that are told. Predictions are from neighbours of the same slice alone.

    `least` is what surely suffices, a few bytes more than what is needed: blocks without coefficients cost the most that they can
    there, and every two bytes of a slice behind its header an escape. So a stream ends before the room for it does.

    Attributes:
      headers: the bits that each unit begins with, as a text of 0 and 1: its kind and its slice's header, no start code.
      mbs: macroblocks of a picture.
      across: of them in a row.
      restart: macroblocks of a slice, but of a picture's last one; 0 is all.

    Raises:
      ValueError: no units, or not those of whole pictures; a header of less than a byte, or with two zero bytes.
    """

    headers: tuple[str, ...]
    mbs: int
    across: int
    restart: int = 0

    def __post_init__(self):
        slices = -(-self.mbs // (self.restart or self.mbs))
        if not self.headers or len(self.headers) % slices:
            raise ValueError(f"headers: {len(self.headers)} of them, expected a multiple of {slices}, the slices of a picture")
        for header in self.headers:
            if len(header) < 8 or header.strip("01") or b"\0\0" in _bytes(header):
                raise ValueError(f"headers: {header!r}, expected bits, at least 8, without two zero bytes")

    @functools.cached_property
    def _units(self) -> dict[str, Int[np.ndarray, "n"]]:
        """Of each unit: whether it is of the first picture, the number of its first macroblock and how many it has, its header's
        bits, and the zero bytes at the end of its header's whole ones."""
        every = self.restart or self.mbs
        firsts = np.resize(np.arange(0, self.mbs, every), len(self.headers)).astype(np.int32)
        whole = [_bytes(header) for header in self.headers]
        return dict(
            intra=np.array([data[0] & 31 == 5 for data in whole], np.int32),
            first=firsts,
            size=np.minimum(every, self.mbs - firsts).astype(np.int32),
            bits=np.array([len(header) for header in self.headers], np.int32),
            zeros=np.array([len(data) - len(data.rstrip(b"\0")) for data in whole], np.int32),
        )

    @functools.cached_property
    def _forest(self) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, "n"], _Roots]:
        """(Children, fewest bits, roots) of all trees."""
        forest, most = Forest(), max(self._units["size"])
        skips = self._skips
        token = [[forest.grow(cavlc.token_leaves(kind, n)) for n in MOST[:2]] for kind in range(4)]
        colour_token = forest.grow(cavlc.token_leaves(4, MOST[2]))
        zeros, run = np.zeros((3, 17), np.int32), np.zeros((17, 17), np.int32)
        for i, n in enumerate(MOST):
            for total in range(1, n):
                zeros[i, total] = forest.grow(cavlc.zeros_leaves(total, n))
        for empty in range(1, 16):
            for left in range(1, 16):
                run[empty, left] = forest.grow(cavlc.runs_leaves(empty, left))
        roots = _Roots(
            skip=np.array([0, *(forest.grow(_skip_choices(n, skips)) for n in range(1, most + 1))], np.int32),
            kind=np.array([[forest.grow(_kind_leaves(p, near)) for near in range(8)] for p in (True, False)], np.int32),
            motion=forest.grow((cavlc.signed(i), 0, 0) for i in range(-MOTION, MOTION + 1)),
            pattern=forest.grow((cavlc.number(i), x, _blocks_rest(x)) for i, x in enumerate(cavlc.INTER_PATTERNS)),
            colour=np.array([forest.grow(_colour_leaves(near)) for near in range(8)], np.int32),
            change=forest.grow([("1", 0, 0)]),
            token=np.array([*([*row, 0] for row in token), [0, 0, colour_token]], np.int32),
            zeros=zeros,
            run=run,
            size=forest.grow(("0" * i + "1", i, 0) for i in range(16)),
        )
        return np.array(forest.children, np.int32), np.array(forest.rest, np.int32), roots

    @functools.cached_property
    def _skips(self) -> list[int]:
        """Fewest bits of a predicted slice with so many macroblocks to come."""
        found = [0]
        for n in range(1, max(self._units["size"]) + 1):
            found.append(min(len(code) + after for code, _, after in _skip_choices(n, found)))
        return found

    @functools.cached_property
    def _tail(self) -> Int[np.ndarray, "n+1"]:
        """Bytes that end the units from each one on, with their start codes."""
        units = self._units
        empty = len(START_CODE) + _bytes_rest(units["bits"] // 8, self._body, units["zeros"])
        return np.append(np.cumsum(empty[::-1])[::-1], 0).astype(np.int32)

    @property
    def _body(self) -> Int[np.ndarray, "n"]:
        """Fewest bits of each unit behind its header's whole bytes."""
        units = self._units
        own = np.array([_intra_rest(size) if intra else self._skips[size] for intra, size in zip(units["intra"], units["size"])])
        return units["bits"] % 8 + own + 1

    @property
    def shortest(self) -> int:
        """See `FileGrammar`."""
        return int(self._tail[0]) - len(START_CODE)

    def begin(self, shape: tuple[int, ...]) -> H264State:
        """See `FileGrammar`."""
        zero = jnp.zeros(shape, jnp.int32)
        counts = jnp.zeros((*shape, CELLS * max(self._units["size"])), jnp.int32)
        return H264State(jnp.full(shape, HEADER, jnp.int32), *[zero] * 14, counts)

    def move(self, state: H264State, byte: Int[Array, "*s"]) -> H264State:
        """See `FileGrammar`."""
        fields = jnp.broadcast_arrays(*state[:-1], byte)
        counts = jnp.broadcast_to(state.counts, (*fields[0].shape, state.counts.shape[-1]))
        s, byte = H264State(*fields[:-1], counts), fields[-1]
        escape = (s.zeros == 2) & (byte == 3)
        step = functools.partial(self._step, most=jnp.where(escape, 6, 8))
        return self._close(s, after_byte(step, s, jnp.where(escape, 0, byte)), byte)

    def moves(self, state: H264State) -> H264State:
        """See `FileGrammar`."""
        axes = last_axes(self.begin(()))
        before = jax.tree.map(jnp.expand_dims, state, axes)
        six = after_all_bits(self._step, before, axes, count=6)
        read = after_all_bits(self._step, six, axes, first=6, count=2)
        # Behind an escape the six bits that are read are zeros.
        escaped = jax.tree.map(lambda x, axis: jax.lax.slice_in_dim(x, 0, 1, axis=axis), six, axes)
        escape = (before.zeros == 2) & (jnp.arange(256) == 3)
        read = jax.tree.map(lambda x, y: jnp.where(widen(escape, x), x, y), escaped, read)
        return self._close(before, read, jnp.arange(256))

    def _step(self, i, s: H264State, bit: Int[Array, "*s"], *, most: int | Int[Array, "*s"] = 8) -> H264State:
        """The state after bit i of a byte: of the first `most`, but for six that were read with an escape, and of no start code.

        Behind two zeros a 3 says that the next six bits are zeros, and the next byte has the two behind them.
        """
        active = (s.element != START) & (i >= jnp.where(s.zeros == ESCAPED, 6, 0)) & (i < most)
        return jax.tree.map(lambda x, y: jnp.where(widen(active, x), x, y), self._bit(s, bit), s)

    def _close(self, before: H264State, s: H264State, byte: Int[Array, "*s"]) -> H264State:
        """The state after a byte, from the one before it and the one after its bits."""
        started, escape, escaped = before.element == START, (s.zeros == 2) & (byte == 3), s.zeros == ESCAPED
        wrong = jnp.where(started, byte != jnp.asarray(START_CODE)[jnp.minimum(before.node, 2)], False)
        wrong |= ~started & (((s.zeros == 2) & (byte < 3)) | (escaped & (byte > 3)))
        whole = (s.element == PADDING) & ~escape
        last = s.unit == len(self.headers) - 1
        begins = started & (s.node == 2)
        element = jnp.select([wrong | (s.element == END), whole & last, whole, begins], [DEAD, END, START, HEADER], s.element)
        zeros = jnp.where(escape, ESCAPED, jnp.where(byte == 0, jnp.where(escaped, 1, s.zeros + 1), 0))
        return s._replace(
            element=jnp.where(before.element == DEAD, DEAD, element),
            unit=s.unit + begins,
            node=jnp.where(started, jnp.where(begins, 0, s.node + 1), jnp.where(whole, 0, s.node)),
            zeros=jnp.where(started | whole, 0, zeros),
            mb=jnp.where(begins, 0, s.mb),
            counts=jnp.where(begins[..., None], 0, s.counts),
        )

    def least(self, state: H264State) -> Int[Array, "*s"]:
        """See `FileGrammar`."""
        s, units, body, tail = state, self._units, jnp.asarray(self._body), jnp.asarray(self._tail)
        heading = s.element == HEADER
        # Whole bytes of the header are what they are; its last bits are in a byte with what follows.
        whole = jnp.where(heading, jnp.asarray(units["bits"])[s.unit] // 8 - s.node // 8, 0)
        bits = jnp.where(heading, body[s.unit], self._bits(s)) + jnp.where(s.zeros == ESCAPED, 6, 0)
        zeros = jnp.where(whole > 0, jnp.asarray(units["zeros"])[s.unit], s.zeros % ESCAPED)
        found = _bytes_rest(whole, bits, zeros) + tail[s.unit + 1]
        return jnp.select([s.element == DEAD, s.element == END, s.element == START], [NEVER, 0, tail[s.unit + 1] - s.node], found)

    def _bits(self, s: H264State) -> Int[Array, "*s"]:
        """Fewest bits to the end of a slice whose header is read, its last one included."""
        _, rest, roots = self._forest
        units = self._units
        size, intra = jnp.asarray(units["size"])[s.unit], jnp.asarray(units["intra"])[s.unit]
        others = jnp.where(intra == 1, _intra_rest(size - s.mb - 1), jnp.asarray(self._skips)[jnp.maximum(size - s.mb - 1, 0)])
        later, first = (jnp.asarray(_BLOCKS_REST)[s.intra, s.pattern, at + 1] for at in (s.block, jnp.where(s.intra == 1, -1, 0)))
        code = jnp.asarray(rest)[jnp.clip(s.node, 0, len(rest) - 1)]
        where = jnp.asarray(_ZEROS_REST)[jnp.asarray(_MOST)[s.intra, s.block], s.total]

        sized = s.element == SIZE
        prefix = jnp.where(sized, s.node - roots.size, s.prefix)
        widest = _suffix_after(s, prefix, (1 << _extra(prefix, s.suffix)) - 1)
        own = jnp.where(sized, 1 + _extra(prefix, s.suffix), s.node)
        values = own + jnp.maximum(s.left - 1, 0) * (1 + widest)
        signs = s.node + jnp.where(s.left > 0, 1 + s.suffix + (s.left - 1) * 2, 0)
        found = jnp.select(
            [s.element == x for x in (KIND, ACROSS, DOWN, PATTERN, COLOUR, CHANGE, TOKEN, ZEROS, RUN, SIGNS)],
            [
                code,
                code + 2,
                code + 1,
                code,
                code + 1 + first,
                code + first,
                *[code + later] * 3,
                signs + where + later,
            ],
            values + where + later,
        )
        found = jnp.where(s.element == SKIP, code, found + others)
        return jnp.where(s.element == PADDING, 0, jnp.where(s.element == STOP, 0, found) + 1)

    def _bit(self, s: H264State, bit: Int[Array, "*s"]) -> H264State:
        """The state after a bit."""
        children, _, _ = self._forest
        texts, units = jnp.asarray(self._header_bits), self._units
        raw, heading = (s.element == SIGNS) | (s.element == REST), s.element == HEADER
        coded = s.element <= SIZE
        child = jnp.asarray(children)[jnp.where(coded, s.node, 0), bit]
        node = jnp.where(heading, s.node + 1, jnp.where(raw, s.node - 1, jnp.where(coded & (child >= 0), child, s.node)))
        due = jnp.select(
            [heading, s.element == STOP, s.element == PADDING],
            [texts[s.unit, jnp.minimum(s.node, texts.shape[1] - 1)], 1, 0],
            bit,
        )
        wrong = (bit != due) | (coded & (child == NO_CODE)) | (s.element >= START)
        value = jnp.where(s.element == REST, 2 * s.value + bit, s.value)
        done = (coded & (child < 0)) | (raw & (node == 0)) | (heading & (node == jnp.asarray(units["bits"])[s.unit]))
        after = self._after(s._replace(value=value), jnp.where(coded, -1 - child, 0))
        now = s._replace(node=node, value=value, element=jnp.where(s.element == STOP, PADDING, s.element))
        found = jax.tree.map(lambda x, y: jnp.where(widen(done, x), x, y), after, now)
        return found._replace(element=jnp.where(wrong, DEAD, found.element))

    def _after(self, s: H264State, symbol: Int[Array, "*s"]) -> H264State:
        """The state after an element, the symbol of which is read; see `_forest` for what symbols mean."""
        units, element = self._units, s.element
        most = jnp.asarray(MOST)[jnp.asarray(_MOST)[s.intra, s.block]]

        # A macroblock.
        skipped, kinded = element == SKIP, element == KIND
        intra = jnp.where(kinded, (symbol > 0).astype(jnp.int32), s.intra)
        colours, bright = (symbol - 1) // 4 % 3, jnp.where(symbol > 12, 15, 0)
        pattern = jnp.where(kinded, bright + 16 * colours, jnp.where(element == PATTERN, symbol, s.pattern))
        begins = element == CHANGE
        without = (element == PATTERN) & (pattern == 0)

        # A block: its coefficients, their values, their places.
        tokened, sized, rested = element == TOKEN, element == SIZE, element == REST
        total, ones = jnp.where(tokened, symbol // 4, s.total), symbol % 4
        suffix = jnp.where(tokened, ((total > 10) & (ones < 3)).astype(jnp.int32), s.suffix)
        first = jnp.where(tokened, jnp.where(ones < 3, 2, 0), s.first)
        extra = jnp.where(sized, _extra(symbol, s.suffix), 0)
        prefix = jnp.where(sized, symbol, s.prefix)
        valued = rested | (sized & (extra == 0))
        grown = _suffix_after(s, prefix, jnp.where(rested, s.value, 0))
        suffix, first = jnp.where(valued, grown, suffix), jnp.where(valued, 0, first)
        left = jnp.where(tokened, total - ones, s.left - valued)
        signs = jnp.where(tokened, ones, 0)
        values = (tokened & (total > 0) & (ones == 0)) | (((element == SIGNS) | valued) & (left > 0))
        placed = ((element == SIGNS) | valued) & (left == 0)
        places = placed & (total < most)
        empty = jnp.where(element == ZEROS, symbol, jnp.where(element == RUN, s.empty - symbol, s.empty))
        left = jnp.where(element == ZEROS, total - 1, jnp.where(element == RUN, left - 1, left))
        spread = (element == ZEROS) | (element == RUN)
        runs = spread & (empty > 0) & (left > 0)
        over = (placed & ~places) | (spread & ~runs) | (tokened & (total == 0))

        # What comes after it: a block, a macroblock, or the end of the slice.
        before = jnp.where(begins, jnp.where(intra == 1, -1, 0), s.block)
        following = jnp.asarray(_NEXT)[intra, pattern, before + 1]
        block = jnp.where(begins | over, following, s.block)
        finished = without | ((begins | over) & (following == BLOCKS))
        mb = s.mb + jnp.where(skipped, symbol, 0) + finished
        row = units["size"], units["intra"]
        size, first_picture = (jnp.asarray(x)[s.unit] for x in row)
        ends = (skipped | finished) & (mb == size)
        slice_begins = element == HEADER
        fresh = (finished & ~ends) | slice_begins
        element = jnp.select(
            [ends, fresh, skipped, kinded, element == ACROSS, element == DOWN, element == PATTERN, element == COLOUR]
            + [begins | over, signs > 0, extra > 0, values, places, runs],
            [STOP, jnp.where(first_picture == 1, KIND, SKIP), KIND, jnp.where(intra == 1, COLOUR, ACROSS), DOWN, PATTERN, CHANGE]
            + [CHANGE, TOKEN, SIGNS, REST, SIZE, ZEROS, RUN],
            DEAD,
        )

        cell = jnp.asarray(_CELLS)[s.block]
        place = jnp.where(tokened & (cell >= 0), s.mb * CELLS + cell, -1)
        counts = jnp.where(jnp.arange(s.counts.shape[-1]) == place[..., None], total[..., None], s.counts)
        new = s._replace(
            element=element,
            mb=mb,
            intra=intra,
            pattern=pattern,
            block=jnp.minimum(block, BLOCKS - 1),
            total=total,
            left=left,
            suffix=suffix,
            first=first,
            prefix=prefix,
            value=jnp.zeros_like(s.value),
            empty=empty,
            counts=counts,
        )
        raw = jnp.where(element == SIGNS, signs, extra)
        return new._replace(node=jnp.where((element == SIGNS) | (element == REST), raw, self._root(new)))

    def _root(self, s: H264State) -> Int[Array, "*s"]:
        """The tree of the element that comes."""
        _, _, roots = self._forest
        units = self._units
        intra, size = (jnp.asarray(units[name])[s.unit] for name in ("intra", "size"))
        column = (jnp.asarray(units["first"])[s.unit] + s.mb) % self.across
        left, above = (s.mb > 0) & (column > 0), s.mb >= self.across
        near = left + 2 * above + 4 * (above & (column > 0) & (s.mb > self.across))
        most = jnp.asarray(_MOST)[s.intra, s.block]
        choices = {
            SKIP: jnp.asarray(roots.skip)[jnp.clip(size - s.mb, 0, len(roots.skip) - 1)],
            KIND: jnp.asarray(roots.kind)[intra, near],
            ACROSS: roots.motion,
            DOWN: roots.motion,
            PATTERN: roots.pattern,
            COLOUR: jnp.asarray(roots.colour)[near],
            CHANGE: roots.change,
            TOKEN: jnp.asarray(roots.token)[jnp.where(most == 2, 4, self._expected(s, left, above)), most],
            ZEROS: jnp.asarray(roots.zeros)[most, s.total],
            RUN: jnp.asarray(roots.run)[jnp.clip(s.empty, 0, 15), jnp.clip(s.left, 0, 15)],
            SIZE: roots.size,
        }
        return jnp.select([s.element == x for x in choices], [jnp.broadcast_to(x, s.mb.shape) for x in choices.values()], 0)

    def _expected(self, s: H264State, left: Bool[Array, "*s"], above: Bool[Array, "*s"]) -> Int[Array, "*s"]:
        """Which table the neighbours' coefficients choose (9.2.1)."""
        found = []
        for table, steps, there in ((_LEFT, 1, left), (_ABOVE, self.across, above)):
            inside, cell = (jnp.asarray(x)[s.block] for x in table)
            inside = inside == 1
            place = (s.mb - jnp.where(inside, 0, steps)) * CELLS + cell
            count = jnp.take_along_axis(s.counts, jnp.clip(place, 0, s.counts.shape[-1] - 1)[..., None], -1)[..., 0]
            found.append((inside | there, count))
        (a_there, a), (b_there, b) = found
        both = (a + b + 1) >> 1
        expected = jnp.select([a_there & b_there, a_there, b_there], [both, a, b], 0)
        return (expected >= 2).astype(jnp.int32) + (expected >= 4) + (expected >= 8)

    @functools.cached_property
    def _header_bits(self) -> Int[np.ndarray, "n h"]:
        """The headers, filled up with zeros."""
        found = np.zeros((len(self.headers), max(map(len, self.headers))), np.int32)
        for row, header in zip(found, self.headers):
            row[: len(header)] = [int(bit) for bit in header]
        return found


def _skip_choices(n: int, after: Sequence[int]) -> list[tuple[str, int, int]]:
    """Leaves of the codes of macroblocks to skip, where n are left; `after` are the fewest bits of fewer ones."""
    motionless = 4  # bits of a macroblock that is not skipped: its kind, no change of motion, no blocks
    return [(cavlc.number(i), i, motionless + after[n - i - 1] if i < n else 0) for i in range(n + 1)]


def _kind_leaves(predicted: bool, near: int) -> list[tuple[str, int, int]]:
    """Leaves of a macroblock's kinds: 0 is predicted from the picture before, 1 to 24 are those of table 7-11."""
    needs = (2, 1, 0, 7)  # neighbours to be predicted from: those above, to the left, any, all
    found = [("1", 0, 3)] if predicted else []
    for i in range(1, 25):
        need, pattern = needs[(i - 1) % 4], (15 if i > 12 else 0) + 16 * ((i - 1) // 4 % 3)
        if near & need == need:
            found.append((cavlc.number(i + 5 * predicted), i, 2 + int(_BLOCKS_REST[1, pattern, 0])))
    return found


def _colour_leaves(near: int) -> list[tuple[str, int, int]]:
    """Leaves of how colours are predicted: from any neighbours, those to the left, above, or all."""
    return [(cavlc.number(i), i, 0) for i, need in enumerate((0, 1, 2, 7)) if near & need == need]


def _blocks_rest(pattern: int) -> int:
    """Fewest bits of a predicted macroblock behind its pattern: the quantiser's change and all blocks."""
    return int(pattern > 0) + int(_BLOCKS_REST[0, pattern, 1])


def _intra_rest(mbs):
    """Bits that are enough for macroblocks that are predicted from their own picture: their kind, colours, change, one block."""
    return mbs * (5 + 1 + 1 + TOKEN_BITS)


def _bytes_rest(whole, bits, zeros):
    """Bytes that are enough for whole ones and bits, of which every two bytes of zeros have an escape behind them; `zeros` such
    bytes are there already."""
    size = -(-bits // 8)
    return whole + size + (size + zeros) // 2


def _extra(prefix, suffix):
    """Bits of a value behind its prefix (9.2.2.1)."""
    return jnp.where(prefix == 15, 12, jnp.where((prefix == 14) & (suffix == 0), 4, suffix))


def _suffix_after(s: H264State, prefix, rest):
    """`H264State.suffix` after a value (9.2.2.1)."""
    code = (prefix << s.suffix) + rest + jnp.where((prefix == 15) & (s.suffix == 0), 15, 0) + s.first
    least = jnp.maximum(s.suffix, 1)
    return least + (((code + 2) >> 1 > (3 << (least - 1))) & (least < 6))


def _bytes(bits: str) -> bytes:
    """The whole bytes of a text of bits."""
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits) - 7, 8))


def _has(intra: int, pattern: int, block: int) -> bool:
    """Whether a macroblock has a block."""
    if block == 0:
        return bool(intra)
    if block <= 16:
        return bool(pattern >> ((block - 1) // 4) & 1)
    return pattern >= (16 if block <= 18 else 32)


def _by_pattern() -> tuple[np.ndarray, np.ndarray]:
    """(The next block, bits that are enough for all that come if none has coefficients), by intra, pattern and 1 + block."""
    following, rest = np.full((2, 48, BLOCKS + 1), BLOCKS, np.int32), np.zeros((2, 48, BLOCKS + 1), np.int32)
    for intra in range(2):
        for pattern in range(48):
            for block in range(BLOCKS - 1, -1, -1):
                there = _has(intra, pattern, block)
                following[intra, pattern, block] = block if there else following[intra, pattern, block + 1]
                bits = 2 if block in (17, 18) else TOKEN_BITS
                rest[intra, pattern, block] = rest[intra, pattern, block + 1] + there * bits
    return following, rest


def _cells() -> list[tuple[int, int, int, int]]:
    """(First cell, side in cells, row, column) of each block among those of its kind; constant parts are where the first is."""
    bright = [(0, 4, i // 8 * 2 + i % 4 // 2, i // 4 % 2 * 2 + i % 2) for i in range(16)]
    colours = [(first, 2, i // 2, i % 2) for first in (16, 20) for i in range(4)]
    return [bright[0], *bright, colours[0], colours[4], *colours]


_NEXT, _BLOCKS_REST = _by_pattern()
_CELLS = np.array([first + side * y + x for first, side, y, x in _cells()], np.int32)
_CELLS[[0, 17, 18]] = -1  # constant parts are not counted
# Of each block: whether its neighbour is in its own macroblock, and the neighbour's cell.
_LEFT = tuple(np.array([(x > 0, first + side * y + (x - 1) % side) for first, side, y, x in _cells()], np.int32).T)
_ABOVE = tuple(np.array([(y > 0, first + side * ((y - 1) % side) + x) for first, side, y, x in _cells()], np.int32).T)
# The most coefficients of each block, an index of `MOST`, of macroblocks predicted from the picture before, then from their own.
_MOST = np.array([[0, *[i] * 16, 2, 2, *[1] * 8] for i in (0, 1)], np.int32)
_ZEROS_REST = np.array([[cavlc.zeros_rest(total, most) for total in range(17)] for most in MOST], np.int32)
