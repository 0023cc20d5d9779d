"""Multi-head self-attention: one function that picks an implementation, one module with projections and cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.decoding.cache import KVCache
from jaxgen.nn.placement import join_heads, split_heads
from jaxgen.nn.rope import rotate
from kernels_pallas import BlockMask, Device
from kernels_pallas.attention import block_sparse_attention
from kernels_pallas.decode import decode_attention, tree_attention
from kernels_pallas.dispatch import Implementation, choose

__all__ = ["SelfAttention", "attend", "attend_cached", "l2_normalise"]

# exp(log 100) is the largest factor on normalised queries (VAR; Swin v2 uses the same bound).
MAX_LOG_SCALE = math.log(100.0)


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: BlockMask | Bool[Array, "*b h q s"] | Int[Array, "b"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(scale q k^T) v, with the softmax in float32.

    A `BlockMask` goes to `kernels_pallas.block_sparse_attention`, one query a row with lengths to `decode_attention`, and the
    rest to `jax.nn.dot_product_attention`; `kernels_pallas.explain` says which implementation of each is picked, and why.

    Args:
      q: queries.
      k: keys; g divides h.
      v: values.
      mask: who may attend to whom: a `BlockMask`; a bool array that broadcasts to [b, h, q, s]; int [b], how many keys, from
        the first on, the queries of a row see; None is everybody.
      scale: of the products; None is d ** -0.5.
      implementation: "xla" anywhere, "cudnn" on NVIDIA GPUs in half precision; with a `BlockMask` also "hopper", "splash", "tpu"
        and "split", and "dense", which computes all pairs and then masks them, to measure against; with lengths and one query
        "hopper" and "tpu"; None picks.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or one that this device or dtype lacks.
    """
    if isinstance(mask, BlockMask) and implementation == "dense":
        mask, implementation = mask.traced(), "xla"
    if isinstance(mask, BlockMask):
        return block_sparse_attention(q, k, v, mask, scale=scale, implementation=implementation)
    problem = _Dense(*q.shape, *k.shape[1:3], str(q.dtype), mask is not None)
    lengths = None
    if mask is not None and jnp.issubdtype(mask.dtype, jnp.integer):
        if q.shape[1] == 1:
            return decode_attention(q[:, 0], k, v, mask, scale=scale, implementation=implementation)[:, None]
        mask, lengths = None, mask
    chosen, _ = choose("dense_attention", DENSE, problem, implementation)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, key_value_seq_lengths=lengths, implementation=chosen.name
    )


