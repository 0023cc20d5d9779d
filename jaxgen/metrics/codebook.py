"""How much of a codebook is in use. Traceable, so a training step may report these too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

__all__ = ["count_tokens", "perplexity", "usage"]


def count_tokens(tokens: Int[Array, "..."], vocab: int) -> Int[Array, "v"]:
    """How often each code occurs. Sum the counts of several batches, then ask for `usage` or `perplexity`.

    Args:
      tokens: codes in 0..vocab-1, of any shape.
      vocab: number of codes.

    Raises:
      ValueError: tokens that are not integers, or (where they are concrete) outside 0..vocab-1.
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens of dtype {tokens.dtype}: expected integers")
    if tokens.size and not isinstance(tokens, jax.core.Tracer):
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"tokens {low}..{high}: must be in 0..{vocab - 1}")
    return jnp.bincount(tokens.reshape(-1), length=vocab)


def usage(counts: Num[Array, "v"]) -> Float[Array, ""]:
    """The fraction of codes that occur at all, in [0, 1].

    Example:
      >>> usage(jnp.array([3, 0, 1, 0]))
      Array(0.5, dtype=float32)
    """
    return (jnp.asarray(counts) > 0).mean(dtype=jnp.float32)


def perplexity(counts: Num[Array, "v"]) -> Float[Array, ""]:
    """exp of the entropy of the code frequencies: v if all are equally frequent, 1 if there is one; 0 if nothing was counted."""
    counts = jnp.asarray(counts, jnp.float32)
    total = counts.sum()
    freq = counts / jnp.where(total > 0, total, 1)
    entropy = jax.scipy.special.entr(freq).sum()
    return jnp.where(total > 0, jnp.exp(entropy), 0.0)
