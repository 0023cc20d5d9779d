"""A head for many continuous tokens at once: a flow from noise, whose velocity a transformer gives (Ren et al. 2024)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.config import fields_of
from jaxgen.nn.adaln import rms_norm
from jaxgen.nn.timestep import TimestepEmbedding
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.paths_flow import LinearFlow
from kernels_pallas import BlockMask

__all__ = ["FlowHead", "flow_time"]


def flow_time(t: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """What networks are told of a level t: the whole thousandths of it, as in the released xAR and FlowAR."""
    return jnp.floor(1000 * t)


class FlowHead(nn.Module):
    """The velocity of noisy tokens given a feature of each: self-attention among the tokens, norms that the features set.

    Scale, shift and gate of a position come from the feature of that position and the level (spatial-adaLN; Ren et al. 2024,
    *FlowAR*, arXiv:2412.15205). The block is the paper's; the larger released models have cross-attention to the features
    besides, which by their README gains nothing at equal size.

    Attributes:
      channels: c, numbers a token.
      width: of the transformer.
      depth: its blocks.
      heads: of attention; 0 is one for every 64 numbers of the width.
      mlp_ratio, gate_init, rest_init, scan_layers, implementation: see `AdaLNTransformer`.
      dtype: of the transformer; what comes out is float32.
    """

    channels: int
    width: int
    depth: int
    heads: int = 0
    mlp_ratio: float = 4.0
    gate_init: float = 1.0
    rest_init: float = 1.0
    scan_layers: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "b l d"],
        x: Float[Array, "b l c"],
        t: Float[Array, "b *g"],
        *,
        coords: Float[np.ndarray, "l n"] | None = None,
        groups: Int[np.ndarray, "l"] | None = None,
        mask: BlockMask | None = None,
    ) -> Float[Array, "b l c"]:
        """The expected velocity at `x`.

        Args:
          z: features.
          x: noisy tokens.
          t: level of each row or, with `groups`, of each group of positions.
          coords: places of the tokens, see `SelfAttention`.
          groups: the group of each position.
          mask: who sees whom; None is everybody.

        Raises:
          ValueError: tokens of another number of channels.
        """
        if x.shape[-1] != self.channels:
            raise ValueError(f"x {x.shape}: the head is of tokens of channels={self.channels}")
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        time = TimestepEmbedding(self.width, name="time")(flow_time(t))
        time = time[:, None] if groups is None else time[:, groups]
        cond = time + nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="cond")(z)
        h = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="inputs")(x)
        fields = fields_of(self, AdaLNTransformer) | dict(heads=self.heads or max(self.width // 64, 1))
        fields |= dict(init_std=(3 * self.width) ** -0.5, rms_norm=True, gated_mlp=True, mask=mask)
        h, _ = AdaLNTransformer(**fields, name="transformer")(h, cond, coords=coords)
        ada = nn.Dense(2 * self.width, kernel_init=xavier, dtype=self.dtype, name="ada")(nn.silu(cond))
        shift, scale = jnp.split(ada, 2, axis=-1)
        h = (rms_norm(h) * (1 + scale) + shift).astype(jnp.float32)
        return nn.Dense(self.channels, kernel_init=zeros, name="outputs")(h)

    def loss(
        self, z: Float[Array, "b l d"], x0: Float[Array, "b l c"], key: Key[Array, ""], *, groups: Int[np.ndarray, "l"], **options
    ) -> Float[Array, "b l"]:
        """Squared error of the velocity, the mean over the channels, at one level for each group of a row, uniform in (0, 1)."""
        key_t, key_noise = jax.random.split(key)
        t = jax.random.uniform(key_t, (x0.shape[0], int(groups.max()) + 1))
        noise, path = jax.random.normal(key_noise, x0.shape), LinearFlow()
        velocity = self(z, path.interpolate(x0, noise, t[:, groups]), t, groups=groups, **options)
        return jnp.square(velocity - path.velocity(x0, noise)).mean(-1)