def attend_cached(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b q g d"] | None,
    v: Float[Array, "b q g d"] | None,
    cache: Any,
    layer: int | Int[Array, ""],
    mask: Bool[Array, "*b q q"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b q h d"], Any]:
    """(output, cache): k and v are staged in the cache, and the queries see what it lets them see.

    Args:
      q: queries.
      k: keys of the same positions; None stages nothing, and the queries see what was staged before.
      v: values.
      cache: such as `jaxgen.decoding.KVCache`; one with rows of any length is read in place by `decode_attention` and
        `tree_attention`, others through their `read`.
      layer: of the cache.
      mask: which of the new positions each query sees; None is all.
      scale, implementation: see `attend`.
    """
    cache = cache if k is None else cache.stage(layer, k, v)
    if hasattr(cache, "see"):  # caches that choose by what is asked for, see `jaxgen.decoding.sparse_cache`
        cache = cache.see(layer, q, scale)
    ragged = type(cache) is KVCache and not isinstance(cache.length, int) and cache.k.dtype == q.dtype
    if ragged and (q.shape[1] == 1 if mask is None else k is not None):
        length = jnp.broadcast_to(jnp.asarray(cache.length, jnp.int32), q.shape[:1])
        options = dict(scale=scale, implementation=implementation, layer=layer)
        if mask is None:
            return decode_attention(q[:, 0], cache.k, cache.v, length + 1, **options)[:, None], cache
        return tree_attention(q, cache.k, cache.v, length, k, v, mask, **options), cache
    k, v, visible = cache.read(layer, q.shape[1], mask)
    return attend(q, k.astype(q.dtype), v.astype(q.dtype), visible, scale=scale, implementation=implementation), cache


@dataclasses.dataclass(frozen=True)
class _Dense:
    """What a call of `jax.nn.dot_product_attention` is about."""

    batch: int
    queries: int
    heads: int
    head_size: int
    keys: int
    kv_heads: int
    dtype: str
    masked: bool


class _Cudnn:
    @staticmethod
    def refuses(problem: _Dense, device: Device) -> str | None:
        """It has kernels for head sizes up to 128, and for masks in training where lengths are even."""
        if problem.dtype not in ("bfloat16", "float16"):
            return f"it needs half precision, not {problem.dtype}"
        if problem.head_size % 8 or problem.head_size > 128:
            return f"its head sizes are multiples of 8 up to 128, not {problem.head_size}"
        if problem.masked and (problem.queries % 2 or problem.keys % 2):
            return f"with a mask it needs even lengths, not {problem.queries} and {problem.keys}"
        return None


class _Xla:
    @staticmethod
    def refuses(problem: _Dense, device: Device) -> str | None:
        """Never refuses."""
        return None


DENSE = (
    Implementation("cudnn", f"{__name__}:_Cudnn", ("gpu",)),
    Implementation("xla", f"{__name__}:_Xla"),
)


def l2_normalise(x):
    """x / |x|; where x is 0 the result and its gradient are finite."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


class SelfAttention(nn.Module):
    """Self-attention with one fused projection, biases on queries and values (a bias on keys has no effect unless they turn).

    Attributes:
      heads: h; must divide the width.
      l2_norm: queries and keys are unit vectors and each head has a learned scale, exp(min(s, log 100)), s_0 = log 4.
      scale: of the products where `l2_norm` is off; None is d ** -0.5.
      head_norm: queries and keys pass a layer norm over each head's numbers, with one learned scale and shift for all heads.
      key_bias: keys that turn, or are normalised, have a bias, too.
      mask: of training without a cache.
      out_init: initialiser of the output projection.
      dtype: of the computation; parameters, norms and softmax are float32.
      implementation: see `attend`; one that serves block masks only leaves reads of a cache to pick their own.

    Raises:
      ValueError: two norms of the queries and keys at once.
    """

    heads: int
    l2_norm: bool = False
    scale: float | None = None
    head_norm: bool = False
    key_bias: bool = True
    mask: BlockMask | None = None
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], cache=None, layer=0, view_mask=None, coords=None):
        """Returns (output [b, l, d], cache). With a cache, x is staged in it and sees what the cache lets it see.

        Without one, `view_mask` (a `BlockMask`, or bool [l, l] or [b, l, l]) replaces the mask where it is given. With `coords`,
        places [l, n] in n dimensions, queries and keys turn (see `rotate`).
        """
        width = x.shape[-1]
        if self.l2_norm and self.head_norm:
            raise ValueError("head_norm=True: queries and keys are unit vectors already (l2_norm=True)")
        if width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width {width}")
        head_size = width // self.heads
        shape = (self.heads, head_size)
        zeros = nn.initializers.zeros_init()
        qkv = nn.DenseGeneral((3, *shape), use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv")(x)
        q = qkv[:, :, 0] + self.param("q_bias", zeros, shape).astype(self.dtype)
        k = qkv[:, :, 1]
        v = qkv[:, :, 2] + self.param("v_bias", zeros, shape).astype(self.dtype)
        if self.key_bias and (self.head_norm or coords is not None):
            k = k + self.param("k_bias", zeros, shape).astype(self.dtype)
        if self.head_norm:
            q, k = (nn.LayerNorm(epsilon=1e-6, name=f"{name}_norm")(x).astype(self.dtype) for name, x in (("q", q), ("k", k)))
        if coords is not None:
            q, k = (rotate(x, jnp.asarray(coords)[None]) for x in (q, k))
        scale = self.scale
        if self.l2_norm:
            log_scale = self.param("log_scale", nn.initializers.constant(math.log(4.0)), (self.heads, 1))
            q = (l2_normalise(q) * jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE))).astype(self.dtype)
            k = l2_normalise(k).astype(self.dtype)
            scale = 1.0
        mask = self.mask if view_mask is None else view_mask
        if mask is not None and not isinstance(mask, BlockMask):
            mask = mask[..., None, :, :]
        if cache is not None:
            dense = [dense.name for dense in DENSE]
            named = dict(scale=scale, implementation=self.implementation if self.implementation in dense else None)
            out, cache = attend_cached(q, k, v, cache, layer, view_mask, **named)
        else:
            out = join_heads(attend(*split_heads(q, k, v), mask, scale=scale, implementation=self.implementation))
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="proj")(out)
        return out, cache
