"""Multi-scale residual vector quantisation (Tian et al. 2024, algorithms 1 and 2).

A feature map f is written as a sum over scales: the residual is pooled to the scale's grid, each cell takes its nearest
code, the code map is enlarged again and smoothed by a convolution phi, and what it explains is subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.orders import Order, scales
from jaxgen.quantizers.vector import nearest
from jaxgen.resample import resize

__all__ = ["MultiScaleQuantizer", "Quantized"]


class Quantized(NamedTuple):
    """What training sees of a quantiser.

    Attributes:
      features: [b, h, w, c], quantised, with straight-through gradients.
      tokens: [b, l].
      loss: codebook and commitment loss, a scalar.
      counts: [v], how often each code was chosen.
      vectors: [b * l, c], what was quantised.
    """

    features: Float[Array, "b h w c"]
    tokens: Int[Array, "b l"]
    loss: Float[Array, ""]
    counts: Float[Array, "v"]
    vectors: Float[Array, "n c"]


class MultiScaleQuantizer(nn.Module):
    """A codebook shared by all scales, and partially shared smoothing convolutions.

    Attributes:
      vocab: v, number of codes.
      width: c, size of a code.
      patch_nums: grid of each scale, coarse to fine; the last is the grid of the features.
      phis: how many convolutions the scales share: each scale takes the one whose tick is nearest to k / (K - 1).
      phi_ratio: r in phi(x) = (1 - r) x + r conv(x).
      beta: weight of the commitment term.
      cosine: choose codes by cosine similarity.
      codebook_init: half-width of the uniform initial codebook.
    """

    vocab: int = 4096
    width: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    phis: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    cosine: bool = False
    codebook_init: float = 1.0

    def setup(self):
        if self.phis < 1:
            raise ValueError(f"phis={self.phis} must be at least 1")
        init = self.codebook_init

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -init, init)

        self.codebook = self.param("codebook", uniform, (self.vocab, self.width))
        self.phi = [nn.Conv(self.width, (3, 3), name=f"phi_{i}") for i in range(self.phis)]

    @property
    def order(self) -> Order:
        """The scales."""
        return scales(self.patch_nums)

    def _phi_of(self, scale: int) -> int:
        """Which convolution a scale uses; ties go to the first, and four ticks are spaced by thirds as published."""
        n = self.phis
        margin = 1 / (3 * n) if n == 4 else 1 / (2 * n)
        ticks = np.linspace(margin, 1 - margin, n)
        steps = len(self.patch_nums)
        return int(np.argmin(np.abs(ticks - (scale / (steps - 1) if steps > 1 else 0.0))))

    def _contribution(self, scale: int, codes: Float[Array, "b q c"]) -> Float[Array, "b h w c"]:
        """phi(enlarge(code map)): what one scale adds to the picture."""
        order = self.order
        size = order.shapes[-1]
        grid = resize(codes.reshape(codes.shape[0], *order.shapes[scale], self.width), size, "bicubic")
        smooth = self.phi[self._phi_of(scale)](grid)
        return (1 - self.phi_ratio) * grid + self.phi_ratio * smooth

    def lookup(self, tokens) -> Float[Array, "b q c"]:
        """Codes of ids [b, q], or mixtures of codes from probabilities [b, q, v]."""
        if jnp.issubdtype(tokens.dtype, jnp.integer):
            return self.codebook[tokens]
        return tokens @ self.codebook

    def feed(
        self, features: Float[Array, "b h w c"], scale: int, tokens
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b q c"] | None]:
        """Adds one scale's tokens to the picture; returns it and the next scale's input (None after the last)."""
        features = features + self._contribution(scale, self.lookup(tokens))
        if scale + 1 == self.order.steps:
            return features, None
        return features, self._pool(features, scale + 1)

    def _pool(self, features, scale: int):
        pooled = resize(features, self.order.shapes[scale], "area")
        return pooled.reshape(features.shape[0], -1, self.width)

    def empty(self, batch: int) -> Float[Array, "b h w c"]:
        """The picture before the first scale."""
        return jnp.zeros((batch, *self.order.shapes[-1], self.width))

    def encode(self, features: Float[Array, "b h w c"]) -> Int[Array, "b l"]:
        """Tokens of all scales, coarse to fine."""
        return self._quantize(jax.lax.stop_gradient(features))[0]

    def pictures(self, tokens: Int[Array, "b l"]) -> list[Float[Array, "b h w c"]]:
        """The quantised features after 1, 2, ... K scales."""
        picture, out = self.empty(tokens.shape[0]), []
        for scale, ids in enumerate(self.order.split(tokens)):
            picture, _ = self.feed(picture, scale, ids)
            out.append(picture)
        return out

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b h w c"]:
        """The quantised features of all scales."""
        return self.pictures(tokens)[-1]

    def inputs(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l-first c"]:
        """Teacher-forced inputs of a next-scale model: for scales 2..K, the picture so far, pooled to the scale's grid."""
        pictures = self.pictures(tokens)
        pooled = [self._pool(p, scale + 1) for scale, p in enumerate(pictures[:-1])]
        empty = jnp.zeros((tokens.shape[0], 0, self.width))
        return jnp.concatenate([empty, *pooled], axis=1)

    def _quantize(self, features):
        """Tokens, the picture after each scale, and the vectors that were looked up."""
        rest, picture = features, jnp.zeros_like(features)
        tokens, pictures, vectors = [], [], []
        for scale in range(self.order.steps):
            z = self._pool(jax.lax.stop_gradient(rest), scale)
            ids = nearest(z, self.codebook, cosine=self.cosine)
            add = self._contribution(scale, self.codebook[ids])
            picture, rest = picture + add, rest - add
            tokens.append(ids)
            pictures.append(picture)
            vectors.append(z.reshape(-1, self.width))
        return jnp.concatenate(tokens, axis=1), pictures, jnp.concatenate(vectors)

    def __call__(self, features: Float[Array, "b h w c"]) -> Quantized:
        """Quantises with straight-through gradients.

        loss = mean over scales of beta |f - sg(f_k)|^2 + |sg(f) - f_k|^2, with f_k the picture after k scales.

        Raises:
          ValueError: features whose grid is not the last scale's.
        """
        if features.shape[1:] != (*self.order.shapes[-1], self.width):
            raise ValueError(f"features {features.shape[1:]} do not have the shape {(*self.order.shapes[-1], self.width)}")
        fixed = jax.lax.stop_gradient(features)
        tokens, pictures, vectors = self._quantize(fixed)
        sg = jax.lax.stop_gradient
        loss = sum(
            self.beta * jnp.square(features - sg(p)).mean() + jnp.square(p - fixed).mean() for p in pictures
        ) / len(pictures)
        counts = jnp.zeros(self.vocab).at[tokens.reshape(-1)].add(1.0)
        quantized = features + sg(pictures[-1] - features)
        return Quantized(quantized, tokens, loss, counts, sg(vectors))
