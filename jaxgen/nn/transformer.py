"""A stack of pre-norm AdaLN blocks, unrolled or scanned, with or without a cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.nn.adaln import Modulation, SharedModulation, layer_norm
from jaxgen.nn.attention import SelfAttention
from jaxgen.nn.mlp import MLP
from kernels_pallas import BlockMask

__all__ = ["AdaLNBlock", "AdaLNTransformer"]


def _drop_path(module: nn.Module, x, rate):
    """Drops a whole branch with probability `rate`, a row at a time (Huang et al. 2016)."""
    keep = 1.0 - rate
    row = jax.random.bernoulli(module.make_rng("dropout"), keep, (x.shape[0], 1, 1))
    return jnp.where(row, x / keep, 0).astype(x.dtype)


class AdaLNBlock(nn.Module):
    """x + gate1 attention(norm(x) (1 + scale1) + shift1), then the same with an MLP.

    Attributes are those of `AdaLNTransformer`.
    """

    width: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    l2_norm: bool = False
    attention_scale: float | None = None
    shared_adaln: bool = False
    gate_init: float = 1e-5
    rest_init: float = 0.5
    init_std: float = 0.02
    drop_path: bool = False
    mask: BlockMask | None = None
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, carry, layer, drop_rate, cond, view_mask=None):
        """carry = (x [b, l, d], cache or None); returns (carry, None), the form that a scan wants."""
        x, cache = carry
        init = nn.initializers.normal(self.init_std)
        out_init = nn.initializers.normal(self.init_std / (2 * self.depth) ** 0.5)
        gates = dict(gate_init=self.gate_init, rest_init=self.rest_init)
        if self.shared_adaln:
            ada = SharedModulation(**gates, name="ada")(cond)
        else:
            ada = Modulation(self.width, kernel_init=init, **gates, dtype=self.dtype, name="ada")(cond)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(ada, 6, axis=1)  # each [b, 1, d]

        def modulate(x, scale, shift):
            return (layer_norm(x) * (1 + scale) + shift).astype(self.dtype)

        def residual(x, branch, gate):
            branch = branch * gate
            return x + (_drop_path(self, branch, drop_rate) if self.drop_path else branch).astype(x.dtype)

        attention, cache = SelfAttention(
            self.heads,
            l2_norm=self.l2_norm,
            scale=self.attention_scale,
            mask=self.mask,
            kernel_init=init,
            out_init=out_init,
            dtype=self.dtype,
            implementation=self.implementation,
            name="attention",
        )(modulate(x, scale1, shift1), cache, layer, view_mask)
        x = residual(x, attention, gate1)
        mlp = MLP(round(self.width * self.mlp_ratio), kernel_init=init, out_init=out_init, dtype=self.dtype, name="mlp")
        x = residual(x, mlp(modulate(x, scale2, shift2)), gate2)
        return (x, cache), None


class AdaLNTransformer(nn.Module):
    """`depth` blocks of width d with h heads.

    Attributes:
      width: d.
      heads: h.
      depth: number of blocks.
      mlp_ratio: hidden width of the MLPs over d.
      l2_norm: see `SelfAttention`.
      attention_scale: see `SelfAttention.scale`.
      shared_adaln: one modulation for all blocks plus an offset a block, instead of one a block.
      gate_init: see `Modulation`.
      rest_init: see `Modulation`.
      init_std: of all kernels; output projections get init_std / sqrt(2 depth).
      drop_path_rate: of the last block; the first has 0, linear between.
      mask: of training without a cache.
      scan_layers: parameters of all blocks are stacked on a leading axis and the blocks run in a `lax.scan`: compile time does
        not grow with depth.
      remat: recompute block activations in the backward pass.
      dtype: of the computation.
      implementation: see `jaxgen.nn.attend`.
    """

    width: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    l2_norm: bool = False
    attention_scale: float | None = None
    shared_adaln: bool = False
    gate_init: float = 1e-5
    rest_init: float = 0.5
    init_std: float = 0.02
    drop_path_rate: float = 0.0
    mask: BlockMask | None = None
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], cond, cache=None, view_mask=None, *, train: bool = False):
        """Returns (x, cache); `cond` is [b, d]. Training with drop path needs the rng stream "dropout"."""
        fields = dict(
            width=self.width,
            heads=self.heads,
            depth=self.depth,
            mlp_ratio=self.mlp_ratio,
            l2_norm=self.l2_norm,
            attention_scale=self.attention_scale,
            shared_adaln=self.shared_adaln,
            gate_init=self.gate_init,
            rest_init=self.rest_init,
            init_std=self.init_std,
            drop_path=train and self.drop_path_rate > 0,
            mask=self.mask,
            dtype=self.dtype,
            implementation=self.implementation,
        )
        x = x.astype(self.dtype)
        if self.shared_adaln:
            init = nn.initializers.normal(self.init_std)
            dense = nn.DenseGeneral((6, self.width), kernel_init=init, dtype=self.dtype, name="shared_ada")
            cond = dense(nn.silu(cond))
        block = nn.remat(AdaLNBlock, prevent_cse=not self.scan_layers) if self.remat else AdaLNBlock
        rates = jnp.linspace(0.0, self.drop_path_rate, self.depth)
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast),
                length=self.depth,
            )
            (x, cache), _ = stack(**fields, name="blocks")((x, cache), jnp.arange(self.depth), rates, cond, view_mask)
        else:
            for i in range(self.depth):
                (x, cache), _ = block(**fields, name=f"blocks_{i}")((x, cache), i, rates[i], cond, view_mask)
        return x, cache
