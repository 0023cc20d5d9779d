"""A stack of pre-norm AdaLN blocks, unrolled or scanned, with or without a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.config import fields_of
from jaxgen.nn.adaln import Modulation, SharedModulation, layer_norm, rms_norm
from jaxgen.nn.attention import SelfAttention
from jaxgen.nn.cross_attention import Context, CrossAttention
from jaxgen.nn.mlp import GEGLU, MLP
from jaxgen.nn.placement import place_rows, place_stream
from kernels_pallas import BlockMask

__all__ = ["AdaLNBlock", "AdaLNTransformer"]


def _drop_path(module: nn.Module, x, rate):
    """Drops a whole branch with probability `rate`, a row at a time (Huang et al. 2016)."""
    keep = 1.0 - rate
    row = jax.random.bernoulli(module.make_rng("dropout"), keep, (x.shape[0], 1, 1))
    return jnp.where(row, x / keep, 0).astype(x.dtype)


class _Fields(nn.Module):
    """What a block and a stack of blocks both have; see `AdaLNTransformer`."""

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
    head_norm: bool = False
    rms_norm: bool = False
    learned_norms: bool = False
    gated_mlp: bool = False
    exact_gelu: bool = False
    dropout: float = 0.0
    mask: BlockMask | None = None
    mixer: nn.Module | None = None
    dtype: Any = jnp.float32
    implementation: str | None = None


class AdaLNBlock(_Fields):
    """x + gate1 attention(norm(x) (1 + scale1) + shift1), then the same with the mixer, if there is one, and with an MLP.

    With a context, x + gate cross_attention(layer_norm(x), context) comes before the MLP.

    Attributes are those of `AdaLNTransformer`, and:
      key_bias: see `SelfAttention`.
      cross_gate: initial value of the learned gate of each channel of the cross-attention; None is a gate of 1.
      half_cross: see `CrossAttention.half`.
    """

    drop_path: bool = False
    key_bias: bool = True
    cross_gate: float | None = None
    half_cross: bool = False

    @nn.compact
    def __call__(self, carry, layer, drop_rate, cond, view_mask=None, coords=None, groups=None, context: Context | None = None):
        """carry = (x [b, l, d], cache or None); returns (carry, None), the form that a scan wants."""
        x, cache = carry
        x = place_stream(x)
        init = nn.initializers.normal(self.init_std)
        out_init = nn.initializers.normal(self.init_std / (2 * self.depth) ** 0.5)
        gates = dict(gate_init=self.gate_init, rest_init=self.rest_init)
        branches = 2 if self.mixer is None else 3
        if self.shared_adaln:
            ada = SharedModulation(**gates, name="ada")(cond)
        else:
            ada = Modulation(self.width, branches, kernel_init=init, **gates, dtype=self.dtype, name="ada")(cond)
        ada = place_rows(ada)
        if ada.ndim == 3:
            ada = ada[:, None]
        elif groups is not None:
            ada = ada[:, groups]
        gates, scales, shifts = jnp.split(jnp.moveaxis(ada, -2, 0), 3)  # of each branch [b, 1 or l, d]

        def norm(x, i):
            if not self.learned_norms:
                return rms_norm(x) if self.rms_norm else layer_norm(x)
            learned = nn.RMSNorm if self.rms_norm else nn.LayerNorm
            return learned(epsilon=1e-6, name=f"norm_{i % branches}")(x.astype(jnp.float32))

        def modulate(x, i):
            return (norm(x, i) * (1 + scales[i]) + shifts[i]).astype(self.dtype)

        def residual(x, branch, i):
            if self.dropout:
                branch = nn.Dropout(self.dropout, deterministic=False)(branch)
            branch = branch * gates[i]
            return place_stream(x + (_drop_path(self, branch, drop_rate) if self.drop_path else branch).astype(x.dtype))

        options = fields_of(self, SelfAttention) | dict(scale=self.attention_scale, mask=self.mask if cache is None else None)
        attention = SelfAttention(**options, kernel_init=init, out_init=out_init, name="attention")
        attention, keys = attention(modulate(x, 0), cache if self.mixer is None else None, layer, view_mask, coords)
        x = residual(x, attention, 0)
        if self.mixer is None:
            cache = keys
        else:
            mixed, state = self.mixer(modulate(x, 1), None if cache is None else cache.read(layer))
            cache = None if cache is None else cache.stage(layer, state)
            x = residual(x, mixed, 1)
        if context is not None:
            h = nn.LayerNorm(epsilon=1e-6, name="cross_norm")(x).astype(self.dtype)
            asked = dict(half=self.half_cross, kernel_init=init, out_init=out_init, dtype=self.dtype, name="cross")
            h = CrossAttention(self.heads, **asked)(h, context)
            if self.cross_gate is not None:
                h = h * self.param("cross_gate", nn.initializers.constant(self.cross_gate), (self.width,))
            x = x + h.astype(x.dtype)
        fields = dict(kernel_init=init, out_init=out_init, dtype=self.dtype, name="mlp")
        if self.gated_mlp:
            # A third of the width less, for one matrix more: as many parameters.
            mlp = GEGLU(int(self.width * self.mlp_ratio * 2 / 3), **fields)
        else:
            mlp = MLP(round(self.width * self.mlp_ratio), exact=self.exact_gelu, **fields)
        x = residual(x, mlp(modulate(x, -1)), -1)
        return (x, cache), None


class AdaLNTransformer(_Fields):
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
      head_norm: see `SelfAttention`.
      rms_norm: norms divide by the root of the mean square and do not subtract the mean.
      learned_norms: norms have a learned scale (and shift, if they subtract the mean) beside that of the condition.
      gated_mlp: `GEGLU` in place of `MLP`.
      exact_gelu: see `MLP.exact`; that of `GEGLU` is exact anyway.
      dropout: rate on the output of each branch, while training; the rng stream is "dropout".
      drop_path_rate: of the last block; the first has 0, linear between.
      mask: of training without a cache.
      mixer: a third branch, between attention and MLP, that carries what came before as a state: a module `(x, state or None) ->
        (y, state)` such as `Mamba2`, of which each block has its own. The cache is then a `StateCache`, and attention sees the
        positions of its own call.
      scan_layers: parameters of all blocks are stacked on a leading axis and the blocks run in a `lax.scan`: compile time does
        not grow with depth.
      remat: recompute block activations in the backward pass.
      dtype: of the computation.
      implementation: see `jaxgen.nn.attend`.
    """

    drop_path_rate: float = 0.0
    scan_layers: bool = False
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b l d"],
        cond,
        cache=None,
        view_mask=None,
        coords=None,
        groups=None,
        *,
        layers: Sequence[int] | None = None,
        prefix: int = 0,
        train: bool = False,
    ):
        """Returns (x, cache). Training with dropout or drop path needs the rng stream "dropout".

        Args:
          x: the inputs.
          cond: one condition a row, [b, d], one a position, [b, l, d], or one a group of positions, [b, g, d].
          cache: see `SelfAttention`.
          view_mask: see `SelfAttention`.
          coords: see `SelfAttention`.
          groups: int [l], the group of each position.
          layers: the blocks that run, in increasing order; None is all. A cache holds those and no others.
          prefix: without a cache, how many positions, from the first on, run through the other blocks, too. They must see nothing
            behind them, and share conditions by row or group.
          train: drops.

        Raises:
          ValueError: blocks that are not there, or some of them where they are scanned.
        """
        if layers is not None:
            self._check_layers(layers)
        fields = fields_of(self, AdaLNBlock)
        fields |= dict(dropout=self.dropout if train else 0.0, drop_path=train and self.drop_path_rate > 0)
        x, cond = x.astype(self.dtype), place_rows(cond)
        if self.shared_adaln:
            init = nn.initializers.normal(self.init_std)
            parts = 6 if self.mixer is None else 9
            dense = nn.DenseGeneral((parts, self.width), kernel_init=init, dtype=self.dtype, name="shared_ada")
            cond = dense(nn.silu(cond))
        block = nn.remat(AdaLNBlock, prevent_cse=not self.scan_layers) if self.remat else AdaLNBlock
        rates = jnp.linspace(0.0, self.drop_path_rate, self.depth)
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, *(nn.broadcast,) * 4),
                length=self.depth,
            )
            every = (cond, view_mask, coords, groups)
            blocks = stack(**fields | dict(mixer=self._own_mixer()), name="blocks")
            (x, cache), _ = blocks((x, cache), jnp.arange(self.depth), rates, *every)
        else:
            active = range(self.depth) if layers is None else tuple(layers)
            for i in range(self.depth):
                run = functools.partial(block, **fields | dict(mixer=self._own_mixer()), name=f"blocks_{i}")
                if i in active:
                    (x, cache), _ = run()((x, cache), active.index(i), rates[i], cond, view_mask, coords, groups)
                elif prefix:
                    mask = None if self.mask is None else self.mask[:prefix, :prefix]
                    view = None if view_mask is None else view_mask[..., :prefix, :prefix]
                    place = [None if p is None else p[:prefix] for p in (coords, groups)]
                    (first, _), _ = run(mask=mask)((x[:, :prefix], None), i, rates[i], cond, view, *place)
                    x = jnp.concatenate([first, x[:, prefix:]], axis=1)
        return x, cache

    def _own_mixer(self) -> nn.Module | None:
        """A mixer for one block: a module that is given to several is one module, with one set of parameters."""
        return None if self.mixer is None else self.mixer.clone()

    def _check_layers(self, layers):
        if self.scan_layers:
            raise ValueError(f"layers={layers}: scanned blocks run all together; set scan_layers=False")
        if list(layers) != sorted({i for i in layers if 0 <= i < self.depth}):
            raise ValueError(f"layers={layers}: expected increasing numbers of blocks, within 0..{self.depth - 1}")
