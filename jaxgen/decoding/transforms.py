"""Changes to logits before sampling: temperature, top-k, top-p. All settings are traced, so changing them compiles nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["check_settings", "truncate"]


def check_settings(*, cfg=0.0, temperature=1.0, top_k=0, top_p=0.0, vocab: int | None = None) -> None:
    """Checks sampling settings that are concrete numbers; traced ones pass.

    Raises:
      ValueError: naming the setting and its value.
    """
    checks = (
        ("cfg", cfg, np.isfinite, "finite"),
        ("temperature", temperature, lambda x: 0 < x < np.inf, "> 0 and finite"),
        ("top_k", top_k, lambda x: x >= 0 and x == int(x) and (vocab is None or x <= vocab), f"in 0..{vocab or 'v'}"),
        ("top_p", top_p, lambda x: 0 <= x <= 1, "in [0, 1]"),
    )
    for name, value, valid, want in checks:
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise ValueError(f"{name}={value}: must be {want}")


def truncate(logits: Float[Array, "... v"], *, temperature=1.0, top_k=0, top_p=0.0) -> Float[Array, "... v"]:
    """Logits / temperature with everything outside the top-k and then the top-p set at -inf.

    The top-p set is the smallest set of most probable tokens, after top-k, whose mass reaches p (Holtzman et al. 2020); ties
    with the last token kept are kept too.

    Args:
      logits: of any leading shape.
      temperature: > 0.
      top_k: how many tokens to keep; 0 keeps all.
      top_p: the mass to keep; 0 or 1 keeps all.
    """
    logits = logits.astype(jnp.float32) / temperature
    vocab = logits.shape[-1]
    top_k, top_p = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32)

    def cut(x):
        # Sorting is the cost here, so the whole branch is skipped when nothing is to be cut.
        descending = -jnp.sort(-x, axis=-1)
        kth = jnp.where(top_k > 0, jnp.clip(top_k, 1, vocab), vocab) - 1
        ranked = jnp.where(jnp.arange(vocab) <= kth, descending, -jnp.inf)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        # Infinity where it is off: rounding lifts the mass before an unlikely token to 1.
        keep = (before < jnp.where((top_p > 0) & (top_p < 1), top_p, jnp.inf)) & (jnp.arange(vocab) <= kth)
        keep = keep.at[..., 0].set(True)
        threshold = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(x >= threshold, x, -jnp.inf)

    active = (top_k > 0) | ((top_p > 0) & (top_p < 1))
    return jax.lax.cond(active, cut, lambda x: x, logits)
