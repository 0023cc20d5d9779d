"""Vector quantisation on the unit sphere: codes and features are compared by direction (ViT-VQGAN, Yu et al. 2022, sec. 3.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.quantizers.multi_scale import Quantized
from jaxgen.quantizers.vector import nearest

__all__ = ["SphericalQuantizer"]


class SphericalQuantizer(nn.Module):
    """One codebook of unit vectors. Its parameters have any length: they are normalised where they are looked up (LlamaGen).

    Attributes:
      vocab: v, number of codes.
      width: c, size of a code.
      beta: weight of the commitment term.
      codebook_init: half-width of the uniform initial codebook.
    """

    vocab: int = 8912
    width: int = 32
    beta: float = 0.25
    codebook_init: float = 1.0

    def setup(self):
        init = self.codebook_init

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -init, init)

        self.codebook = self.param("codebook", uniform, (self.vocab, self.width))

    def lookup(self, tokens) -> Float[Array, "*b c"]:
        """Unit codes of ids [*b], or mixtures of codes from probabilities [*b, v]."""
        codes = _unit(self.codebook)
        return codes[tokens] if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens @ codes

    def encode(self, features: Float[Array, "*b c"]):
        """Ids [*b] of the nearest codes."""
        return nearest(features, self.codebook, cosine=True)

    def __call__(self, features: Float[Array, "*b c"], weights: Float[Array, "*b"] | None = None) -> Quantized:
        """Quantises with straight-through gradients; `tokens` and `features` keep the leading axes.

        loss = beta |z - sg(e)|^2 + |sg(z) - e|^2, with z the normalised feature and e its code; its mean may be weighted.
        """
        z, sg = _unit(features), jax.lax.stop_gradient
        tokens = self.encode(sg(features))
        codes = self.lookup(tokens)
        loss = self.beta * _mean(jnp.square(z - sg(codes)), weights) + _mean(jnp.square(sg(z) - codes), weights)
        counts = jnp.zeros(self.vocab).at[tokens.reshape(-1)].add(1.0)
        return Quantized(z + sg(codes - z), tokens, loss, counts, sg(z).reshape(-1, self.width))


def _mean(x, weights):
    return x.mean() if weights is None else (x.mean(-1) * weights).sum() / weights.sum()


def _unit(x):
    """x / |x|, finite at 0, gradient included."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
