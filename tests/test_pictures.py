import os

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen.pictures import grid, rows, save_png


def flat(values, size=2, channels=1):
    """One constant image per value."""
    return np.ones((len(values), size, size, channels)) * np.reshape(values, (-1, 1, 1, 1))


def test_grid_pixel_by_pixel():
    picture = grid(flat([-1, 0, 1], size=1), columns=2, scale=2, pad=1)
    w = 255
    want = [
        [w, w, w, w, w, w, w],
        [w, 0, 0, w, 128, 128, w],
        [w, 0, 0, w, 128, 128, w],
        [w, w, w, w, w, w, w],
        [w, 255, 255, w, w, w, w],
        [w, 255, 255, w, w, w, w],
        [w, w, w, w, w, w, w],
    ]
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[..., 0], want)


def test_grid_keeps_colour_rounds_and_clips():
    image = np.zeros((1, 1, 2, 3))
    image[0, 0] = [[-1.5, 1.5, 0.1], [-0.999, 0.999, -0.5]]
    np.testing.assert_array_equal(grid(image, 1, pad=0)[0], [[0, 255, 140], [0, 255, 64]])
    np.testing.assert_array_equal(grid(jnp.asarray(image, jnp.bfloat16), 1, pad=0)[0, 0], [0, 255, 140])


def test_grid_inverts_bytes_exactly():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(grid(values.astype(np.float32) / 127.5 - 1, 1, pad=0), values[0])


def test_rows_put_each_array_above_the_next():
    original, copy = flat([-1, -0.5, 0]), flat([0.2, 0.4, 0.6])
    picture = rows([original, copy], pad=1)
    np.testing.assert_array_equal(picture, grid(np.concatenate([original, copy]), columns=3, pad=1))


def test_rows_wrap_in_bands():
    original, copy = flat([-1, -0.5, 0]), flat([0.2, 0.4, 0.6])
    picture = rows([original, copy], columns=2, pad=1)
    top = grid(np.concatenate([original[:2], copy[:2]]), columns=2, pad=1)
    np.testing.assert_array_equal(picture[: len(top)], top)
    assert picture.shape == (2 * len(top) + 3, top.shape[1], 1)
    below = picture[len(top) :]
    np.testing.assert_array_equal(below[3:, :4], grid(np.concatenate([original[2:], copy[2:]]), columns=1, pad=1))
    assert (below[:3] == 255).all() and (below[:, 4:] == 255).all()


def test_labels_are_written_beside_their_rows():
    images = [flat([1], size=16, channels=3)] * 3
    plain = rows(images, scale=2)
    picture = rows(images, ["original", "", "copy"], scale=2)
    margin = picture.shape[1] - plain.shape[1]
    assert margin > 20 and picture.shape[0] == plain.shape[0]
    np.testing.assert_array_equal(picture[:, margin:], plain)
    ink = (picture[:, :margin, 0] < 128).any(axis=1)
    assert ink[2:34].any() and not ink[36:68].any() and ink[70:102].any()
    assert not np.array_equal(rows(images, ["original", "", "cope"], scale=2), picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    path = tmp_path / "new" / "a.png"
    save_png(path, picture)
    save_png(str(path), picture)
    with Image.open(path) as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(image).reshape(picture.shape), picture)
    assert os.listdir(path.parent) == ["a.png"]


def test_a_failed_save_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    save_png(path, np.zeros((2, 2, 1), np.uint8))
    old = path.read_bytes()

    def full(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_png(path, np.ones((2, 2, 1), np.uint8))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.png"]


def test_bad_pictures():
    good = flat([0, 1])
    with pytest.raises(ValueError, match=r"\(2, 2, 2, 2\)"):
        grid(flat([0, 1], channels=2), 1)
    with pytest.raises(ValueError, match="uint8"):
        grid(good.astype(np.uint8), 1)
    with pytest.raises(ValueError, match="4 of 8 values are not finite"):
        grid(flat([0, np.nan]), 1)
    with pytest.raises(ValueError, match="columns=0"):
        grid(good, 0)
    with pytest.raises(ValueError, match="scale=0, pad=2"):
        grid(good, 1, scale=0)
    with pytest.raises(ValueError, match="columns=-1"):
        rows([good], columns=-1)
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        rows([good, good], ["a"])
    with pytest.raises(ValueError, match="different shapes"):
        rows([good, good[:1]])
    with pytest.raises(ValueError, match="no images"):
        rows([])
    with pytest.raises(ValueError, match="float64"):
        save_png("x.png", np.zeros((2, 2, 1)))
