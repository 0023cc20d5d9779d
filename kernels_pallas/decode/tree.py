"""The part of tree attention that is not the cache: nodes of a tree to their ancestors."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

__all__ = ["ancestor_attention"]


def ancestor_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    v: Float[Array, "b t g d"],
    ancestors: Bool[Array, "*b t t"],
    scale: float,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h"]]:
    """Dense attention of t nodes among themselves; trees are small, so that XLA is good enough.

    Args:
      q: queries.
      k: keys, of g heads that divide h.
      v: values.
      ancestors: node i attends to node j where [..., i, j].
      scale: of the products.

    Returns:
      (o, lse) in float32; 0 and -inf for a node without ancestors. Differentiable, also there.
    """
    b, t, h, d = q.shape
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    rows = q.reshape(b, t, k.shape[2], -1, d)
    s = jnp.einsum("btgrd,bjgd->btgrj", rows, k, precision=precision, preferred_element_type=jnp.float32) * scale
    s = jnp.where(ancestors[..., :, None, None, :], s, -jnp.inf)
    m = lax.stop_gradient(s.max(axis=-1, keepdims=True))
    dead = m == -jnp.inf
    m = jnp.where(dead, 0.0, m)
    p = jnp.exp(s - m)
    # Both branches of every `where` are finite, or its gradient would be NaN.
    l = jnp.where(dead, 1.0, p.sum(axis=-1, keepdims=True))
    p = (p / l).astype(v.dtype)
    o = jnp.einsum("btgrj,bjgd->btgrd", p, v, precision=precision, preferred_element_type=jnp.float32)
    lse = jnp.where(dead, -jnp.inf, m + jnp.log(l))
    return o.reshape(b, t, h, d), lse.reshape(b, t, h)
