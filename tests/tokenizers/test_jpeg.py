"""Canonical JPEG files: what Pillow reads of them, what they share, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from jaxgen.tokenizers.jpeg import JpegCodec, segments

RNG = np.random.default_rng(0)
CODECS = [
    JpegCodec(8, 1, quality=75),
    JpegCodec((16, 40), 3, restart=1, header="frame"),
    JpegCodec((24, 24), 3, subsampling="4:2:2", restart=2, quality=90),
    JpegCodec((9, 17), 3, subsampling="4:4:4"),
]


def smooth(shape):
    """A picture of which a JPEG keeps much."""
    y, x = np.indices(shape[:2])
    return np.stack([(40 * (c + 1) + 3 * y + 2 * x) % 256 for c in range(shape[2])], -1).astype(np.uint8)


def saved(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("codec", CODECS)
def test_files_are_those_that_pillow_writes_and_reads(codec):
    for image in (smooth(codec.shape), RNG.integers(0, 256, codec.shape, np.uint8)):
        data = codec.encode(image)
        options = dict(quality=codec.quality, **({"subsampling": codec.subsampling} if codec.channels == 3 else {}))
        options |= {"restart_marker_blocks": codec.restart} if codec.restart else {}
        whole = saved(image[..., 0] if codec.channels == 1 else image, **options)
        assert codec.file(data) == whole
        want = np.asarray(Image.open(io.BytesIO(whole))).reshape(codec.shape)
        np.testing.assert_array_equal(codec.decode(data), want)
        assert codec.read(whole) == data
        assert data.startswith(codec.head) and data.endswith(b"\xff\xd9")


def test_what_files_share():
    """An image's bytes begin behind the scan's header; with `header` the headers stay, as libjpeg's stream without tables."""
    codec = JpegCodec((16, 16), 3, restart=1, header="frame")
    image = smooth(codec.shape)
    assert codec.encode(image) == saved(image, quality=25, subsampling="4:2:0", streamtype=2, restart_marker_blocks=1)
    alone = JpegCodec((16, 16), 3, restart=1)
    assert codec.encode(image) == codec.head + alone.encode(image) and alone.head == b""
    kinds = [marker for marker, _ in segments(codec.prologue)]
    assert kinds.count(0xC4) == 4 and 0xE1 not in kinds and kinds[-1] == 0xDA
    # Every field changes the file.
    for other in (JpegCodec(16, 3), JpegCodec(16, 3, restart=1, quality=26), JpegCodec(16, 3, restart=1, subsampling="4:4:4")):
        assert other.file(other.encode(image)) != alone.file(alone.encode(image))


def test_the_published_size():
    """256 pixels of 4:2:0 are 16 x 16 units, each of six blocks with a marker behind it: 32 rounds of FFD0 to FFD7."""
    codec = JpegCodec(256, 3, restart=1, header="frame")
    assert codec.mcus == 256 and codec.blocks == (0, 0, 0, 0, 1, 2)
    scan = codec.encode(smooth(codec.shape))[len(codec.head) :]
    assert [scan.count(bytes([0xFF, 0xD0 + i])) for i in range(8)] == [32] * 7 + [31]


def test_files_of_another_form_are_refused():
    codec, image = JpegCodec(16, 3), smooth((16, 16, 3))
    good = codec.file(codec.encode(image))
    for file, message in (
        (saved(image, quality=25, subsampling="4:4:4"), "subsampling 4:4:4: expected 4:2:0"),
        (saved(image, quality=25, subsampling="4:2:2"), "subsampling 4:2:2: expected 4:2:0"),
        (saved(image, quality=30, subsampling="4:2:0"), "quantisation tables: expected those of quality 25"),
        (saved(image, quality=25, subsampling="4:2:0", optimize=True), "other Huffman tables"),
        (saved(image, quality=25, progressive=True), "not a baseline JPEG"),
        (saved(image[:8], quality=25), r"\(H, W, C\) = \(8, 16, 3\): expected \(16, 16, 3\)"),
        (saved(image[..., 0], quality=25), r"= \(16, 16, 1\): expected"),
        (good[:-2], "truncated: the scan ends after"),
        (good[:300], "truncated or broken before its scan"),
        (good + b"x", "1 bytes behind the end marker"),
        (b"GIF89a", "begins with 4749: not a JPEG"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.read(file)


def test_bytes_that_are_no_file_are_refused():
    codec = JpegCodec(16, 1, quality=90)
    data = codec.encode(RNG.integers(0, 256, codec.shape, np.uint8))
    for broken, message in (
        (data[:20], "truncated"),
        (data[:20] + b"\xff\xd9", "a marker where blocks are missing"),
        (data[:-2] + b"\x00\xff\xd9", "expected the marker ffd9"),
        (b"\xff\x00" * 3 + data, "bits that are no Huffman code"),
        (b"", "truncated"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode(broken)
    headed = JpegCodec(16, 1, header="frame")
    with pytest.raises(ValueError, match="are not the head"):
        headed.decode(JpegCodec(16, 1).encode(np.zeros((16, 16, 1), np.uint8)))
    # An ordinary decoder mends most of that; what it refuses is a file without an end.
    assert codec.opens(codec.file(data[:20] + b"\xff\xd9")) and not codec.opens(codec.file(data[:20]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(image_size=0), "image_size=0"),
        (dict(image_size=8, channels=2), "channels=2: expected 1 or 3"),
        (dict(image_size=8, quality=0), "quality=0"),
        (dict(image_size=8, subsampling="4:1:1"), "subsampling='4:1:1'"),
        (dict(image_size=8, restart=-1), "restart=-1"),
        (dict(image_size=8, header="full"), "header='full'"),
    ],
)
def test_bad_codecs(fields, message):
    with pytest.raises(ValueError, match=message):
        JpegCodec(**fields)
    codec = JpegCodec(8, 3)
    with pytest.raises(ValueError, match=r"image uint8 \(8, 9, 3\): expected uint8 \(8, 8, 3\)"):
        codec.encode(np.zeros((8, 9, 3), np.uint8))
