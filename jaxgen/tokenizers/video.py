"""Short clips <-> H.264 streams, through PyAV: one quality, one intra frame, no metadata."""

from __future__ import annotations

import dataclasses
import functools
import io
import re

import numpy as np
from jaxtyping import Int, UInt8

from jaxgen.decoding.grammar import FORBIDDEN

__all__ = ["H264Codec"]

START = b"\0\0\1"
PARAMETERS, EXTRA = (7, 8), 6  # kinds of units: what all streams share, and what says nothing of the pixels
END = 256


@dataclasses.dataclass(frozen=True)
class H264Codec:
    """Clips <-> H.264 streams of a baseline profile, constant quantiser, one intra frame and the rest predicted from the frame
    before (AVC-LM: Han et al. 2024, arXiv:2408.08459, section 3).

    `encode`'s bytes begin behind the parameter sets, which all clips share. The paper's clips are 15 frames of 144 x 256.

    Attributes:
      frames: of a clip.
      height, width: even numbers.
      quantiser: QP, 0 to 51.

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

    suffix = "h264"  # a fact of the class, not a field

    def __post_init__(self):
        for name, ok, expected in (
            ("frames", self.frames >= 1, "at least 1"),
            ("height", self.height >= 2 and self.height % 2 == 0, "an even number"),
            ("width", self.width >= 2 and self.width % 2 == 0, "an even number"),
            ("quantiser", 0 <= self.quantiser <= 51, "0 to 51"),
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
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])

    @functools.cached_property
    def table(self) -> Int[np.ndarray, "n 257"]:
        """The automaton of units for `jaxgen.decoding.constrain` (ITU-T H.264, annex B): as many as frames, each with its own
        first byte, start codes between them and none inside, and `END` behind the last.

        The bits inside of a unit are not checked: what they mean depends on all that was decoded before.
        """
        first = [unit[0] for unit in _units(self.prologue[:-4] + b"\0" + START + self.encode(np.zeros(self.shape, np.uint8)))]
        first = [byte for byte in first if byte & 31 not in PARAMETERS]
        # Of each unit: its first byte is due, it is due a byte, and 0, 1, 2 zeros were the last; or 3 came behind two of them.
        due, empty, zeros, escaped, each = 0, 1, 2, 5, 6
        table = np.full((self.frames * each + 1, END + 1), FORBIDDEN, np.int32)
        final = self.frames * each
        table[final, END] = final
        for i, byte in enumerate(first):
            at = i * each
            table[at + due, byte] = at + empty
            for state in (empty, zeros, zeros + 1, zeros + 2):
                table[at + state, 1:256] = at + zeros
                table[at + state, 0] = at + zeros + 1 + max(state - zeros, 0)
            table[at + zeros + 2, :4] = FORBIDDEN, at + each if i + 1 < self.frames else FORBIDDEN, FORBIDDEN, at + escaped
            table[at + escaped, :4] = at + zeros + 1, at + zeros, at + zeros, at + zeros
        table[final - each + zeros, END] = final
        return table

    def _save(self, clip: UInt8[np.ndarray, "f H W 3"]) -> bytes:
        av = _library()
        file = io.BytesIO()
        with av.open(file, mode="w", format="h264") as container:
            stream = container.add_stream("libx264", rate=3)
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
            # One thread: how a frame is cut must not depend on the machine.
            stream.codec_context.thread_count = 1
            keys = f"keyint={self.frames}:min-keyint={self.frames}:scenecut=0:bframes=0"
            fixed = f"{keys}:cabac=0:ref=1:threads=1:sliced-threads=0"
            stream.options = {"profile": "baseline", "qp": str(self.quantiser), "tune": "zerolatency", "x264-params": fixed}
            for frame in clip:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        return file.getvalue()


def _units(stream: bytes) -> list[bytes]:
    """What lies between start codes."""
    return [unit.rstrip(b"\0") for unit in re.split(re.escape(START), stream)[1:]]


def _library():
    try:
        import av
    except ImportError as error:
        raise ValueError("H.264 needs PyAV: pip install 'jaxgen[video]'") from error
    return av
