"""Residual quantisation by frequency bands, low to high (S007 NFIG, Huang et al. 2025, arXiv 2503.07076, section 3.1).

The features are cut into bands, f = sum_k f_k. Scale k of a multi-scale quantiser then writes down what the bands up to k hold
and the scales before have not written: v_k = R_{k-1} + f_k, and R_k = v_k - (what the code map of v_k adds), with R_0 = 0.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxgen.orders import Order
from jaxgen.quantizers.multi_scale import MultiScaleQuantizer

__all__ = ["FrequencyQuantizer", "band_masks", "cut_bands"]

DIVISIONS = ("tokens", "grid")
TRANSFORMS = ("fft", "dct")


class FrequencyQuantizer(MultiScaleQuantizer):
    """`MultiScaleQuantizer` in which each scale brings a frequency band in, rather than the first one everything.

    Attributes:
      division, transform: see `band_masks`.

    Raises:
      ValueError: an unknown division or transform.
    """

    division: str = "tokens"
    transform: str = "fft"

    def __post_init__(self):
        for name, known in (("division", DIVISIONS), ("transform", TRANSFORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        super().__post_init__()

    def bands(self, features: Float[Array, "b h w c"]) -> list[Float[Array, "b h w c"]]:
        """The features' bands, one a scale."""
        return cut_bands(features, band_masks(self.order, self.division, self.transform), self.transform)


@functools.cache
def band_masks(order: Order, division: str, transform: str) -> Bool[np.ndarray, "K h w"]:
    """Which frequencies of the last scale's grid belong to each scale's band; each belongs to one.

    Args:
      order: the scales.
      division: "tokens", as published: band k ends at the radius sigma_k = sigma_max (tokens up to scale k) / (all tokens), with
        sigma_max the largest radius there is (section 3.2). The first bands then hold the mean alone, or nothing: on the
        published grids the second to the fifth. "grid": band k ends at the highest frequency that the scale's own grid can
        hold, in either direction. With "dct" a grid of p x q cells brings the number of frequencies up to p q; those of "fft"
        come in pairs, so that some bands are empty.
      transform: "fft" or "dct", whose frequencies they are, in the order that the transform puts them.
    """
    h, w = order.shapes[-1]
    if transform == "fft":
        rows, columns = np.abs(np.fft.fftfreq(h)), np.abs(np.fft.fftfreq(w))
    else:
        rows, columns = np.arange(h) / (2 * h), np.arange(w) / (2 * w)
    # The highest of p frequencies is half of the sampling rate, or half a step below it.
    most = 0 if transform == "fft" else 1
    if division == "tokens":
        radius = np.hypot(rows[:, None], columns)
        # The last band takes what rounding might leave outside.
        ends = [radius.max() * end / order.length for end in order.ends[:-1]] + [np.inf]
        low = np.stack([radius <= end for end in ends])
    else:
        low = np.stack([(rows[:, None] <= (p - most) / (2 * h)) & (columns <= (q - most) / (2 * w)) for p, q in order.shapes])
    masks = np.diff(low, axis=0, prepend=False)
    masks.setflags(write=False)
    return masks


def cut_bands(
    features: Float[Array, "b h w c"], masks: Bool[np.ndarray, "K h w"], transform: str
) -> list[Float[Array, "b h w c"]]:
    """The parts of `features` under each mask: f_k = T^-1(T(f) * mask_k), T along both axes of the map.

    Args:
      features: maps.
      masks: symmetric in the sign of the frequency where the transform is "fft", so that the parts are real.
      transform: "fft", which takes the map as periodic, or "dct" (type II), which continues it by its mirror image.
    """
    if transform == "fft":
        spectrum = jnp.fft.fft2(features, axes=(1, 2))
        parts = [jnp.fft.ifft2(spectrum * mask[..., None], axes=(1, 2)).real for mask in masks]
    else:
        rows, columns = (jnp.asarray(_cosines(n), features.dtype) for n in features.shape[1:3])
        spectrum = jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, features, precision="highest")
        parts = [jnp.einsum("Hh,Ww,bHWc->bhwc", rows, columns, spectrum * mask[..., None], precision="highest") for mask in masks]
    return [part.astype(features.dtype) for part in parts]


@functools.cache
def _cosines(n: int) -> np.ndarray:
    """[n, n], the orthonormal cosine transform: a row a frequency."""
    k = np.arange(n)[:, None]
    rows = np.cos(np.pi * k * (np.arange(n) + 0.5) / n) * np.sqrt(2 / n)
    rows[0] /= np.sqrt(2)
    return rows
