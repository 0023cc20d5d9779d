"""H.264 clips: what a decoder reads of them, the units' automaton, and what is refused."""

import io
import sys

import numpy as np
import pytest

from jaxgen.tokenizers.bytes import from_tokens, to_tokens
from jaxgen.tokenizers.video import H264Codec, _colours, _planes


def clip(frames, height, width):
    """A bar that moves."""
    x = np.full((frames, height, width, 3), 60, np.uint8)
    for i in range(frames):
        x[i, :, 4 * i : 4 * i + 8] = (200, 120, 40)
    return x


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"H.264 needs PyAV: pip install 'jaxgen\[video\]'"):
        H264Codec(frames=2)


@pytest.fixture(scope="module")
def codec():
    pytest.importorskip("av", reason="H.264 needs PyAV: pip install 'jaxgen[video]'")
    return H264Codec(frames=4, height=32, width=48, quantiser=20)


def test_clips_come_back(codec):
    pixels = clip(4, 32, 48)
    data = codec.encode(pixels)
    assert data == codec.encode(pixels) and from_tokens(to_tokens(data, len(data) + 9)) == data
    assert np.abs(codec.decode(data).astype(int) - pixels).mean() < 4
    coarse = H264Codec(frames=4, height=32, width=48, quantiser=45)
    assert len(coarse.encode(pixels)) < len(data)
    # A whole file, by an ordinary reader; one frame is intra, of unit kind 5, the others are predicted.
    import av

    with av.open(io.BytesIO(codec.file(data)), format="h264") as container:
        assert len(list(container.decode(video=0))) == 4
    assert [unit[0] & 31 for unit in data.split(b"\0\0\1")] == [5, 1, 1, 1]


def test_broken_streams_are_refused(codec):
    data = codec.encode(clip(4, 32, 48))
    units = data.split(b"\0\0\1")
    for broken in (b"", b"\0\0\1".join(units[:3]), data[: len(units[0]) // 2], b"\0\0\1".join(units[1:])):
        with pytest.raises(ValueError, match=f"a stream of {len(broken)} bytes"):
            codec.decode(broken)


@pytest.mark.parametrize("restart, units", [(0, 4), (1, 4 * 6), (4, 4 * 2)])
def test_headers(restart, units):
    """What streams of all clips begin their units with; the rest of the units differs."""
    pytest.importorskip("av", reason="H.264 needs PyAV: pip install 'jaxgen[video]'")
    codec = H264Codec(frames=4, height=32, width=48, quantiser=20, restart=restart)
    rng = np.random.default_rng(0)
    clips = [clip(4, 32, 48), rng.integers(0, 256, (4, 32, 48, 3), np.uint8), np.full((4, 32, 48, 3), 255, np.uint8)]
    split = [codec.encode(pixels).split(b"\0\0\1") for pixels in clips]
    assert [len(found) for found in split] == [units] * 3 == [len(codec.headers)] * 3
    for header, *found in zip(codec.headers, *split):
        bits = ["".join(format(byte, "08b") for byte in unit) for unit in found]
        assert len(header) >= 24 and all(text.startswith(header) for text in bits)
        assert len({text[: len(header) + 16] for text in bits}) > 1


def test_what_readers_make_up(codec):
    """A stream with a broken picture is not valid, and an ordinary reader shows all its pictures; it refuses too few."""
    units = codec.encode(np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), np.uint8)).split(b"\0\0\1")
    broken = b"\0\0\1".join([*units[:2], units[2][: len(units[2]) // 2], units[3]])
    assert codec.opens(codec.file(broken)) and codec.opens(codec.file(b"\0\0\1".join(units)))
    with pytest.raises(ValueError, match="cannot be decoded"):
        codec.decode(broken)
    for none in (codec.file(b"\0\0\1".join(units[:3])), codec.prologue, b"", b"hello"):
        assert not codec.opens(none)


def test_colours(codec):
    """Of squares of one colour nothing but rounding is lost; a library makes nearly the same of even pictures."""
    import av

    pixels = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8), 2, 0), 2, 1)
    back = _colours(_planes(pixels))
    assert np.abs(back.astype(int) - pixels).max() <= 4
    for colour in pixels[0]:
        even = np.broadcast_to(colour, (8, 8, 3)).copy()
        theirs = av.VideoFrame.from_ndarray(even, format="rgb24").reformat(format="yuv420p").to_ndarray()
        assert np.abs(theirs.astype(int) - _planes(even)).max() <= 2
    assert _planes(np.full((2, 2, 3), 255, np.uint8)).tolist() == [[235, 235], [235, 235], [128, 128]]


@pytest.mark.parametrize("field, value", [("frames", 0), ("height", 7), ("width", 0), ("quantiser", 52), ("restart", -1)])
def test_bad_codecs(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: expected"):
        H264Codec(**{field: value})
