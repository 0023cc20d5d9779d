"""A layer of experts, of which every token uses a few."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(nn.Module):
    """sum_i w_i SwiGLU_i(x) over the `used` experts that a linear router ranks first, w their softmax (Jiang et al. 2024).

    No token is dropped: rows are sorted by expert and multiplied in groups. The collection "balance" receives the load that the
    Switch Transformer keeps even, e sum_i f_i p_i with f_i the share of choices and p_i the mean probability of expert i (Fedus
    et al. 2022, equation 4); it is 1 where all are used alike.

    Attributes:
      hidden: width of each expert.
      experts: e.
      used: k, by each token.
      init_std: of the kernels.
      out_std: of the experts' last kernels.
      dtype: of the computation; the router is float32.
    """

    hidden: int
    experts: int
    used: int = 2
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: Any = jnp.float32

    def setup(self):
        if not 1 <= self.used <= self.experts:
            raise ValueError(f"used={self.used}: must be in 1..experts={self.experts}")
        self.router = nn.Dense(self.experts, use_bias=False, kernel_init=nn.initializers.normal(self.init_std))

    def route(self, x: Float[Array, "b l d"]) -> tuple[Float[Array, "b l k"], Int[Array, "b l k"]]:
        """(weights, experts) of each token, the largest weight first."""
        values, chosen = jax.lax.top_k(self.router(x.astype(jnp.float32)), self.used)
        return jax.nn.softmax(values, axis=-1), chosen

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        """The experts' weighted sum."""
        width, e = x.shape[-1], self.experts

        def kernel(name, std, *shape):
            return self.param(name, nn.initializers.normal(std), (e, *shape)).astype(self.dtype)

        w1, w3 = (kernel(name, self.init_std, width, self.hidden) for name in ("w1", "w3"))
        w2 = kernel("w2", self.out_std, self.hidden, width)
        weights, chosen = self.route(x)
        if not self.is_initializing():
            share = jax.nn.one_hot(chosen, e).sum(-2).mean((0, 1)) / self.used
            probability = jax.nn.softmax(self.router(x.astype(jnp.float32)), axis=-1).mean((0, 1))
            self.sow("balance", "load", e * jnp.sum(jax.lax.stop_gradient(share) * probability))
        by_expert = jnp.argsort(chosen.reshape(-1), stable=True)
        rows = x.reshape(-1, width)[by_expert // self.used].astype(self.dtype)
        sizes = jnp.bincount(chosen.reshape(-1), length=e).astype(jnp.int32)
        gate, up = (jax.lax.ragged_dot(rows, w, sizes) for w in (w1, w3))
        out = jax.lax.ragged_dot(nn.silu(gate) * up, w2, sizes)
        out = jnp.zeros_like(out).at[by_expert].set(out).reshape(*x.shape[:-1], self.used, width)
        return jnp.einsum("blk,blkd->bld", weights.astype(self.dtype), out)
