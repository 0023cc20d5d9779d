import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxgen.data import transforms
from jaxgen.data.transforms import Preprocess, pixels, to_channels, to_uint8


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_grey_to_colour_repeats_and_colour_to_grey_is_pillows_luma():
    grey, colour = noise(9, 7, 1), noise(64, 64, 3)
    assert (to_channels(grey, 3) == grey).all() and to_channels(grey, 3).shape == (9, 7, 3)
    np.testing.assert_array_equal(to_channels(colour, 1)[..., 0], np.asarray(Image.fromarray(colour).convert("L")))
    np.testing.assert_array_equal(to_channels(to_channels(grey, 3), 1), grey)
    assert to_channels(colour, 3) is colour
    with pytest.raises(ValueError, match="4 channels"):
        to_channels(noise(4, 4, 4), 3)


SIZES = [((20, 30, 3), (12, 18, 3)), ((31, 20, 1), (18, 12, 1)), ((9, 12, 1), (12, 16, 1))]


@pytest.mark.parametrize("shape, out", SIZES)
def test_resize_keeps_the_aspect_and_is_pillows_lanczos(shape, out):
    image = noise(*shape)
    resized = transforms.resize_shorter(image, 12)
    assert resized.shape == out and resized.dtype == np.uint8
    for c in range(shape[-1]):
        expected = Image.fromarray(image[..., c]).resize((out[1], out[0]), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(resized[..., c], np.asarray(expected))


def test_resize_to_its_own_size_is_the_image_itself():
    image = noise(17, 40, 3)
    assert transforms.resize_shorter(image, 17) is image


@pytest.mark.parametrize("n, offset", [(8, 0), (10, 1), (11, 2), (13, 2)])  # 1.5 -> 2, 2.5 -> 2
def test_center_crop(n, offset):
    image = noise(8, n, 3)
    got, view = Preprocess(channels=3, image_size=8).look({"image": image, "label": 0})
    np.testing.assert_array_equal(got["image"], image[:, offset : offset + 8])
    assert view == (0, offset, False)


def test_random_crop_is_uniform_over_all_places_and_says_where_it_is():
    image = np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1)
    rng = np.random.default_rng(0)
    preprocess = Preprocess(channels=1, image_size=4, mid_scale=1.25, train=True)
    results = [preprocess.look({"image": image, "label": 0}, rng) for _ in range(1200)]
    corners = [int(example["image"][0, 0, 0]) for example, _ in results]
    assert corners == [6 * view.top + view.left for _, view in results]
    places, counts = np.unique(corners, return_counts=True)
    assert places.tolist() == [0, 1, 2, 6, 7, 8]
    assert abs(counts - 200).max() < 60  # 4.6 standard deviations


def test_flip_mirrors_left_and_right_half_of_the_time_and_says_so():
    image = noise(4, 5, 3)
    rng = np.random.default_rng(0)
    preprocess = Preprocess(channels=3, flip=True, train=True)
    results = [preprocess.look({"image": image, "label": 0}, rng) for _ in range(400)]
    for example, view in results:
        np.testing.assert_array_equal(example["image"], np.fliplr(image) if view.flip else image)
    assert 150 < sum(view.flip for _, view in results) < 250


def test_preprocess_composes_resize_to_mid_crop_and_channels():
    example = {"image": noise(40, 50, 3), "label": 3}
    out = Preprocess(channels=1, image_size=16, mid_scale=1.125)(example)
    grey = Image.fromarray(example["image"]).convert("L").resize((22, 18), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(out["image"][..., 0], np.asarray(grey)[1:17, 3:19])
    assert out["label"] == 3

    train = Preprocess(channels=1, image_size=16, mid_scale=1.125, train=True)
    cropped = train(example, np.random.default_rng(1))["image"][..., 0]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(grey), (16, 16)).reshape(-1, 16, 16)
    assert (windows == cropped).all(axis=(1, 2)).sum() == 1


def test_preprocess_grey_to_colour_resizes_each_copy_alike():
    grey = noise(28, 28, 1)
    preprocess = Preprocess(channels=3, image_size=32)
    one, three = (preprocess({"image": image, "label": 0})["image"] for image in (grey, grey.repeat(3, -1)))
    np.testing.assert_array_equal(one, three)


def test_preprocess_without_work_to_do_passes_the_image_through():
    image = noise(8, 9, 1)
    assert Preprocess(channels=1)({"image": image, "label": 0})["image"] is image


def test_only_training_that_crops_or_flips_is_random():
    assert Preprocess(channels=3, flip=True, train=True).random
    assert Preprocess(channels=3, image_size=8, train=True).random
    assert not Preprocess(channels=3, train=True).random
    assert not Preprocess(channels=3, image_size=8, flip=True).random


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8)])
def test_preprocess_names_a_wrong_dtype_or_rank(image):
    with pytest.raises(ValueError, match=str(image.dtype)):
        Preprocess(channels=3)({"image": image, "label": 0})


def test_pixels_and_back_is_exact_for_every_value():
    x = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    y = jax.jit(pixels)(x)
    assert y.dtype == jnp.float32 and float(y.min()) == -1.0 and float(y.max()) == 1.0
    np.testing.assert_allclose(np.asarray(y).ravel(), np.linspace(-1, 1, 256), atol=1e-7)
    np.testing.assert_array_equal(jax.jit(to_uint8)(y), x)


def test_to_uint8_rounds_and_clips():
    values = jnp.array([-3.0, -1.0 + 0.4 / 127.5, -1.0 + 0.6 / 127.5, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 1, 255]


def test_conversions_refuse_the_other_kind_of_dtype():
    with pytest.raises(ValueError, match="float32"):
        pixels(jnp.zeros((1, 2, 2, 1)))
    with pytest.raises(ValueError, match="uint8"):
        to_uint8(jnp.zeros((1, 2, 2, 1), jnp.uint8))
