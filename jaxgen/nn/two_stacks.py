"""The backbone of xAR and FlowAR (Ren et al. 2024 and 2025): two transformers in a row, as in MAR, but causal in both."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.config import fields_of
from jaxgen.nn.transformer import AdaLNTransformer
from kernels_pallas import BlockMask

__all__ = ["TwoStacks"]


class TwoStacks(nn.Module):
    """Two transformers in a row, each with learned positions besides the rotary ones: the backbone of xAR and FlowAR.

    Attributes:
      width, depth, heads: of either.
      length: L, positions.
      dropout, mlp_ratio, gate_init, rest_init, scan_layers, remat, dtype, implementation: see `AdaLNTransformer`; norms are RMS
        norms and MLPs are gated.
    """

    width: int
    depth: int
    heads: int
    length: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gate_init: float = 1.0
    rest_init: float = 1.0
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b q d"],
        cond,
        pos: Int[Array, "q"],
        coords: Float[Array, "L n"],
        cache: tuple[Any, Any] | None = None,
        *,
        groups: Int[Array, "q"] | None = None,
        mask: BlockMask | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b q d"], tuple[Any, Any] | None]:
        """(features, caches).

        Args:
          x: embedded inputs.
          cond: see `AdaLNTransformer`.
          pos: their positions.
          coords: the place of every position.
          cache: one of each stack.
          groups: see `AdaLNTransformer`.
          mask: who sees whom without a cache.
          train: drops; needs the rng stream "dropout".
        """
        fields = fields_of(self, AdaLNTransformer)
        fields |= dict(init_std=(3 * self.width) ** -0.5, rms_norm=True, gated_mlp=True, mask=mask)
        init, caches = nn.initializers.normal(0.02), [None, None]
        for i, name in enumerate(("encoder", "decoder")):
            if i:
                x = nn.Dense(self.width, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name="between")(x)
            x = x + self.param(f"{name}_position", init, (self.length, self.width))[pos]
            if not i:
                x = nn.RMSNorm(epsilon=1e-6, name="token_norm")(x)
            given = None if cache is None else cache[i]
            place = jnp.asarray(coords)[pos]
            x, caches[i] = AdaLNTransformer(**fields, name=name)(x, cond, given, None, place, groups, train=train)
            x = nn.RMSNorm(epsilon=1e-6, name=f"{name}_norm")(x)
        return x, None if cache is None else tuple(caches)
