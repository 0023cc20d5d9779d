"""The perceptrons of a transformer block."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["GEGLU", "MLP"]


class MLP(nn.Module):
    """Dense, GELU, dense.

    Attributes:
      hidden: width of the hidden layer.
      out_init: initialiser of the second layer.
      exact: GELU by the error function, not in its tanh form.
      dtype: of the computation.
    """

    hidden: int
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    exact: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        h = nn.Dense(self.hidden, kernel_init=self.kernel_init, dtype=self.dtype, name="fc1")(x)
        h = nn.gelu(h, approximate=not self.exact)
        return nn.Dense(x.shape[-1], kernel_init=self.out_init, dtype=self.dtype, name="fc2")(h)


class GEGLU(nn.Module):
    """(gelu(x W1) * x W3) W2 with biases, and GELU by the error function (Shazeer 2020, equation 6).

    Attributes:
      silu: in place of GELU, which makes it SwiGLU.
      hidden, kernel_init, out_init, dtype: see `MLP`.
    """

    hidden: int
    silu: bool = False
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        gate = nn.Dense(self.hidden, kernel_init=self.kernel_init, dtype=self.dtype, name="gate_fc1")(x)
        h = nn.Dense(self.hidden, kernel_init=self.kernel_init, dtype=self.dtype, name="fc1")(x)
        h = (nn.silu(gate) if self.silu else nn.gelu(gate, approximate=False)) * h
        return nn.Dense(x.shape[-1], kernel_init=self.out_init, dtype=self.dtype, name="fc2")(h)
