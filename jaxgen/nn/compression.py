"""Fewer visual tokens for a drafter: pruned, pooled, convolved or resampled, by one way or by the one that suits an input."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.nn.attention import attend

__all__ = ["WAYS", "Compressed", "ElasticCompressor"]

WAYS = ("keep", "prune", "pool", "conv", "resample", "drop")


class Compressed(NamedTuple):
    """What is left of a picture.

    Attributes:
      tokens: m vectors; those behind `count` mean nothing.
      count: how many there are, of each row.
      gates: the weight of each way, in the order of the compressor's `ways`: one is 1.
    """

    tokens: Float[Array, "b m d"]
    count: Int[Array, "b"]
    gates: Float[Array, "b w"]


class ElasticCompressor(nn.Module):
    """Picks one of several ways to compress a grid of visual tokens, by the picture and the question (SpecVLM, Huang et al. 2025,
    arXiv:2509.11815, the elastic visual compressor with its dynamic choice of one expert).

    The ways, for a stride s on a grid of h w tokens: "keep" leaves all; "prune" keeps the h w / s^2 of highest learned
    score, in their order, times twice the sigmoid of the score; "pool" takes means of s x s tokens; "conv" a strided
    convolution; "resample" the attention of h w / s^2 learned queries to all tokens; "drop" leaves none, for questions about
    the text alone. A linear gate reads the mean visual token and the question. Training draws the way by Gumbel-softmax, hard
    forwards and soft backwards; else the gate's largest logit decides. How the released gate looks inside is not published.

    Attributes:
      grid: (h, w).
      stride: s; divides both.
      ways: of `WAYS`.
      heads: of "resample".
      dtype: of the computation.
    """

    grid: tuple[int, int]
    stride: int = 2
    ways: tuple[str, ...] = ("prune", "pool", "conv", "resample", "drop")
    heads: int = 2
    dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if not self.ways or any(way not in WAYS for way in self.ways) or len(set(self.ways)) < len(self.ways):
            raise ValueError(f"ways={self.ways}: expected some of {', '.join(WAYS)}")
        if self.stride < 1 or any(n % self.stride for n in self.grid):
            raise ValueError(f"stride={self.stride} must divide the grid {self.grid}")

    @property
    def most(self) -> int:
        """m, the tokens that the way with the most leaves."""
        return max(self._counts)

    @property
    def _counts(self) -> tuple[int, ...]:
        h, w = self.grid
        few = h * w // self.stride**2
        return tuple({"keep": h * w, "drop": 0}.get(way, few) for way in self.ways)

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], question: Float[Array, "b d"], key=None) -> Compressed:
        """
        Args:
          x: visual tokens, n = h w, row by row.
          question: what the gate knows of the text.
          key: of the Gumbel noise in training; None takes the largest gate.
        """
        b, n, _ = x.shape
        if n != self.grid[0] * self.grid[1]:
            raise ValueError(f"{n} visual tokens: expected the grid {self.grid}")
        logits = nn.Dense(len(self.ways), name="gate")(jnp.concatenate([x.mean(1), question], axis=-1).astype(jnp.float32))
        soft = jax.nn.softmax(logits if key is None else logits + jax.random.gumbel(key, logits.shape))
        gates = jax.nn.one_hot(soft.argmax(-1), len(self.ways))
        if key is not None:
            gates = gates + soft - jax.lax.stop_gradient(soft)
        made = [getattr(self, f"_{way}")(x) for way in self.ways]
        made = [jnp.pad(tokens, ((0, 0), (0, self.most - tokens.shape[1]), (0, 0))) for tokens in made]
        tokens = (gates[:, :, None, None] * jnp.stack(made, axis=1)).sum(1)
        return Compressed(tokens, jnp.array(self._counts, jnp.int32)[soft.argmax(-1)], gates)

    def _windows(self, x):
        """[b, h / s, w / s, s s, d]."""
        (h, w), s = self.grid, self.stride
        x = x.reshape(x.shape[0], h // s, s, w // s, s, -1)
        return x.swapaxes(2, 3).reshape(x.shape[0], h // s, w // s, s * s, -1)

    def _keep(self, x):
        return x

    def _prune(self, x):
        score = nn.Dense(1, name="score")(x)[..., 0]
        _, index = jax.lax.top_k(score, x.shape[1] // self.stride**2)
        index = jnp.sort(index, axis=1)[..., None]
        kept = jnp.take_along_axis(x, index, axis=1)
        return kept * 2 * nn.sigmoid(jnp.take_along_axis(score[..., None], index, axis=1))

    def _pool(self, x):
        return self._windows(x).mean(3).reshape(x.shape[0], -1, x.shape[-1])

    def _conv(self, x):
        """Windows do not overlap, so that the convolution is a linear map of each."""
        windows = self._windows(x)
        flat = windows.reshape(x.shape[0], windows.shape[1] * windows.shape[2], -1)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="conv")(flat)

    def _resample(self, x):
        d, count = x.shape[-1], x.shape[1] // self.stride**2
        queries = self.param("queries", nn.initializers.normal(0.5), (count, d))
        place = self.param("place", nn.initializers.normal(0.5), (x.shape[1], d))

        def heads(y, name):
            return nn.DenseGeneral((self.heads, d // self.heads), dtype=self.dtype, name=name)(y)

        q = heads(jnp.broadcast_to(queries, (x.shape[0], count, d)), "q")
        out = attend(q, heads(x + place, "k"), heads(x, "v"))
        return nn.DenseGeneral(d, axis=(-2, -1), dtype=self.dtype, name="o")(out)

    def _drop(self, x):
        return x[:, :0]
