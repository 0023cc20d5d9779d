"""Pixels as tokens: 8-bit images survive, channels are rows, and fewer levels are the nearest ones."""

import numpy as np
import pytest

from jaxgen.tokenizers import PixelTokenizer


def encode(tokenizer, images):
    return np.asarray(tokenizer.apply({}, images, method="encode"))


@pytest.mark.numeric
def test_eight_bits_survive():
    tokenizer, bytes_ = PixelTokenizer(channels=3, size=(2, 4)), np.random.default_rng(0).integers(0, 256, (5, 2, 4, 3))
    images = (bytes_ / 127.5 - 1).astype(np.float32)
    tokens = encode(tokenizer, images)
    assert tokens.shape == (5, 24) and tokenizer.grid == (6, 4) and tokenizer.order.length == 24 and tokenizer.vocab == 256
    rows = tokens.reshape(5, 6, 4)
    for row, channel in np.ndindex(2, 3):
        np.testing.assert_array_equal(rows[:, 3 * row + channel], bytes_[:, row, :, channel])
    np.testing.assert_allclose(tokenizer.apply({}, tokens, method="decode"), images, atol=1e-6)


@pytest.mark.numeric
def test_few_levels():
    tokenizer = PixelTokenizer(channels=1, size=(1, 5), levels=3)
    images = np.array([-1, -0.4, -0.6, 0.7, 1.2], np.float32).reshape(1, 1, 5, 1)
    tokens = encode(tokenizer, images)
    np.testing.assert_array_equal(tokens, [[0, 1, 0, 2, 2]])
    np.testing.assert_array_equal(np.asarray(tokenizer.apply({}, tokens, method="decode")).reshape(-1), [-1, 0, -1, 1, 1])


def test_bad_input():
    for change in (dict(channels=0), dict(size=(0, 2)), dict(levels=1)):
        with pytest.raises(ValueError, match="expected pixels of at least two levels"):
            PixelTokenizer(**change)
    for images in (np.zeros((1, 2, 2, 3), np.float32), np.zeros((1, 32, 32, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"expected floating-point \[b, 32, 32, 3\]"):
            encode(PixelTokenizer(), images)
