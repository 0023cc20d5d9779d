"""The Llama-style stack: RMS norms, rotary positions, grouped key/value heads, SwiGLU; with or without a cache."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.config import fields_of
from jaxgen.nn.attention import attend, attend_cached
from jaxgen.nn.cross_attention import Context, CrossAttention
from jaxgen.nn.moe import MixtureOfExperts
from jaxgen.nn.placement import join_heads, place_stream, split_heads
from jaxgen.nn.rope import rotate
from kernels_pallas import BlockMask

__all__ = ["LlamaBlock", "LlamaTransformer", "RotaryAttention", "SwiGLU"]


class SwiGLU(nn.Module):
    """(silu(x W1) * x W3) W2, without biases (Shazeer 2020, equation 6); W1 and W3 are one kernel [d, 2, hidden].

    Attributes:
      hidden: width between.
      init_std: of the kernels.
      out_std: of W2.
      dtype: of the computation.
    """

    hidden: int
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        def dense(features, std, name):
            return nn.DenseGeneral(features, use_bias=False, kernel_init=nn.initializers.normal(std), dtype=self.dtype, name=name)

        both = dense((2, self.hidden), self.init_std, "w13")(x)
        return dense(x.shape[-1], self.out_std, "w2")(nn.silu(both[..., 0, :]) * both[..., 1, :])


class RotaryAttention(nn.Module):
    """Self-attention with rotary positions and grouped key/value heads (Ainslie et al. 2023), without biases.

    One kernel [d, g, h / g + 2, k] projects: by key/value head its queries, its key and its value, so that heads can be sharded.

    Attributes:
      heads: h.
      kv_heads: g; divides h.
      head_size: k; 0 is d / h.
      theta: see `rotate`.
      mask: of training without a cache.
      init_std: of the projections.
      out_std: of the output projection.
      dtype: of the computation.
      implementation: see `jaxgen.nn.attend`.
    """

    heads: int
    kv_heads: int
    head_size: int = 0
    theta: float = 10000.0
    mask: BlockMask | None = None
    init_std: float = 0.02
    out_std: float = 0.02
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], pos, cache=None, layer=0, mask: Bool[Array, "*b l l"] | None = None, *, stage: bool = True
    ):
        """(output [b, l, d], cache); `mask` is the view's with a cache, and replaces the field without one.

        With `stage` off x only asks: keys and values are those that the cache has, the staged ones included.
        """
        width = x.shape[-1]
        if self.heads % self.kv_heads or (not self.head_size and width % self.heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}, and those the width {width}")
        head_size = self.head_size or width // self.heads
        init = nn.initializers.normal(self.init_std)

        shape = (self.kv_heads, self.heads // self.kv_heads + 2, head_size)
        qkv = nn.DenseGeneral(shape, use_bias=False, kernel_init=init, dtype=self.dtype, name="qkv")(x)
        q = rotate(qkv[..., :-2, :].reshape(*x.shape[:-1], self.heads, head_size), pos, theta=self.theta)
        k, v = (rotate(qkv[..., -2, :], pos, theta=self.theta), qkv[..., -1, :]) if stage else (None, None)
        if cache is None:
            visible = self.mask if mask is None else _with_heads(mask)
            out = join_heads(attend(*split_heads(q, k, v), visible, implementation=self.implementation))
        else:
            out, cache = attend_cached(q, k, v, cache, layer, mask)
        out_init = nn.initializers.normal(self.out_std)
        out = nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, kernel_init=out_init, dtype=self.dtype, name="o")(out)
        return out, cache


def _with_heads(mask):
    return mask if isinstance(mask, BlockMask) else mask[..., None, :, :]


class LlamaBlock(nn.Module):
    """x + attention(norm(x)), then the same with SwiGLU; with a context, x + cross_attention(norm(x), context) between them.

    Attributes are those of `LlamaTransformer`.
    """

    heads: int
    kv_heads: int
    hidden: int
    depth: int
    experts: int = 0
    experts_used: int = 2
    theta: float = 10000.0
    eps: float = 1e-5
    init_std: float = 0.02
    dropout: float = 0.0
    mask: BlockMask | None = None
    dtype: Any = jnp.float32
    implementation: str | None = None

    def setup(self):
        out_std = self.init_std / (2 * self.depth) ** 0.5
        self.attention_norm = nn.RMSNorm(epsilon=self.eps)
        self.attention = RotaryAttention(**fields_of(self, RotaryAttention), out_std=out_std)
        self.cross_norm = nn.RMSNorm(epsilon=self.eps)  # parameters of its own only where there is a context
        inits = dict(kernel_init=nn.initializers.normal(self.init_std), out_init=nn.initializers.normal(out_std))
        self.cross = CrossAttention(self.heads, **inits, dtype=self.dtype)
        self.mlp_norm = nn.RMSNorm(epsilon=self.eps)
        stds = dict(init_std=self.init_std, out_std=out_std, dtype=self.dtype)
        if self.experts:
            self.mlp = MixtureOfExperts(self.hidden, self.experts, self.experts_used, **stds)
        else:
            self.mlp = SwiGLU(self.hidden, **stds)
        self.drop_attention, self.drop_mlp = nn.Dropout(self.dropout), nn.Dropout(self.dropout)

    def __call__(self, carry, layer, pos, mask=None, train=False, context: Context | None = None):
        """carry = (x [b, l, d], cache or None); returns (carry, None), the form that a scan wants."""
        x, cache = carry
        x, cache = self.attend(place_stream(x), pos, cache, layer, mask, train=train)
        if context is not None:
            x = x + self.cross(self.cross_norm(x).astype(self.dtype), context).astype(x.dtype)
        return (self.feed_forward(x, train=train), cache), None

    def attend(self, x, pos, cache=None, layer=0, mask=None, *, stage: bool = True, train: bool = False):
        """The first half: (x, cache); `stage` as in `RotaryAttention`."""
        out, cache = self.attention(self.attention_norm(x).astype(self.dtype), pos, cache, layer, mask, stage=stage)
        return place_stream(x + self.drop_attention(out, deterministic=not train).astype(x.dtype)), cache

    def feed_forward(self, x, *, train: bool = False):
        """The second half."""
        out = self.mlp(self.mlp_norm(x).astype(self.dtype))
        return place_stream(x + self.drop_mlp(out, deterministic=not train).astype(x.dtype))

    def route(self, x) -> tuple[Float[Array, "b l k"], Int[Array, "b l k"]]:
        """(weights, experts) that the second half would use for x; only where there are experts."""
        return self.mlp.route(self.mlp_norm(x).astype(self.dtype))


class LlamaTransformer(nn.Module):
    """`depth` blocks over vectors; the last norm is not part of it.

    Attributes:
      heads: h.
      kv_heads: g; 0 is h.
      hidden: width of the SwiGLU; 0 is 8 / 3 of the width, rounded up to whole 32s.
      depth: number of blocks.
      experts, experts_used: SwiGLUs that a token chooses from, and how many it takes; 0 is one for all, see `MixtureOfExperts`.
      theta: see `rotate`.
      eps: of the norms.
      init_std: of all kernels; output projections get init_std / sqrt(2 depth).
      dropout: rate on the output of each half of a block, while training; the rng stream is "dropout".
      first_layer: of the cache, where several stacks share one.
      mask: of training without a cache.
      scan_layers: parameters of all blocks are stacked on a leading axis and the blocks run in a `lax.scan`.
      remat: recompute block activations in the backward pass.
      dtype: of the computation; norms, rotations and the residual stream's sum are as wide as x.
      implementation: see `jaxgen.nn.attend`.
    """

    width: int
    heads: int
    depth: int
    kv_heads: int = 0
    hidden: int = 0
    experts: int = 0
    experts_used: int = 2
    theta: float = 10000.0
    eps: float = 1e-5
    init_std: float = 0.02
    dropout: float = 0.0
    first_layer: int = 0
    mask: BlockMask | None = None
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    def setup(self):
        fields = fields_of(self, LlamaBlock)
        fields |= dict(kv_heads=self.kv_heads or self.heads, hidden=self.hidden or -(-8 * self.width // 96) * 32)
        block = LlamaBlock
        if self.remat:  # the last argument, `train`, is not an array
            block = nn.remat(LlamaBlock, prevent_cse=not self.scan_layers, static_argnums=(5,))
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, *(nn.broadcast,) * 4),
                length=self.depth,
            )
            self.stack = stack(**fields, name="blocks")
        else:
            self.blocks = [block(**fields) for _ in range(self.depth)]

    def __call__(
        self,
        x: Float[Array, "b l d"],
        pos,
        cache=None,
        mask=None,
        *,
        layers: tuple[int, int] | None = None,
        active: Bool[Array, "*l n"] | None = None,
        context: Context | None = None,
        train: bool = False,
    ):
        """(x, cache) after the blocks.

        Args:
          x: vectors.
          pos: see `rotate`.
          cache: x is staged in it and sees what it lets it see.
          mask: with a cache the view's; without one it replaces the field.
          layers: the first block and the one after the last; None is all.
          active: which of the n blocks run: [n] for the whole call, the others cost nothing; or [l, n], where position i passes
            the blocks that are not its own, which saves nothing and is for training.
          context: what every block asks, too, see `CrossAttention`.
          train: drops; needs the rng stream "dropout".

        Raises:
          ValueError: some of the blocks, where they are scanned.
        """
        first, last = layers or (0, self.depth)
        if not 0 <= first <= last <= self.depth:
            raise ValueError(f"layers={layers}: expected a range within 0..{self.depth}")
        x = x.astype(self.dtype)
        if self.scan_layers:
            if (first, last) != (0, self.depth) or active is not None:
                raise ValueError(f"layers={layers}: scanned blocks run all together; set scan_layers=False")
            return self.stack((x, cache), self.first_layer + jnp.arange(self.depth), pos, mask, train, context)[0]
        for i in range(first, last):
            x, cache = self._block(i, x, pos, cache, mask, active, train, context)
        return x, cache

    def _block(self, i: int, x, pos, cache, mask, active, train: bool, context):
        def run(block, x, cache):
            return block((x, cache), self.first_layer + i, pos, mask, train, context)[0]

        if active is None:
            return run(self.blocks[i], x, cache)
        if active.ndim == 1:
            return nn.cond(active[i], run, lambda block, x, cache: (x, cache), self.blocks[i], x, cache)
        after, cache = run(self.blocks[i], x, cache)
        return jnp.where(active[:, i, None], after, x), cache

    def saturating(self, x: Float[Array, "b l d"], pos, cache=None, mask=None, *, threshold, blocks: tuple[int, int], free: int):
        """As `__call__`, but a token whose MLP hardly turns it skips the MLPs that follow (Jaiswal et al. 2024).

        In the blocks from `blocks[0]` up to `blocks[1]`, once cos(x, x + mlp(x)) >= threshold, a token passes the later MLPs
        there; an MLP that every token passes is not computed. Attention always runs, so the cache is whole.

        Args:
          threshold: of the cosine; may be traced.
          blocks: outside these every MLP runs.
          free: positions below this skip nothing.

        Returns:
          (x, cache, skipped), with bool [b, l, n]: which MLPs each token passed.
        """
        if self.scan_layers:
            raise ValueError("scan_layers=True: skipping MLPs needs unrolled blocks")
        if not 0 <= blocks[0] <= blocks[1] <= self.depth:
            raise ValueError(f"blocks={blocks}: expected a range within 0..{self.depth}")
        x, may = x.astype(self.dtype), jnp.broadcast_to(jnp.asarray(pos) >= free, x.shape[:2])
        passing, skipped = jnp.zeros(x.shape[:2], bool), []
        for i, block in enumerate(self.blocks):
            x, cache = block.attend(x, pos, cache, i, mask)
            inside = blocks[0] <= i < blocks[1]
            skipped.append(passing if inside else jnp.zeros_like(passing))
            after = nn.cond(~skipped[-1].all(), lambda block, x: block.feed_forward(x), lambda block, x: x, block, x)
            after = jnp.where(skipped[-1][..., None], x, after)
            if inside:
                passing |= may & (_cosine(x, after) >= threshold)
            x = after
        return x, cache, jnp.stack(skipped, axis=-1)


def _cosine(x: Float[Array, "b l d"], y: Float[Array, "b l d"]) -> Float[Array, "b l"]:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.sum(x * x, -1) * jnp.sum(y * y, -1)
    return jnp.sum(x * y, -1) / jnp.sqrt(jnp.maximum(norms, 1e-24))
