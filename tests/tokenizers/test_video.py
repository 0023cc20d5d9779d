"""H.264 clips: what a decoder reads of them, the units' automaton, and what is refused."""

import io
import sys

import numpy as np
import pytest

from jaxgen.tokenizers.bytes import END, from_tokens, to_tokens
from jaxgen.tokenizers.video import H264Codec


def clip(frames, height, width):
    """A bar that moves."""
    x = np.full((frames, height, width, 3), 60, np.uint8)
    for i in range(frames):
        x[i, :, 4 * i : 4 * i + 8] = (200, 120, 40)
    return x


def accepts(table, data):
    state = 0
    for token in [*data, END]:
        state = table[state, token]
        if state < 0:
            return False
    return True


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


def test_the_automaton_of_units(codec):
    rng = np.random.default_rng(0)
    table = codec.table
    for pixels in (clip(4, 32, 48), rng.integers(0, 256, (4, 32, 48, 3), np.uint8)):
        assert accepts(table, codec.encode(pixels))
    data = codec.encode(clip(4, 32, 48))
    units = data.split(b"\0\0\1")
    for broken in (
        b"\0\0\1".join(units[:3]),
        b"\0\0\1".join([*units, units[-1]]),
        b"\0\0\1".join(units[1:]),
        data.replace(b"\0\0\1", b"\0\0\2"),
        data + b"\0",
        data + b"\0\0\0",
    ):
        assert not accepts(table, broken)
    assert ((table >= 0).sum(1) > 0).all() and table.max() == len(table) - 1


@pytest.mark.parametrize("field, value", [("frames", 0), ("height", 7), ("width", 0), ("quantiser", 52)])
def test_bad_codecs(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}: expected"):
        H264Codec(**{field: value})
