"""Pixels as tokens: nothing is learnt, and nothing but the fineness of the values is lost."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.orders import Order, raster

__all__ = ["PixelTokenizer"]


class PixelTokenizer(nn.Module):
    """Images in [-1, 1] <-> one token for each value, on a grid of H C rows and W columns.

    A row of pixels is C rows of tokens, one a channel, so that of a model that sees all rows above the later channels see the
    earlier ones (Ho et al. 2019, the authors' `MultiChannelTransformer2d`). There are no parameters: `apply({}, ...)`.

    Attributes:
      channels: C of the images.
      size: H and W.
      levels: values of a token; 256 keeps 8-bit images as they are.

    Raises:
      ValueError: images without pixels or with one level.

    Example:
      >>> tokens = PixelTokenizer(channels=3, size=(32, 32)).apply({}, images, method="encode")   # [b, 3072], 0..255
    """

    channels: int = 3
    size: tuple[int, int] = (32, 32)
    levels: int = 256

    def __post_init__(self):
        if min(self.channels, *self.size) < 1 or self.levels < 2:
            raise ValueError(
                f"channels={self.channels}, size={self.size}, levels={self.levels}: expected pixels of at least two levels"
            )
        super().__post_init__()

    @property
    def vocab(self) -> int:
        """Values of a token."""
        return self.levels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.size[0] * self.channels, self.size[1]

    @property
    def order(self) -> Order:
        """Value by value."""
        return raster(self.grid[0] * self.grid[1])

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.size

    def encode(self, images: Float[Array, "b H W C"]) -> Int[Array, "b l"]:
        """The nearest levels, in raster order of the grid.

        Raises:
          ValueError: images of another size or number of channels, or not floating-point.
        """
        want = (*self.size, self.channels)
        if images.ndim != 4 or images.shape[1:] != want or not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images {images.shape} {images.dtype}: expected floating-point [b, {', '.join(map(str, want))}]")
        values = jnp.round((images + 1) / 2 * (self.levels - 1)).astype(jnp.int32)
        return jnp.clip(values, 0, self.levels - 1).swapaxes(2, 3).reshape(len(images), -1)

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b H W C"]:
        """Images in [-1, 1]."""
        values = tokens.reshape(-1, self.size[0], self.channels, self.size[1]).swapaxes(2, 3)
        return values / (self.levels - 1) * 2 - 1.0
