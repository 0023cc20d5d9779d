"""The plain pre-norm transformer of vision models (Dosovitskiy et al. 2021): affine norms, no cache; for one task or several."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgen.config import fields_of
from jaxgen.nn.attention import SelfAttention
from jaxgen.nn.mlp import GEGLU, MLP

__all__ = ["ViT", "ViTBlock"]


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Attributes are those of `ViT`.

    With tasks it is x + gate attention(norm(x) (1 + scale)), and the same of the MLP: a task has its own four vectors, which are
    those of all blocks times the block's factors plus the block's offsets.
    """

    heads: int
    mlp_ratio: float = 4.0
    gated_mlp: bool = False
    layer_scale: float = 0.0
    dropout: float = 0.0
    tasks: int = 0
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x, mask=None, train: bool = False, vectors=None, task: int = 0, coords=None):
        """(x, None), the form that a scan wants; `vectors` [4, d] of all blocks."""
        scale1 = scale2 = 0.0
        gate1 = gate2 = 1.0
        if self.tasks:
            shape = (self.tasks, *vectors.shape)
            factor = self.param("task_factor", nn.initializers.zeros, shape)
            offset = self.param("task_offset", lambda key, shape: jnp.zeros(shape).at[:, 1::2].set(1), shape)
            scale1, gate1, scale2, gate2 = (vectors * factor[task] + offset[task]).astype(self.dtype)
        if self.layer_scale:
            init = nn.initializers.constant(self.layer_scale)
            gammas = (self.param(f"gamma{i}", init, x.shape[-1:]).astype(self.dtype) for i in (1, 2))
            gate1, gate2 = (gate * gamma for gate, gamma in zip((gate1, gate2), gammas))
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def normed(x, name):
            return nn.LayerNorm(epsilon=1e-6, name=name)(x).astype(self.dtype)

        attention = SelfAttention(self.heads, dtype=self.dtype, implementation=self.implementation, name="attention")
        x = x + gate1 * drop(attention(normed(x, "norm1") * (1 + scale1), view_mask=mask, coords=coords)[0])
        if self.gated_mlp:  # two thirds of the hidden width, in whole eights: about as many parameters
            mlp = GEGLU(-(-int(x.shape[-1] * self.mlp_ratio * 2 / 3) // 8) * 8, silu=True, dtype=self.dtype, name="mlp")
        else:
            mlp = MLP(round(x.shape[-1] * self.mlp_ratio), exact=True, dtype=self.dtype, name="mlp")
        return x + gate2 * drop(mlp(normed(x, "norm2") * (1 + scale2))), None


class ViT(nn.Module):
    """`depth` blocks and a last norm.

    Attributes:
      depth: number of blocks.
      heads: h; must divide the width of the input.
      mlp_ratio: hidden width of the MLPs over the width.
      gated_mlp: SwiGLU in place of GELU.
      layer_scale: initial value of a learned factor on each channel of each branch (Touvron et al. 2021); 0 has none.
      dropout: rate on the output of each branch, while training; the rng stream is "dropout".
      tasks: how many it serves, with scales and gates for each (Zheng et al. 2025, *Hi-MAR*, arXiv:2505.20288); at first they all
        do the same. 0 has none.
      scan_layers: as in `AdaLNTransformer`.
      dtype: of the computation; norms are float32.
      implementation: see `jaxgen.nn.attend`.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    gated_mlp: bool = False
    layer_scale: float = 0.0
    dropout: float = 0.0
    tasks: int = 0
    scan_layers: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        mask: Bool[Array, "*b l l"] | None = None,
        *,
        task: int = 0,
        coords=None,
        train: bool = False,
    ):
        """`mask`: who sees whom, with axes of 1 where all do alike; None is everybody. `task`: 0..tasks - 1. `coords`: see
        `SelfAttention`."""
        fields = fields_of(self, ViTBlock)
        x = x.astype(self.dtype)
        vectors = None
        if self.tasks:
            embed = nn.Embed(self.tasks, x.shape[-1], embedding_init=nn.initializers.normal(1.0), name="task_embed")
            ada = nn.DenseGeneral((4, x.shape[-1]), kernel_init=nn.initializers.xavier_uniform(), name="task_ada")
            vectors = ada(nn.silu(embed(jnp.int32(task))))
        if self.scan_layers:
            stack = nn.scan(
                ViTBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast,) * 5,
                length=self.depth,
            )
            x, _ = stack(**fields, name="blocks")(x, mask, train, vectors, task, coords)
        else:
            for i in range(self.depth):
                x, _ = ViTBlock(**fields, name=f"blocks_{i}")(x, mask, train, vectors, task, coords)
        return nn.LayerNorm(epsilon=1e-6, name="norm")(x)
