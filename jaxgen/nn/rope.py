"""Rotary position embedding in one, two or three dimensions."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["rotate"]


def rotate(x: Float[Array, "b l h d"], pos, *, theta: float = 10000.0) -> Float[Array, "b l h d"]:
    """Turns each pair of numbers (x_2i, x_2i+1) by the angle pos * theta^(-2i / d) (Su et al. 2021, equation 34).

    With n coordinates a position, the first d / n numbers turn with the first coordinate, and so on, as in the published
    image models (Sun et al. 2024): products of rotated queries and keys depend on differences of coordinates only. Where those
    are not even parts, the first coordinate, which is time, has the rest as well (Wan et al. 2025). Where one of several
    coordinates is negative the result is 0, which those models do to what is not a place in the image.

    Args:
      x: queries or keys.
      pos: one coordinate, [l] or [b, l], or n of them, [b or 1, l, n].
      theta: the longest wavelength is 2 pi theta.

    Raises:
      ValueError: a head size that is odd or below 2n, or positions that do not fit x.

    Example:
      >>> rotate(jnp.ones((1, 3, 2, 8)), jnp.arange(3)).shape
      (1, 3, 2, 8)
    """
    b, length, _, d = x.shape
    pos = jnp.asarray(pos)
    if pos.ndim == 1:
        pos = pos[None]
    if pos.ndim == 2:
        pos = pos[..., None]
    n = pos.shape[-1]
    if pos.ndim != 3 or pos.shape[1] != length or pos.shape[0] not in (1, b):
        raise ValueError(f"positions {pos.shape} do not fit x {x.shape}: expected [l], [b, l] or [b or 1, l, n]")
    if d % 2 or d < 2 * n:
        raise ValueError(f"head size {d}: expected an even number, at least 2 for each of {n} coordinates")
    part = d // (2 * n) * 2
    sizes = [d - (n - 1) * part] + [part] * (n - 1)
    rates = [theta ** (-jnp.arange(0, size, 2) / size) for size in sizes]
    angle = jnp.concatenate([pos[..., i, None].astype(jnp.float32) * rate for i, rate in enumerate(rates)], -1)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    turned = turned.reshape(x.shape).astype(x.dtype)
    return turned if n == 1 else jnp.where((pos >= 0).all(axis=-1)[..., None, None], turned, 0)
