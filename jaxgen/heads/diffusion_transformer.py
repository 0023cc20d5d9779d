"""A diffusion head for all tokens of a grid together: a transformer in place of an MLP (Zheng et al. 2025, *Hi-MAR*)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.config import fields_of
from jaxgen.nn.adaln import layer_norm
from jaxgen.nn.timestep import TimestepEmbedding, sinusoids
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.paths_vp import PREDICTIONS, VPPath

__all__ = ["DiffusionTransformerHead"]


class DiffusionTransformerHead(nn.Module):
    """p(tokens of a grid | their features) as a chain of Gaussians, in which every token sees the others at their own noise.

    A DiT (Peebles & Xie 2023) whose condition at a position is the time's vector plus that position's feature: scales, shifts and
    gates differ from token to token. All tokens of a row are at one level. Variances are not learned (Zheng et al. 2025,
    arXiv:2505.20288, and their code).

    Attributes:
      channels: c, numbers a token.
      grid: tokens along a side.
      width, depth, heads: of the transformer.
      mlp_ratio, scan_layers, implementation: see `AdaLNTransformer`.
      path: of training; sampling takes some of its steps.
      prediction: see `DiffusionHead`.
      dtype: of the transformer; what comes out is float32.
    """

    channels: int
    grid: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    path: VPPath = VPPath()
    prediction: str = "noise"
    scan_layers: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @property
    def positions(self) -> Float[Array, "l d"]:
        """Sinusoids of row and column, half of the width each."""
        rows, columns = np.divmod(np.arange(self.grid**2), self.grid)
        return jnp.concatenate([sinusoids(rows, self.width // 2), sinusoids(columns, self.width // 2)], axis=-1)

    @nn.compact
    def __call__(self, z: Float[Array, "b l d"], x: Float[Array, "b l c"], times: Int[Array, "*b"]) -> Float[Array, "b l c"]:
        """The prediction at noisy tokens `x`; `times` are one a row, or one for all."""
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: expected one of {', '.join(PREDICTIONS)}")
        if self.width % 4:
            raise ValueError(f"width={self.width}: expected a multiple of 4, for sinusoids of row and column")
        init, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        time = TimestepEmbedding(self.width, name="time")(jnp.broadcast_to(times, x.shape[:1]))
        cond = time[:, None] + nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="cond")(z)
        h = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="inputs")(x) + self.positions
        fields = fields_of(self, AdaLNTransformer) | dict(gate_init=0.0, rest_init=0.0)
        h, _ = AdaLNTransformer(**fields, name="transformer")(h, cond)
        ada = nn.Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype, name="ada")(nn.silu(cond))
        shift, scale = jnp.split(ada, 2, axis=-1)
        h = (layer_norm(h) * (1 + scale) + shift).astype(jnp.float32)
        return nn.Dense(self.channels, kernel_init=zeros, name="outputs")(h)

    def loss(self, z: Float[Array, "b l d"], x0: Float[Array, "b l c"], key: Key[Array, ""]) -> Float[Array, "b l"]:
        """Squared error of the prediction at one random level for each row."""
        key_i, key_noise = jax.random.split(key)
        i = jax.random.randint(key_i, (x0.shape[0], 1), 1, self.path.length + 1)
        noise = jax.random.normal(key_noise, x0.shape)
        prediction = self(z, self.path.q_sample(x0, i, noise), jnp.asarray(self.path.times)[i[:, 0] - 1])
        return jnp.square(prediction - self.path.target(self.prediction, x0, i, noise)).mean(-1)
