"""Image resampling as matrix products, with the exact weights of PyTorch's `interpolate`.

`jax.image.resize("cubic")` uses another kernel (a = -0.5, antialiased, renormalised at borders); published tokenizers
were trained with a = -0.75, no antialiasing and clamped borders, so the weights are written out here.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["area_matrix", "bicubic_matrix", "bilinear_corners_matrix", "bilinear_matrix", "blur", "gaussian_matrix", "resize"]


def _taps(n_in: int, n_out: int, offsets: range, weight, ratio: float | None = None) -> np.ndarray:
    """[n_out, n_in] from `weight(distance)` over taps around each source coordinate, indices clamped to the border."""
    out = np.zeros((n_out, n_in))
    for i in range(n_out):
        source = (i + 0.5) * (n_in / n_out if ratio is None else 1 / ratio) - 0.5
        base = math.floor(source)
        for offset in offsets:
            out[i, min(max(base + offset, 0), n_in - 1)] += weight(abs(source - base - offset))
    return out


@functools.cache
def bicubic_matrix(n_in: int, n_out: int, ratio: float | None = None) -> np.ndarray:
    """[n_out, n_in] cubic convolution (Keys 1981) with a = -0.75, half-pixel centres, clamped borders.

    `ratio` is the enlargement where it is not n_out / n_in: PyTorch's `interpolate` goes by the `scale_factor` it is given.
    """
    a = -0.75

    def weight(x):
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    return _taps(n_in, n_out, range(-1, 3), weight, ratio)


@functools.cache
def bilinear_matrix(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in] linear interpolation, half-pixel centres, clamped borders, no antialiasing."""
    return _taps(n_in, n_out, range(0, 2), lambda x: max(0.0, 1 - x))


@functools.cache
def bilinear_corners_matrix(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in] linear interpolation at i n_in / n_out, clamped borders: `tf.image.resize_bilinear` of TensorFlow 1.

    Places are computed in float32, as TensorFlow does, so that the weights are its own.
    """
    place = np.arange(n_out, dtype=np.float32) * np.float32(n_in / n_out)
    low = np.minimum(place.astype(int), n_in - 1)
    share = (place - low).astype(np.float64)
    out = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    np.add.at(out, (rows, low), 1 - share)
    np.add.at(out, (rows, np.minimum(low + 1, n_in - 1)), share)
    return out


@functools.cache
def area_matrix(n_in: int, n_out: int) -> np.ndarray:
    """[n_out, n_in] means over the bins [floor(i n_in / n_out), ceil((i + 1) n_in / n_out))."""
    out = np.zeros((n_out, n_in))
    for i in range(n_out):
        start, end = (i * n_in) // n_out, -((-(i + 1) * n_in) // n_out)
        out[i, start:end] = 1 / (end - start)
    return out


@functools.cache
def gaussian_matrix(n: int, sigma: float) -> np.ndarray:
    """[n, n] Gaussian window of the odd size next to 8 sigma, normalised; what lies beyond the border is 0."""
    reach = math.ceil(4 * sigma)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    distance = np.arange(n)[:, None] - np.arange(n)
    return np.where(np.abs(distance) <= reach, taps[np.clip(distance + reach, 0, 2 * reach)], 0.0)


_MATRIX = {
    "area": area_matrix,
    "bicubic": bicubic_matrix,
    "bilinear": bilinear_matrix,
    "bilinear_corners": bilinear_corners_matrix,
}


def resize(x: Float[Array, "b h w c"], size: tuple[int, int], method: str) -> Float[Array, "b H W c"]:
    """`x` resampled to `size` = (H, W), separably.

    Args:
      x: images or feature maps.
      size: the new height and width.
      method: "area", "bicubic", "bilinear" or "bilinear_corners".

    Raises:
      ValueError: an unknown method, or integers, on which the weights would round to 0.
    """
    if method not in _MATRIX:
        raise ValueError(f"method {method!r} is not one of {sorted(_MATRIX)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}: only floating-point arrays can be resampled")
    rows, columns = (jnp.asarray(_MATRIX[method](n, m), x.dtype) for n, m in zip(x.shape[1:3], size))
    if x.shape[1] != size[0]:
        x = jnp.einsum("Hh,bhwc->bHwc", rows, x, precision="highest")
    if x.shape[2] != size[1]:
        x = jnp.einsum("Ww,bhwc->bhWc", columns, x, precision="highest")
    return x


def blur(x: Float[Array, "b h w c"], sigma: float) -> Float[Array, "b h w c"]:
    """`x` behind a Gaussian window of `sigma` pixels, see `gaussian_matrix`; 0 is no window."""
    if not sigma:
        return x
    rows, columns = (jnp.asarray(gaussian_matrix(n, sigma), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, x, precision="highest")
