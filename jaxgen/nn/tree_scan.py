"""Recurrent layers on trees: what each node reads when only its ancestors were before it (Wu et al. 2025, arXiv:2505.14969)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["tree_read", "tree_windows"]


def tree_windows(
    x: Float[Array, "b q c"], before: Float[Array, "b w c"], mask: Bool[Array, "*b q q"]
) -> Float[Array, "b q w+1 c"]:
    """The last w + 1 inputs on the way to each node, itself at the end.

    Args:
      x: inputs of the nodes.
      before: of the tokens before the root, the last one at the end.
      mask: node i sees node j: its ancestors and itself.
    """
    b, q, _ = x.shape
    w = before.shape[1]
    mask = jnp.broadcast_to(mask, (b, q, q))
    depth = mask.sum(-1) - 1
    # The place of an ancestor in time is its depth; the token d places before the root has the place -d.
    wanted = depth[..., None] - jnp.arange(w, -1, -1)
    node = mask[:, :, None, :] & (wanted[..., None] == depth[:, None, None, :])
    old = wanted[..., None] == jnp.arange(-w, 0)
    return jnp.einsum("bqwk,bkc->bqwc", node.astype(x.dtype), x) + jnp.einsum("bqwt,btc->bqwc", old.astype(x.dtype), before)


def tree_read(
    q: Float[Array, "b q h n"],
    k: Float[Array, "b q h n"],
    v: Float[Array, "b q h p"],
    log_decay: Float[Array, "b q h"],
    memory: Float[Array, "b h n p"],
    mask: Bool[Array, "*b q q"],
) -> Float[Array, "b q h p"]:
    """y_i = q_i [e^{a_i} S + sum_j M_ij e^{a_i - a_j} k_j v_j^T] with a = M log_decay; float32.

    Args:
      q, k, v, log_decay: of the nodes.
      memory: S, before the root.
      mask: M, node i sees node j: its ancestors and itself.
    """
    b, nodes = q.shape[:2]
    mask = jnp.broadcast_to(mask, (b, nodes, nodes))
    q, k, v = (y.astype(jnp.float32) for y in (q, k, v))
    total = jnp.einsum("bij,bjh->bih", mask.astype(jnp.float32), log_decay.astype(jnp.float32))
    between = jnp.where(mask[..., None], total[:, :, None] - total[:, None], -jnp.inf)
    weights = jnp.einsum("bihn,bjhn->bijh", q, k) * jnp.exp(between)
    inside = jnp.einsum("bijh,bjhp->bihp", weights, v)
    return inside + jnp.exp(total)[..., None] * jnp.einsum("bihn,bhnp->bihp", q, memory)
