"""Maximum likelihood of discrete tokens, and label dropping for guidance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["cross_entropy", "drop_labels"]


def cross_entropy(logits: Float[Array, "*b v"], targets: Int[Array, "*b"], *, label_smoothing: float = 0.0) -> Float[Array, "*b"]:
    """-sum_i t_i log softmax(logits)_i in nats, with t = (1 - s) onehot(target) + s / v.

    Args:
      logits: any float type; computed in float32.
      targets: class ids.
      label_smoothing: s.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_z - picked
    if label_smoothing == 0.0:
        return nll
    return (1 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(-1))


def drop_labels(key: Key[Array, ""], labels: Int[Array, "b"], null: int, rate: float) -> Int[Array, "b"]:
    """Each label replaced by `null` with probability `rate` (Ho & Salimans 2021, algorithm 1)."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)
