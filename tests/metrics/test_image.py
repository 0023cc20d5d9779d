"""Oracle: the published formulas with explicit loops over windows, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxgen.metrics import detail, psnr, ssim


def images(shape, seed=0):
    a, noise = np.random.default_rng(seed).uniform(-1, 1, (2, *shape))
    a = ndimage.gaussian_filter(a, (0, 1, 1, 0)) * 2
    return np.clip(a, -1, 1), np.clip(a + 0.3 * noise, -1, 1)


def ssim_loops(a, b, window, data_range):
    a, b = a + 1, b + 1
    grid = np.arange(window) - (window - 1) / 2
    weight = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for c in range(a.shape[2]):
        for i in range(a.shape[0] - window + 1):
            for j in range(a.shape[1] - window + 1):
                x, y = (z[i : i + window, j : j + window, c] for z in (a, b))
                mx, my = (weight * x).sum(), (weight * y).sum()
                vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                cov = (weight * (x - mx) * (y - my)).sum()
                values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return np.mean(values)


def test_psnr_is_the_decibels_of_the_mean_square():
    a, b = images((3, 9, 7, 3))
    want = [10 * np.log10(4 / np.mean((x - y) ** 2)) for x, y in zip(a, b)]
    np.testing.assert_allclose(psnr(jnp.asarray(a), jnp.asarray(b)), want, rtol=1e-5)
    np.testing.assert_allclose(psnr(jnp.zeros((1, 8, 8, 1)), jnp.full((1, 8, 8, 1), 0.2)), [20.0], rtol=1e-6)
    half = psnr(jnp.asarray(a), jnp.asarray(b), data_range=1.0)
    np.testing.assert_allclose(half, np.array(want) - 20 * np.log10(2), rtol=1e-5)
    assert np.isposinf(psnr(jnp.asarray(a), jnp.asarray(a))).all()


@pytest.mark.parametrize("shape,window", [((2, 16, 13, 3), 11), ((2, 8, 8, 1), 7), ((1, 11, 11, 1), 11), ((1, 20, 6, 1), 5)])
@pytest.mark.parametrize("data_range", [2.0, 1.0])
def test_ssim_equals_a_loop_over_windows(shape, window, data_range):
    a, b = images(shape)
    want = [ssim_loops(x, y, window, data_range) for x, y in zip(a, b)]
    got = jax.jit(lambda x, y: ssim(x, y, data_range))(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_ssim_of_equal_constant_and_unrelated_images():
    a, _ = images((2, 16, 16, 1))
    np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(a)), 1.0, atol=1e-5)
    # Two constants differ in luminance only: (2xy + C1) / (x^2 + y^2 + C1) with x = 1, y = 1.5.
    flat = ssim(jnp.zeros((1, 12, 12, 1)), jnp.full((1, 12, 12, 1), 0.5))
    np.testing.assert_allclose(flat, (3 + 4e-4) / (3.25 + 4e-4), rtol=1e-5)
    assert float(ssim(jnp.asarray(a), jnp.asarray(-a))[0]) < 0


def test_low_is_where_pixels_start():
    a, b = (jnp.asarray(x) for x in images((1, 12, 12, 1)))
    np.testing.assert_allclose(ssim((a + 1) / 2, (b + 1) / 2, data_range=1.0, low=0.0), ssim(a, b), rtol=1e-4)
    assert abs(float(ssim(a, b, low=0.0)[0] - ssim(a, b)[0])) > 1e-3


@pytest.mark.parametrize("score", [psnr, ssim])
def test_bad_images(score):
    a = jnp.zeros((1, 8, 8, 1))
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 1\) and \(2, 8, 8, 1\)"):
        score(a, jnp.zeros((2, 8, 8, 1)))
    with pytest.raises(ValueError, match=r"\[b, H, W, C\]"):
        score(a[0], a[0])
    with pytest.raises(ValueError, match="uint8"):
        score(a.astype(jnp.uint8), a.astype(jnp.uint8))
    with pytest.raises(ValueError, match="data_range=0"):
        score(a, a, 0)


def test_detail_is_what_neighbours_differ_by():
    """Columns of 1 and 3, rows alike: 4 across and 0 down."""
    assert detail(np.array([[[[1.0], [3.0]], [[1.0], [3.0]]]])) == 4.0
