"""Attention to a text: of a picture's positions, and of a learned query that sums it up."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgen.nn.attention import attend
from jaxgen.nn.rope import rotate

__all__ = ["AttentionPool", "Context", "CrossAttention"]


class Context(NamedTuple):
    """What is attended to.

    Attributes:
      features: [b, n, c], padded to one length.
      mask: [b, n], False on the padding; or [b, q, n], where queries see different things. Each sees at least one.
    """

    features: Float[Array, "b n c"]
    mask: Bool[Array, "b *q n"]


def _read(module, q: Float[Array, "b q h k"], context: Context, width: int) -> Float[Array, "b q d"]:
    """Attention of queries to a context, and the projection behind it; called in the `compact` method of `module`."""
    shape = q.shape[2:]
    kv = nn.DenseGeneral((2, *shape), use_bias=False, kernel_init=module.kernel_init, dtype=module.dtype, name="kv")
    k, v = jnp.moveaxis(kv(context.features.astype(module.dtype)), 2, 0)
    v = v + module.param("v_bias", nn.initializers.zeros_init(), shape).astype(module.dtype)
    if module.half:
        q, k, v = map(_half, (q, k, v))
    mask = context.mask[:, None] if context.mask.ndim == 3 else context.mask[:, None, None]
    out = attend(q, k, v, mask)
    out = _half(out) if module.half else out
    return nn.DenseGeneral(width, axis=(-2, -1), kernel_init=module.out_init, dtype=module.dtype, name="proj")(out)


def _half(x):
    """`x` rounded to what a bfloat16 holds, in its own type; a pair of casts might be optimised away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


class CrossAttention(nn.Module):
    """Positions ask a context; biases on queries and values.

    Attributes:
      heads: h; must divide the width of the positions.
      half: queries, keys, values and the result are rounded to bfloat16 whatever `dtype` is, as some published models run.
      kernel_init, out_init, dtype: see `SelfAttention`.
    """

    heads: int
    half: bool = False
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], context: Context, coords=None) -> Float[Array, "b l d"]:
        """What each position reads. With `coords`, places [l, n], queries turn (see `rotate`); keys have no places."""
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width {width}")
        shape = (self.heads, width // self.heads)
        q = nn.DenseGeneral(shape, kernel_init=self.kernel_init, dtype=self.dtype, name="q")(x)
        return _read(self, q if coords is None else rotate(q, jnp.asarray(coords)[None]), context, width)


class AttentionPool(nn.Module):
    """One vector for a context: what a learned query reads in it.

    Attributes:
      width: d, of the result.
      heads: h; must divide d.
      half, kernel_init, out_init, dtype: see `CrossAttention`.
    """

    width: int
    heads: int
    half: bool = False
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, context: Context) -> Float[Array, "b d"]:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide width {self.width}")
        init = nn.initializers.normal((1 / (3 * self.width)) ** 0.5)
        query = self.param("query", init, (self.heads, self.width // self.heads)).astype(self.dtype)
        q = jnp.broadcast_to(query, (context.features.shape[0], 1, *query.shape))
        return _read(self, q, context, self.width)[:, 0]
