"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["MLP"]


class MLP(nn.Module):
    """Dense, GELU (tanh form), dense.

    Attributes:
      hidden: width of the hidden layer.
      out_init: initialiser of the second layer.
      dtype: of the computation.
    """

    hidden: int
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        h = nn.Dense(self.hidden, kernel_init=self.kernel_init, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(x.shape[-1], kernel_init=self.out_init, dtype=self.dtype, name="fc2")(nn.gelu(h))
