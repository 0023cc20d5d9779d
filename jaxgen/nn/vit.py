"""The plain pre-norm transformer of vision models (Dosovitskiy et al. 2021): affine norms, no condition, no cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgen.nn.attention import SelfAttention
from jaxgen.nn.mlp import MLP

__all__ = ["ViT", "ViTBlock"]


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attributes are those of `ViT`."""

    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, mask, train: bool):
        """(x, None), the form that a scan wants."""
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def normed(x, name):
            return nn.LayerNorm(epsilon=1e-6, name=name)(x).astype(self.dtype)

        attention = SelfAttention(self.heads, dtype=self.dtype, implementation=self.implementation, name="attention")
        x = x + drop(attention(normed(x, "norm1"), view_mask=mask)[0])
        mlp = MLP(round(x.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")
        return x + drop(mlp(normed(x, "norm2"))), None


class ViT(nn.Module):
    """`depth` blocks and a last norm.

    Attributes:
      depth: number of blocks.
      heads: h; must divide the width of the input.
      mlp_ratio: hidden width of the MLPs over the width.
      dropout: rate on the output of each branch, while training; the rng stream is "dropout".
      scan_layers: as in `AdaLNTransformer`.
      dtype: of the computation; norms are float32.
      implementation: see `jaxgen.nn.attend`.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    scan_layers: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], mask: Bool[Array, "*b l l"] | None = None, *, train: bool = False):
        """`mask`: who sees whom, with axes of 1 where all do alike; None is everybody."""
        fields = dict(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            dtype=self.dtype,
            implementation=self.implementation,
        )
        x = x.astype(self.dtype)
        if self.scan_layers:
            stack = nn.scan(
                ViTBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=self.depth,
            )
            x, _ = stack(**fields, name="blocks")(x, mask, train)
        else:
            for i in range(self.depth):
                x, _ = ViTBlock(**fields, name=f"blocks_{i}")(x, mask, train)
        return nn.LayerNorm(epsilon=1e-6, name="norm")(x)
