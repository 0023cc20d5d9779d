"""Files as tokens, and codecs in a tokenizer's place."""

import jax
import numpy as np
import pytest

from jaxgen.tokenizers.bytes import END, ByteTokenizer, PixelCodec, from_tokens, to_tokens
from jaxgen.tokenizers.jpeg import JpegCodec

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)


def test_bytes_and_tokens():
    assert to_tokens(b"\x00\xff", 4).tolist() == [0, 255, END, END]
    assert to_tokens(b"\x00\xff\x01", 2).tolist() == [0, 255]
    for data in (b"", b"\x00\xff", b"abcd"):
        assert from_tokens(to_tokens(data, 4)) == data
    assert from_tokens(np.array([1, END, 2])) == b"\x01"


@pytest.mark.numeric
@pytest.mark.parametrize("codec", [JpegCodec(8, 1, quality=90), PixelCodec((8, 8, 1))])
def test_a_codec_as_a_tokenizer(codec):
    tokenizer = ByteTokenizer(codec=codec, length=90)
    images = (IMAGES / 127.5 - 1).astype(np.float32)
    tokens = np.asarray(jax.jit(lambda x: tokenizer.apply({}, x, method="encode"))(images))
    assert [from_tokens(row) for row in tokens] == [codec.encode(image) for image in IMAGES]
    broken = tokens.copy()
    broken[1, 7:] = END
    pictures, valid = jax.jit(lambda x: tokenizer.apply({}, x, method="read"))(broken)
    assert valid.tolist() == [True, False, True]
    for picture, row, good in zip(np.asarray(pictures), tokens, valid):
        want = codec.decode(from_tokens(row)) / 127.5 - 1 if good else np.zeros((8, 8, 1))
        np.testing.assert_allclose(picture, want, atol=1e-6)
    np.testing.assert_array_equal(tokenizer.apply({}, broken, method="decode"), pictures)
    assert tokenizer.image_size == (8, 8) and tokenizer.order.length == 90 and tokenizer.vocab == 257


def test_pixels_are_refused():
    with pytest.raises(ValueError, match="63 bytes: expected 64"):
        PixelCodec((8, 8, 1)).decode(b"x" * 63)
