"""Token shuffle: s x s neighbouring tokens as one vector, and back (S026).

Ma et al. 2025, *Token-Shuffle: towards high-resolution image generation with autoregressive models* (arXiv:2504.17789). Neither
code of the authors nor the paper's text was to be had, only accounts of it: compression to d / s^2, two residual MLPs on either
side. The widths inside the MLPs and the norms before them are chosen here.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.nn.adaln import layer_norm
from jaxgen.nn.mlp import MLP
from jaxgen.nn.placement import place_stream

__all__ = ["TokenShuffle", "TokenUnshuffle", "compressed_width", "window_order"]


def window_order(grid: tuple[int, int], window: int) -> Int[np.ndarray, "h*w"]:
    """The raster numbers of a grid's cells, window by window: windows and the cells of each in raster order.

    `tokens[:, window_order(...)]` puts tokens in this order, and `np.argsort` of it back.

    Raises:
      ValueError: windows that do not fill the grid.

    Example:
      >>> window_order((2, 4), 2)
      array([0, 1, 4, 5, 2, 3, 6, 7])
    """
    h, w = grid
    if window < 1 or h % window or w % window:
        raise ValueError(f"window={window}: must divide both sides of the grid, {h} x {w}")
    cells = np.arange(h * w).reshape(h // window, window, w // window, window)
    return cells.transpose(0, 2, 1, 3).reshape(-1)


def compressed_width(width: int, window: int) -> int:
    """Numbers that a token has in a vector that a whole window shares.

    Raises:
      ValueError: a width that the square of the window does not divide.
    """
    if window < 1 or width % window**2:
        raise ValueError(f"window={window}: its square must divide the width, {width}")
    return width // window**2


class _Mixing(nn.Module):
    """`blocks` times x + mlp(norm(x)): what the tokens of a window have to do with one another."""

    blocks: int
    init_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        init = nn.initializers.normal(self.init_std)
        for i in range(self.blocks):
            mlp = MLP(x.shape[-1], kernel_init=init, out_init=init, dtype=self.dtype, name=f"mlp_{i}")
            x = place_stream(x + mlp(layer_norm(x).astype(self.dtype)).astype(x.dtype))
        return x


class _OfWindows(nn.Module):
    """What both ways have: fields, and that the window fits the width."""

    width: int
    window: int
    blocks: int = 2
    init_std: float = 0.02
    dtype: Any = jnp.float32

    def __post_init__(self):
        compressed_width(self.width, self.window)
        super().__post_init__()


class TokenShuffle(_OfWindows):
    """Windows of s^2 tokens of width d as one vector of width d each: every token in d / s^2 numbers, joined and mixed.

    Attributes:
      width: d.
      window: s.
      blocks: residual MLPs after joining.
      init_std: of all kernels.
      dtype: of the computation.

    Raises:
      ValueError: a width that s^2 does not divide.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b m*s*s d"]) -> Float[Array, "b m d"]:
        """Tokens, window by window (see `window_order`) -> one vector a window."""
        init, x = nn.initializers.normal(self.init_std), place_stream(x)
        x = nn.Dense(compressed_width(self.width, self.window), kernel_init=init, dtype=self.dtype, name="compress")(x)
        x = place_stream(x.reshape(x.shape[0], -1, self.width))
        return _Mixing(self.blocks, self.init_std, self.dtype, name="mix")(x)


class TokenUnshuffle(_OfWindows):
    """The way back: one vector a window, mixed, cut into s^2 and widened to d each.

    Attributes and errors are those of `TokenShuffle`.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m*s*s d"]:
        """One vector a window -> tokens, window by window."""
        init = nn.initializers.normal(self.init_std)
        x = _Mixing(self.blocks, self.init_std, self.dtype, name="mix")(place_stream(x.astype(self.dtype)))
        x = place_stream(x.reshape(x.shape[0], -1, compressed_width(self.width, self.window)))
        return place_stream(nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="expand")(x))
