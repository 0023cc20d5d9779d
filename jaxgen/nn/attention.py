"""Multi-head self-attention: one function that picks an implementation, one module with projections and cache."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import BlockMask

__all__ = ["SelfAttention", "attend"]

IMPLEMENTATIONS = ("xla", "cudnn")
# exp(log 100) is the largest factor on normalised queries (VAR; Swin v2 uses the same bound).
MAX_LOG_SCALE = math.log(100.0)


def attend(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    mask: BlockMask | Bool[Array, "*b h q s"] | None = None,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b q h d"]:
    """softmax(scale q k^T) v, with the softmax in float32.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: who may attend to whom: a `BlockMask`, or a bool array that broadcasts to [b, h, q, s]; None is everybody.
      scale: of the products; None is d ** -0.5.
      implementation: "xla" anywhere, "cudnn" on NVIDIA GPUs in half precision, None picks.

    Raises:
      ValueError: an unknown implementation, or one that this device or dtype lacks.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}")
    if isinstance(mask, BlockMask):
        if mask.shape != (q.shape[1], k.shape[1]):
            raise ValueError(f"mask {mask} does not fit q {q.shape} and k {k.shape}")
        mask = mask.traced()[None, None]
    has_cudnn = jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16)
    if implementation == "cudnn" and not has_cudnn:
        raise ValueError(f"implementation='cudnn' needs a GPU and half precision; got {jax.default_backend()}, {q.dtype}")
    if implementation is None:
        implementation = "cudnn" if has_cudnn and _cudnn_takes(q, k, mask) else "xla"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)


def _cudnn_takes(q, k, mask) -> bool:
    """Whether cuDNN has a kernel for these shapes: head sizes up to 128, and masks in training for even lengths only."""
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and (mask is None or even)


def _l2_normalise(x):
    """x / |x|; where x is 0 the result and its gradient are finite."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


class SelfAttention(nn.Module):
    """Self-attention with one fused projection, biases on queries and values (a bias on keys has no effect).

    Attributes:
      heads: h; must divide the width.
      l2_norm: queries and keys are unit vectors and each head has a learned scale, exp(min(s, log 100)), s_0 = log 4.
      scale: of the products where `l2_norm` is off; None is d ** -0.5.
      mask: of training without a cache.
      out_init: initialiser of the output projection.
      dtype: of the computation; parameters, norms and softmax are float32.
      implementation: see `attend`.
    """

    heads: int
    l2_norm: bool = False
    scale: float | None = None
    mask: BlockMask | None = None
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], cache=None, layer=0, view_mask=None):
        """Returns (output [b, l, d], cache). With a cache, x is staged in it and sees what the cache lets it see."""
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width {width}")
        head_size = width // self.heads
        shape = (self.heads, head_size)
        zeros = nn.initializers.zeros_init()
        qkv = nn.DenseGeneral((3, *shape), use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv")(x)
        q = qkv[:, :, 0] + self.param("q_bias", zeros, shape).astype(self.dtype)
        k = qkv[:, :, 1]
        v = qkv[:, :, 2] + self.param("v_bias", zeros, shape).astype(self.dtype)
        scale = self.scale
        if self.l2_norm:
            log_scale = self.param("log_scale", nn.initializers.constant(math.log(4.0)), (self.heads, 1))
            q = (_l2_normalise(q) * jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE))).astype(self.dtype)
            k = _l2_normalise(k).astype(self.dtype)
            scale = 1.0
        mask = self.mask
        if cache is not None:
            cache = cache.stage(layer, k, v)
            k, v, mask = cache.read(layer, x.shape[1], view_mask)
            k, v = k.astype(self.dtype), v.astype(self.dtype)
        out = attend(q, k, v, mask, scale=scale, implementation=self.implementation)
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="proj")(out)
        return out, cache
