"""One softmax out of parts: attention over disjoint sets of keys, put together by their log-sum-exps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["merge", "merge_parts"]


def merge(
    o1: Float[Array, "*n d"], lse1: Float[Array, "*n"], o2: Float[Array, "*n d"], lse2: Float[Array, "*n"]
) -> tuple[Float[Array, "*n d"], Float[Array, "*n"]]:
    """Attention over the keys of two disjoint sets, from attention over each.

    With `lse = log(exp(lse1) + exp(lse2))`: `o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2` (Rabe and Staats 2021, section 2;
    Dao et al. 2022, section 3.1). A part with lse = -inf has no keys and counts nothing; where both have none, o = 0 and
    lse = -inf. Differentiable in all four; the result is that of one softmax, values and gradients.

    Args:
      o1: output over the first set, such as [b, sq, h, d].
      lse1: natural logarithm of the sum of its exponentials, as o1 without d.
      o2: output over the second set.
      lse2: its log-sum-exp.

    Returns:
      o in the dtype of o1, and lse in float32.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> o, lse = merge(jnp.ones((1, 2)), jnp.zeros(1), jnp.zeros((1, 2)), jnp.zeros(1))
      >>> o.tolist(), round(float(lse[0]), 3)
      ([[0.5, 0.5]], 0.693)
    """
    return merge_parts([(o1, lse1), (o2, lse2)])


def merge_parts(
    parts: Sequence[tuple[Float[Array, "*n d"], Float[Array, "*n"]]],
) -> tuple[Float[Array, "*n d"], Float[Array, "*n"]]:
    """`merge` of any number of parts (o, lse).

    Raises:
      ValueError: no parts, or shapes that do not fit.
    """
    if not parts:
        raise ValueError("merge_parts needs at least one part")
    shape = parts[0][0].shape
    for i, (o, lse) in enumerate(parts):
        if o.shape != shape or lse.shape != shape[:-1]:
            raise ValueError(f"parts[{i}]: o {o.shape} and lse {lse.shape} do not fit o {shape} and lse {shape[:-1]}")
    lses = jnp.stack([lse.astype(jnp.float32) for _, lse in parts])
    top = jax.lax.stop_gradient(lses.max(axis=0))
    dead = top == -jnp.inf
    weights = jnp.exp(lses - jnp.where(dead, 0.0, top))
    # Both branches of every `where` are finite, or its gradient would be NaN.
    total = jnp.where(dead, 1.0, weights.sum(axis=0))
    o = sum((w / total)[..., None] * o.astype(jnp.float32) for w, (o, _) in zip(weights, parts))
    return o.astype(parts[0][0].dtype), jnp.where(dead, -jnp.inf, top + jnp.log(total))
