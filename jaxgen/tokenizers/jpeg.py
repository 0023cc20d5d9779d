"""Canonical JPEG files: one quality, one subsampling, the tables of the standard, no metadata."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

__all__ = ["JpegCodec", "segments"]

HEADERS = ("none", "frame")
# Samples of brightness for one of colour, down and across.
SUBSAMPLINGS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}
SOI, EOI, SOS, DQT, DHT, SOF0 = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xC0


def segments(file: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, the segment with its marker and length) of a JPEG up to its scan, which is the last one.

    Raises:
      ValueError: not a JPEG, or one that ends before its scan.
    """
    if file[:2] != b"\xff\xd8":
        raise ValueError(f"a file that begins with {file[:2].hex() or 'nothing'}: not a JPEG")
    yield SOI, file[:2]
    at, marker = 2, SOI
    while marker != SOS:
        head = file[at : at + 4]
        size = int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or len(file) < at + 2 + size:
            raise ValueError(f"a JPEG of {len(file)} bytes that is truncated or broken before its scan, at byte {at}")
        marker = head[1]
        yield marker, file[at : at + 2 + size]
        at += 2 + size


@dataclasses.dataclass(frozen=True)
class JpegCodec:
    """Images <-> JPEG files that differ in their scan only (Han et al. 2024, arXiv:2408.08459, section 3).

    What all files have in common is no part of `encode`'s bytes. The authors keep all but the tables (`header="frame"`) and set
    a restart marker behind every MCU, as their published preprocessing does.

    Attributes:
      image_size: side of the squares, or (H, W).
      channels: 1 or 3.
      quality: of libjpeg's scale, 1 to 100; the paper's is 25.
      subsampling: of the colours, "4:4:4", "4:2:2" or "4:2:0".
      restart: MCUs between restart markers; 0 is none.
      header: "none": the bytes begin with the scan; "frame": with SOI, JFIF, frame and scan headers.

    Raises:
      ValueError: a field out of range.

    Example:
      >>> codec = JpegCodec(image_size=8, channels=1)
      >>> data = codec.encode(np.zeros((8, 8, 1), np.uint8))
      >>> open("black.jpg", "wb").write(codec.file(data))
    """

    image_size: int | tuple[int, int]
    channels: int = 3
    quality: int = 25
    subsampling: str = "4:2:0"
    restart: int = 0
    header: str = "none"

    suffix = "jpg"  # a fact of the class, not a field

    def __post_init__(self):
        if min(self.shape[:2]) < 1 or max(self.shape[:2]) > 65535:
            raise ValueError(f"image_size={self.image_size}: a JPEG has 1 to 65535 pixels a side")
        for name, ok, expected in (
            ("channels", self.channels in (1, 3), "1 or 3"),
            ("quality", 1 <= self.quality <= 100, "1 to 100"),
            ("subsampling", self.subsampling in SUBSAMPLINGS, f"one of {', '.join(SUBSAMPLINGS)}"),
            ("restart", self.restart >= 0, "at least 0"),
            ("header", self.header in HEADERS, f"one of {', '.join(HEADERS)}"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        size = self.image_size
        return (*((size, size) if isinstance(size, int) else size), self.channels)

    @functools.cached_property
    def prologue(self) -> bytes:
        """Everything before the scan's data, the same in all files."""
        file = self._save(np.zeros(self.shape, np.uint8))
        return b"".join(segment for _, segment in segments(file))

    @functools.cached_property
    def head(self) -> bytes:
        """What `encode`'s bytes begin with."""
        if self.header == "none":
            return b""
        # As libjpeg writes an abbreviated stream: the tables go, the restart interval stays.
        return b"".join(segment for marker, segment in segments(self.prologue) if marker not in (DQT, DHT))

    @property
    def blocks(self) -> tuple[int, ...]:
        """The component that each block of an MCU is of."""
        down, across = SUBSAMPLINGS[self.subsampling]
        return (0,) if self.channels == 1 else (0,) * (down * across) + (1, 2)

    @property
    def mcus(self) -> int:
        """Minimum coded units of an image."""
        down, across = (1, 1) if self.channels == 1 else SUBSAMPLINGS[self.subsampling]
        return -(-self.shape[0] // (8 * down)) * -(-self.shape[1] // (8 * across))

    @functools.cached_property
    def tables(self) -> tuple[tuple[tuple[int, ...], bytes], ...]:
        """Huffman tables, as (codes of 1 to 16 bits, their symbols): DC and AC of brightness, then of colour."""
        found = {}
        for marker, segment in segments(self.prologue):
            at = 4
            while marker == DHT and at < len(segment):
                counts = tuple(segment[at + 1 : at + 17])
                found[segment[at]] = counts, segment[at + 17 : at + 17 + sum(counts)]
                at += 17 + sum(counts)
        return tuple(found[name] for name in (0x00, 0x10, 0x01, 0x11) if name in found)

    def encode(self, image: UInt8[np.ndarray, "H W C"]) -> bytes:
        """The head, the scan's data and the end marker.

        Raises:
          ValueError: an image of another shape or type.
        """
        if image.shape != self.shape or image.dtype != np.uint8:
            raise ValueError(f"image {image.dtype} {image.shape}: expected uint8 {self.shape}")
        return self.head + self._save(image)[len(self.prologue) :]

    def file(self, data: bytes) -> bytes:
        """The whole file of `encode`'s bytes; a head is replaced, whatever it is."""
        return self.prologue + data[len(self.head) :]

    def decode(self, data: bytes) -> UInt8[np.ndarray, "H W C"]:
        """The pixels of `encode`'s bytes.

        Raises:
          ValueError: another head, blocks that are missing or too many, or a code that there is not.
        """
        if not data.startswith(self.head):
            raise ValueError(f"{len(data)} bytes: the first {len(self.head)} are not the head that all files have")
        self._check_scan(data[len(self.head) :])
        return self.open(self.file(data))

    def read(self, file: bytes) -> bytes:
        """`encode`'s bytes of a file that is written already, which must have this form.

        Raises:
          ValueError: another subsampling, size, number of channels, quality or other tables; a progressive file; a truncated one.
        """
        mine, theirs = dict(segments(self.prologue)), list(segments(file))
        frames = [(marker, segment) for marker, segment in theirs if 0xC0 <= marker <= 0xCF and marker not in (DHT, 0xC8, 0xCC)]
        if len(frames) != 1 or frames[0][0] != SOF0:
            raise ValueError("not a baseline JPEG: progressive, or of another kind")
        ours, frame = mine[SOF0], frames[0][1]
        if frame[5:9] != ours[5:9] or frame[9] != ours[9]:
            found = int.from_bytes(frame[5:7], "big"), int.from_bytes(frame[7:9], "big"), frame[9]
            raise ValueError(f"a JPEG of (H, W, C) = {found}: expected {self.shape}")
        if frame != ours:
            across, down = divmod(frame[11], 16)
            names = {factors: name for name, factors in SUBSAMPLINGS.items()}
            name = names.get((down, across), f"{across}x{down} samples a unit")
            raise ValueError(f"subsampling {name}: expected {self.subsampling}")
        tables = {kind: b"".join(segment[4:] for marker, segment in theirs if marker == kind) for kind in (DQT, DHT)}
        for kind, name in ((DQT, f"quantisation tables: expected those of quality {self.quality}"), (DHT, "Huffman tables")):
            if tables[kind] != b"".join(segment[4:] for marker, segment in segments(self.prologue) if marker == kind):
                raise ValueError(f"a JPEG with other {name}")
        scan = file[sum(len(segment) for _, segment in theirs) :]
        self._check_scan(scan)
        return self.head + scan

    def opens(self, file: bytes) -> bool:
        """Whether an ordinary decoder, Pillow's, opens a file without an error; it mends much that is broken."""
        try:
            self.open(file)
        except ValueError:
            return False
        return True

    def open(self, file: bytes) -> UInt8[np.ndarray, "H W C"]:
        """The pixels of a file, as Pillow has them.

        Raises:
          ValueError: Pillow refuses it.
        """
        from PIL import Image

        try:
            with Image.open(io.BytesIO(file)) as image:
                return np.asarray(image).reshape(self.shape)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"a JPEG of {len(file)} bytes that Pillow cannot open: {error}") from error

    def _save(self, image: UInt8[np.ndarray, "H W C"]) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        options = dict(quality=self.quality, optimize=False, progressive=False)
        if self.channels == 3:
            options["subsampling"] = self.subsampling
        if self.restart:
            options["restart_marker_blocks"] = self.restart
        Image.fromarray(image[..., 0] if self.channels == 1 else image).save(file, format="JPEG", **options)
        return file.getvalue()

    def _check_scan(self, scan: bytes) -> None:
        """That a scan's data are whole: every block, every marker, ones at the end of a byte, and nothing behind the end.

        Raises:
          ValueError: what is wrong, and where.
        """
        bits, codes = _Bits(scan), self._codes
        for mcu in range(self.mcus):
            if self.restart and mcu and mcu % self.restart == 0:
                bits.marker(0xD0 + (mcu // self.restart - 1) % 8)
            for component in self.blocks:
                dc, ac = (0, 1) if component == 0 else (2, 3)
                bits.take(bits.symbol(codes[dc]))
                k = 1
                while k < 64:
                    symbol = bits.symbol(codes[ac])
                    if symbol == 0x00:
                        break
                    k += symbol >> 4
                    if k > 63 or (symbol == 0xF0 and k > 62):
                        raise ValueError(f"byte {bits.at} of the scan: coefficient {k} of a block of 64")
                    bits.take(symbol & 15)
                    k += 1
        bits.marker(EOI)
        if bits.at != len(scan):
            raise ValueError(f"{len(scan) - bits.at} bytes behind the end marker")

    @functools.cached_property
    def _codes(self) -> list[dict[tuple[int, int], int]]:
        """Symbols by (length, code), of each table."""
        found = []
        for counts, symbols in self.tables:
            table, code, at = {}, 0, 0
            for length, count in enumerate(counts, start=1):
                for symbol in symbols[at : at + count]:
                    table[length, code] = symbol
                    code += 1
                at, code = at + count, code << 1
            found.append(table)
        return found


class _Bits:
    """Reads a scan's data bit by bit."""

    def __init__(self, data: bytes):
        self.data, self.at, self.byte, self.left = data, 0, 0, 0

    def bit(self) -> int:
        if not self.left:
            self.byte, self.left = self._next(), 8
            if self.byte == 0xFF and self._next() != 0x00:
                raise ValueError(f"byte {self.at - 2} of the scan: a marker where blocks are missing")
        self.left -= 1
        return (self.byte >> self.left) & 1

    def take(self, n: int) -> None:
        for _ in range(n):
            self.bit()

    def symbol(self, codes: dict[tuple[int, int], int]) -> int:
        code = 0
        for length in range(1, 17):
            code = 2 * code + self.bit()
            if (length, code) in codes:
                return codes[length, code]
        raise ValueError(f"byte {self.at - 1} of the scan: bits that are no Huffman code")

    def marker(self, code: int) -> None:
        while self.left:
            if not self.bit():
                raise ValueError(f"byte {self.at - 1} of the scan: zeros behind the last block")
        found = self._next(), self._next()
        if found != (0xFF, code):
            raise ValueError(f"byte {self.at - 2} of the scan: {found[0]:02x}{found[1]:02x}, expected the marker ff{code:02x}")

    def _next(self) -> int:
        if self.at >= len(self.data):
            raise ValueError(f"truncated: the scan ends after {len(self.data)} bytes")
        self.at += 1
        return self.data[self.at - 1]
