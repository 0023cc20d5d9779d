import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.resample import area_matrix, bicubic_matrix, bilinear_matrix, blur, gaussian_matrix, resize

SMALL = np.round(np.sin(np.arange(12) * 1.7) * 4).reshape(3, 4)
LARGE = np.round(np.cos(np.arange(35) * 2.3) * 4).reshape(5, 7)
# torch 2.13, torch.nn.functional.interpolate(x[None, None].double(), size, mode=method, align_corners=False).
TORCH = [
    (
        "bicubic",
        SMALL,
        [
            [-0.61744023, 1.57069315, 4.07718294, 2.36325, -1.22814213, -3.34050948, -4.52774854],
            [0.40833491, 2.05076567, 3.76237792, 1.418625, -2.04396829, -3.08488666, -3.45395262],
            [1.90078353, 2.70973032, 3.2199344, 0.0, -3.2199344, -2.70973032, -1.90078353],
            [2.79965525, 2.97948761, 2.62165087, -0.99675, -3.89275, -2.47336224, -0.99476822],
            [3.21426603, 3.0588207, 2.24935131, -1.507, -4.19051749, -2.36063994, -0.58730102],
        ],
    ),
    (
        "bicubic",
        LARGE,
        [
            [0.5806297, -0.28477648, -0.91007487, 0.59715893],
            [0.08203125, 2.3671875, -3.09472656, 0.62353516],
            [-0.83050311, 1.37069589, 0.00382487, -0.54390914],
        ],
    ),
    (
        "bilinear",
        SMALL,
        [
            [0.0, 1.42857143, 3.71428571, 1.5, -1.21428571, -2.92857143, -4.0],
            [0.8, 1.8, 3.4, 0.9, -1.9, -2.7, -3.2],
            [2.0, 2.35714286, 2.92857143, 0.0, -2.92857143, -2.35714286, -2.0],
            [2.6, 2.52857143, 2.41428571, -0.6, -3.44285714, -2.18571429, -1.4],
            [3.0, 2.64285714, 2.07142857, -1.0, -3.78571429, -2.07142857, -1.0],
        ],
    ),
    ("bilinear", LARGE, [[-0.40625, -0.75, 1.65625, -0.5], [-0.09375, -1.0625, 1.125, 0.03125]]),
    (
        "area",
        LARGE,
        [
            [0.25, 0.16666667, 0.0, 0.0],
            [0.16666667, 0.22222222, 0.0, -0.33333333],
            [-0.25, 0.16666667, 0.0, -0.25],
        ],
    ),
    ("area", SMALL, [[2.25, 0.75, -2.5], [2.5, -0.5, -2.5]]),
    (
        "area",
        SMALL,
        [
            [0.0, 2.0, 4.0, -1.0, -2.5, -4.0],
            [1.0, 2.25, 3.5, -2.0, -2.5, -3.0],
            [2.0, 2.5, 3.0, -3.0, -2.5, -2.0],
            [2.5, 2.5, 2.5, -3.5, -2.5, -1.5],
            [3.0, 2.5, 2.0, -4.0, -2.5, -1.0],
        ],
    ),
]


@pytest.mark.parametrize(("method", "image", "want"), TORCH)
def test_equals_torch(method, image, want):
    want = np.array(want)
    x = jnp.stack([image, 2 * image + 1])[..., None].astype(jnp.float32)
    got = resize(x, want.shape, method)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0, ..., 0], want, atol=2e-6)
    np.testing.assert_allclose(got[1, ..., 0], 2 * want + 1, atol=4e-6)  # weights sum to 1


def test_jax_image_resize_is_another_function():
    """The trap that this module exists for: jax's "cubic" differs from the published tokenizers' by far more than rounding."""
    image, want = TORCH[0][1], np.array(TORCH[0][2])
    jax_cubic = jax.image.resize(jnp.asarray(image, jnp.float32), want.shape, "cubic")
    assert np.abs(jax_cubic - want).max() > 0.1


def test_bicubic_weights_from_the_kernel_s_definition():
    def kernel(x, a=-0.75):  # Keys 1981, eq. 4
        x = abs(x)
        if x < 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    for n_in, n_out in ((1, 4), (3, 16), (13, 16), (7, 3)):
        want = np.zeros((n_out, n_in))
        for i in range(n_out):
            source = (i + 0.5) * n_in / n_out - 0.5
            for j in range(math.floor(source) - 4, math.floor(source) + 6):
                want[i, np.clip(j, 0, n_in - 1)] += kernel(source - j)
        np.testing.assert_allclose(bicubic_matrix(n_in, n_out), want, atol=1e-12)


def test_area_is_the_mean_of_the_cells_a_bin_touches():
    x = np.random.default_rng(0).normal(size=16)
    for n_out in (1, 2, 3, 5, 6, 10, 13, 16):
        want = [x[math.floor(i * 16 / n_out) : math.ceil((i + 1) * 16 / n_out)].mean() for i in range(n_out)]
        np.testing.assert_allclose(area_matrix(16, n_out) @ x, want, atol=1e-12)


def test_bilinear_reproduces_a_ramp_inside():
    ramp = np.arange(5.0)
    out = bilinear_matrix(5, 10) @ ramp
    np.testing.assert_allclose(out[1:-1], np.arange(10)[1:-1] * 0.5 - 0.25, atol=1e-12)
    np.testing.assert_allclose(out[[0, -1]], [0, 4])  # clamped


def test_equal_sizes_change_nothing():
    x = jnp.asarray(LARGE, jnp.float32)[None, ..., None]
    for method in ("area", "bicubic", "bilinear"):
        np.testing.assert_array_equal(resize(x, (5, 7), method), x)


def test_errors():
    x = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match="'lanczos' is not one of"):
        resize(x, (4, 4), "lanczos")
    with pytest.raises(ValueError, match="dtype uint8"):
        resize(x.astype(jnp.uint8), (4, 4), "area")


def test_enlargement_that_the_sizes_do_not_say():
    """The first places of a larger result are those of a smaller one that is enlarged as much."""
    np.testing.assert_allclose(bicubic_matrix(3, 5, 2.0), bicubic_matrix(3, 6)[:5], atol=1e-12)
    assert np.abs(bicubic_matrix(3, 5, 2.0) - bicubic_matrix(3, 5)).max() > 0.01


def test_blur():
    """A point becomes the window, of 9 taps for 1 pixel; nothing comes in from beyond the border."""
    window = np.exp(-0.5 * np.arange(-4, 5) ** 2)
    window /= window.sum()
    image = jnp.zeros((1, 11, 11, 1)).at[0, 5, 5].set(1.0)
    np.testing.assert_allclose(blur(image, 1.0)[0, 1:10, 1:10, 0], np.outer(window, window), atol=1e-6)
    assert gaussian_matrix(11, 1.0)[0].sum() == pytest.approx(window[4:].sum())
    assert blur(image, 0) is image
