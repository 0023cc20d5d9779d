"""Short clips <-> H.264 streams, through PyAV: one quality, one intra frame, no metadata."""

from __future__ import annotations

import dataclasses
import functools
import io
import re

import numpy as np
from jaxtyping import UInt8

__all__ = ["H264Codec"]

START = b"\0\0\1"
# Kinds of units: what all streams share, what says nothing of the pixels, and pictures of their own.
PARAMETERS, EXTRA, INTRA = (7, 8), 6, 5
# Brightness and colours of red, green and blue (ITU-R BT.601): of 8 bits, 16 to 235 and 16 to 240.
COLOURS = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
RANGES = np.array([219, 224, 224]) / 255


@dataclasses.dataclass(frozen=True)
class H264Codec:
    """Clips <-> H.264 streams of a baseline profile, constant quantiser, one intra frame and the rest predicted from the frame
    before (AVC-LM: Han et al. 2024, arXiv:2408.08459, section 3). Macroblocks are predicted as a whole, as `H264Grammar` wants.

    `encode`'s bytes begin behind the parameter sets, which all clips share. The paper's clips are 15 frames of 144 x 256. What is
    between the pixels and the codec, colours of a quarter of the size, is worked out here and not by the library, whose versions
    differ.

    Attributes:
      frames: of a clip.
      height, width: even numbers.
      quantiser: QP, 0 to 51.
      restart: macroblocks of 16 x 16 pixels in a slice, of which none needs another to be read; 0: a frame is one slice.

    Raises:
      ValueError: a field out of range, or PyAV is not installed.

    Example:
      >>> codec = H264Codec(frames=15, height=72, width=128)
      >>> data = codec.encode(clip)                              # uint8 [15, 72, 128, 3]
      >>> open("clip.h264", "wb").write(codec.file(data))
    """

    frames: int = 15
    height: int = 144
    width: int = 256
    quantiser: int = 37
    restart: int = 0

    suffix = "h264"  # a fact of the class, not a field

    def __post_init__(self):
        for name, ok, expected in (
            ("frames", self.frames >= 1, "at least 1"),
            ("height", self.height >= 2 and self.height % 2 == 0, "an even number"),
            ("width", self.width >= 2 and self.width % 2 == 0, "an even number"),
            ("quantiser", 0 <= self.quantiser <= 51, "0 to 51"),
            ("restart", self.restart >= 0, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")
        _library()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(f, H, W, C)."""
        return self.frames, self.height, self.width, 3

    @functools.cached_property
    def prologue(self) -> bytes:
        """The parameter sets, and the start code of the first frame."""
        units = _units(self._save(np.zeros(self.shape, np.uint8)))
        return b"".join(b"\0" + START + unit for unit in units if unit[0] & 31 in PARAMETERS) + b"\0" + START

    def encode(self, image: UInt8[np.ndarray, "f H W 3"]) -> bytes:
        """The frames' units, with a start code between two.

        Raises:
          ValueError: a clip of another shape or type.
        """
        if image.shape != self.shape or image.dtype != np.uint8:
            raise ValueError(f"clip {image.dtype} {image.shape}: expected uint8 {self.shape}")
        return START.join(unit for unit in _units(self._save(image)) if unit[0] & 31 not in (*PARAMETERS, EXTRA))

    def file(self, data: bytes) -> bytes:
        """The whole stream, which players read."""
        return self.prologue + data

    def decode(self, data: bytes) -> UInt8[np.ndarray, "f H W 3"]:
        """The pixels.

        Raises:
          ValueError: the decoder finds an error, or another number of frames.
        """
        av = _library()
        decoder = av.CodecContext.create("h264", "r")
        decoder.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        decoder.thread_count = 1
        try:
            packets = [*decoder.parse(self.file(data)), *decoder.parse(b""), None]
            frames = [frame for packet in packets for frame in decoder.decode(packet)]
        except (av.error.FFmpegError, EOFError) as error:
            raise ValueError(f"a stream of {len(data)} bytes that cannot be decoded: {error}") from error
        shapes = {(frame.height, frame.width) for frame in frames}
        if len(frames) != self.frames or shapes != {(self.height, self.width)} or any(frame.is_corrupt for frame in frames):
            raise ValueError(f"a stream of {len(data)} bytes with {len(frames)} frames: expected {self.frames} whole ones")
        return np.stack([_colours(frame.to_ndarray()) for frame in frames])

    @functools.cached_property
    def headers(self) -> tuple[str, ...]:
        """The bits, as a text, that all streams' units begin with: kind and slice's header of each (ITU-T H.264, 7.3.3)."""
        units = _units(self._save(np.zeros(self.shape, np.uint8)))
        sequence, picture = (next(_Bits(unit) for unit in units if unit[0] & 31 == kind) for kind in PARAMETERS)
        sequence.skip(32)  # its kind, profile and level
        _, counter = sequence.number(), 4 + sequence.number()
        if sequence.number() != 2:
            raise ValueError("pictures that are shown in another order than they are coded: not a baseline stream")
        picture.skip(8)
        picture.numbers(2)
        picture.skip(2)
        picture.numbers(3)
        picture.skip(3)
        picture.numbers(3)
        deblocking = picture.take(1)
        found = []
        for unit in (unit for unit in units if unit[0] & 31 not in (*PARAMETERS, EXTRA)):
            bits = _Bits(unit)
            intra = bits.take(8) & 31 == INTRA
            bits.numbers(3)  # its first macroblock, its kind, the parameters
            bits.skip(counter)
            if intra:
                bits.number()
            bits.skip(2 if intra else 3)  # nothing about references but the defaults
            bits.number()  # of the quantiser
            if deblocking and bits.number() != 1:
                bits.numbers(2)
            found.append("".join(format(byte, "08b") for byte in unit[: -(-bits.at // 8)])[: bits.at])
        return tuple(found)

    def opens(self, file: bytes) -> bool:
        """Whether an ordinary reader shows all pictures of a file; it makes up what it cannot decode."""
        av = _library()
        try:
            with av.open(io.BytesIO(file), format="h264") as container:
                shapes = [(frame.height, frame.width) for frame in container.decode(video=0)]
        except (av.error.FFmpegError, EOFError, IndexError):
            return False
        return shapes == [self.shape[1:3]] * self.frames

    def _save(self, clip: UInt8[np.ndarray, "f H W 3"]) -> bytes:
        av = _library()
        file = io.BytesIO()
        with av.open(file, mode="w", format="h264") as container:
            stream = container.add_stream("libx264", rate=3)
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
            # One thread: how a frame is cut must not depend on the machine.
            stream.codec_context.thread_count = 1
            keys = f"keyint={self.frames}:min-keyint={self.frames}:scenecut=0:bframes=0"
            slices = f"slice-max-mbs={self.restart}" if self.restart else "slices=1"
            # The preset predicts whole macroblocks; what it leaves out to be fast is put back where the syntax stays the same.
            fixed = f"{keys}:cabac=0:ref=1:subme=7:me=umh:deblock=0,0:threads=1:sliced-threads=0:{slices}"
            kind = {"preset": "ultrafast", "profile": "baseline", "tune": "zerolatency"}
            stream.options = {**kind, "qp": str(self.quantiser), "x264-params": fixed}
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(_planes(frame), format="yuv420p")))
            container.mux(stream.encode(None))
        return file.getvalue()


def _units(stream: bytes) -> list[bytes]:
    """What lies between start codes."""
    return [unit.rstrip(b"\0") for unit in re.split(re.escape(START), stream)[1:]]


def _planes(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h W"]:
    """Brightness, and below it the colours of squares of 2 x 2 pixels, row by row: planar 4:2:0."""
    values = image @ (COLOURS * RANGES[:, None]).T + (16, 128, 128)
    h, w = image.shape[:2]
    colours = values[..., 1:].reshape(h // 2, 2, w // 2, 2, 2).mean((1, 3))
    flat = np.concatenate([values[..., 0].ravel(), colours[..., 0].ravel(), colours[..., 1].ravel()])
    return np.round(flat).astype(np.uint8).reshape(-1, w)


def _colours(planes: UInt8[np.ndarray, "h W"]) -> UInt8[np.ndarray, "H W 3"]:
    """The inverse of `_planes`, but for what it drops."""
    h, w = planes.shape[0] * 2 // 3, planes.shape[1]
    colours = planes[h:].reshape(2, h // 2, w // 2).repeat(2, 1).repeat(2, 2)
    values = (np.stack([planes[:h], *colours], -1) - np.array([16.0, 128, 128])) / RANGES
    return np.clip(np.round(values @ np.linalg.inv(COLOURS).T), 0, 255).astype(np.uint8)


class _Bits:
    """Reads a unit bit by bit, without the 3 that stands behind two zeros; `at` counts the bits of the unit as it is."""

    def __init__(self, unit: bytes):
        self.unit, self.at = unit, 0

    def take(self, n: int) -> int:
        value = 0
        for _ in range(n):
            byte = self.at // 8
            if self.at % 8 == 0 and self.unit[max(byte - 2, 0) : byte + 1] == b"\0\0\3":
                self.at, byte = self.at + 8, byte + 1
            value = 2 * value + (self.unit[byte] >> (7 - self.at % 8) & 1)
            self.at += 1
        return value

    def skip(self, n: int) -> None:
        self.take(n)

    def number(self) -> int:
        """An exponential Golomb code, as of a number without a sign (9.1)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def numbers(self, n: int) -> None:
        for _ in range(n):
            self.number()


def _library():
    try:
        import av
    except ImportError as error:
        raise ValueError("H.264 needs PyAV: pip install 'jaxgen[video]'") from error
    return av
