"""A next-token transformer that reads and predicts s x s neighbouring tokens as one (S026 Token-Shuffle)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.decoding.step import Out, View
from jaxgen.generators.next_token import NextTokenTransformer
from jaxgen.generators.next_token_sampler import NextTokenSampler
from jaxgen.nn.token_shuffle import TokenShuffle, TokenUnshuffle, compressed_width, window_order
from jaxgen.orders import Order

__all__ = ["ShuffledSampler", "ShuffledTransformer"]


class ShuffledTransformer(NextTokenTransformer):
    """Class label and the windows so far -> logits of all tokens of the next window (Ma et al. 2025).

    The blocks see a sequence of l / s^2 vectors, one a window; the tokens of a window are independent of one another given
    the earlier windows.

    Attributes:
      window: s, tokens along a side of a window; it divides the grid's side sqrt(l), and its square the width.
      mixing: residual MLPs of `TokenShuffle`, and as many of `TokenUnshuffle`.
      vocab, num_classes, length, width, ...: see `NextTokenTransformer`.

    Raises:
      ValueError: tokens that make no square, or a window that does not divide it or the width.
    """

    window: int = 2
    mixing: int = 2

    def __post_init__(self):
        if round(self.length**0.5) ** 2 != self.length:
            raise ValueError(f"length={self.length}: tokens of a square grid are expected")
        window_order(self.grid, self.window)
        compressed_width(self.width, self.window)
        super().__post_init__()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return (round(self.length**0.5),) * 2

    @property
    def order(self) -> Order:
        """A window a step."""
        return Order(((self.window, self.window),) * (self.length // self.window**2))

    def setup(self):
        super().setup()
        fields = dict(width=self.width, window=self.window, blocks=self.mixing, init_std=self.init_std, dtype=self.dtype)
        self.shuffle, self.unshuffle = TokenShuffle(**fields), TokenUnshuffle(**fields)

    def read(self, tokens: Int[Array, "b q*s*s"]) -> Float[Array, "b q d"]:
        """One vector a window."""
        return self.shuffle(self.token_embed(tokens))

    def logits(self, x: Float[Array, "b q d"], cond: Float[Array, "b d"]) -> Float[Array, "b q*s*s v"]:
        """The laws of the windows' tokens."""
        return self.head(self.unshuffle(x), cond)

    def arrange(self, tokens: Int[Array, "b l"]) -> Int[Array, "b l"]:
        """See `TokenModel`; tokens are made window by window."""
        return tokens[:, np.argsort(window_order(self.grid, self.window))]

    def __call__(self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits of tokens in raster order: a window is predicted from the class and earlier windows."""
        order = window_order(self.grid, self.window)
        return super().__call__(labels, tokens[:, order], train=train)[:, np.argsort(order)]

    def step(self, cache, view: View, labels: Int[Array, "b"]) -> tuple[Out, object]:
        """The seam of `jaxgen.decoding`, of whole windows, in the order of `window_order`.

        Args:
          cache: with a place a window.
          view: `tokens` [b, q s^2] of the windows *before* those at `pos` [q s^2]; the mask is of windows, [q, q].
          labels: [b].
        """
        pos = jnp.asarray(view.pos)[..., :: self.window**2] // self.window**2
        return super().step(cache, view._replace(pos=pos), labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffledSampler(NextTokenSampler):
    """`NextTokenSampler` of a `ShuffledTransformer`: s^2 tokens a call. Tokens are returned in raster order."""

    generator: ShuffledTransformer
    merged = True
