"""How far a reconstruction is from its image: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["detail", "psnr", "ssim"]


def _check(a, b, data_range: float) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"images of shapes {a.shape} and {b.shape}: expected two equal shapes [b, H, W, C]")
    if not (jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating)):
        raise ValueError(f"images of dtypes {a.dtype} and {b.dtype}: expected floats")
    if not data_range > 0:
        raise ValueError(f"data_range={data_range}: must be > 0")


def psnr(a: Float[Array, "b H W C"], b: Float[Array, "b H W C"], data_range: float = 2.0) -> Float[Array, "b"]:
    """10 log10(data_range^2 / MSE) of each pair, in dB; infinite for equal images.

    Args:
      a: images.
      b: images of the same shape.
      data_range: largest minus smallest possible pixel.

    Raises:
      ValueError: shapes that differ or are not [b, H, W, C], integer images, or a data range that is not positive.

    Example:
      >>> psnr(jnp.zeros((1, 8, 8, 1)), jnp.full((1, 8, 8, 1), 0.2))  # 10 log10(4 / 0.04)
      Array([20.], dtype=float32)
    """
    _check(a, b, data_range)
    error = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).mean(axis=(1, 2, 3))
    return 10 * jnp.log10(data_range**2 / error)


def _window_matrix(n: int, size: int, sigma: float = 1.5) -> np.ndarray:
    """[n - size + 1, n]: each row is a normalised Gaussian window, one pixel further right than the row above."""
    taps = np.exp(-0.5 * np.square((np.arange(size) - size // 2) / sigma))
    taps /= taps.sum()
    return np.stack([np.pad(taps, (i, n - size - i)) for i in range(n - size + 1)])


def ssim(a: Float[Array, "b H W C"], b: Float[Array, "b H W C"], data_range: float = 2.0, low: float = -1.0) -> Float[Array, "b"]:
    """Structural similarity (Wang et al. 2004, eq. 13): mean over windows and channels of

      (2 m_a m_b + C1) (2 s_ab + C2) / ((m_a^2 + m_b^2 + C1) (s_a^2 + s_b^2 + C2)),

    with means m and (co)variances s under an 11x11 Gaussian window of sigma 1.5, C1 = (0.01 data_range)^2 and
    C2 = (0.03 data_range)^2, at the positions where the window lies inside the image.

    An image with a side under 11 pixels gets the largest odd window that fits (7x7 for 8x8 digits), same sigma.

    Args:
      a: images.
      b: images of the same shape.
      data_range: largest minus smallest possible pixel.
      low: the smallest possible pixel. The index is defined for pixels that start at 0 and is not shift-invariant, so
        this is subtracted first.

    Returns:
      [b], at most 1; 1 for equal images.

    Raises:
      ValueError: as `psnr`.
    """
    _check(a, b, data_range)
    height, width = a.shape[1:3]
    size = min(11, height, width)
    size -= 1 - size % 2
    rows, columns = (jnp.asarray(_window_matrix(n, size), jnp.float32) for n in (height, width))

    def mean(x):
        return jnp.einsum("hH,wW,bHWc->bhwc", rows, columns, x, precision="highest")

    a, b = a.astype(jnp.float32) - low, b.astype(jnp.float32) - low
    mean_a, mean_b = mean(a), mean(b)
    # Deviations from each image's own mean keep the subtraction below from cancelling in float32.
    a_centre, b_centre = a.mean(axis=(1, 2), keepdims=True), b.mean(axis=(1, 2), keepdims=True)
    da, db, ma, mb = a - a_centre, b - b_centre, mean_a - a_centre, mean_b - b_centre
    var_a, var_b, cov = mean(da * da) - ma * ma, mean(db * db) - mb * mb, mean(da * db) - ma * mb
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(axis=(1, 2, 3))


def detail(images: Float[np.ndarray, "n H W C"]) -> float:
    """The mean squared difference of neighbouring pixels, down and across: small for pictures that are blurred."""
    return float(np.square(np.diff(images, axis=1)).mean() + np.square(np.diff(images, axis=2)).mean())
