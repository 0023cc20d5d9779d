"""Distilling a drafter of features: what it is allowed to glance at, and the loss on features and laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["feature_distillation", "glance"]


def glance(
    key: Key[Array, ""],
    wrong: Bool[Array, "b l"],
    share: float | Float[Array, ""],
    *,
    block: int,
    shift: int | Int[Array, ""] = 0,
) -> Bool[Array, "b l"]:
    """Which positions a semi-autoregressive drafter is shown instead of having to guess them.

    Coupled sequential glancing distillation (Gao et al. 2024, arXiv:2412.12639, section 3.2): after a first pass that gets d of a
    row's positions wrong, N = share * d of them are shown in a second pass, tokens and features together, as runs from the
    start of a block of k: the later positions of a block learn to use the earlier ones. Here blocks are taken in random order,
    with runs of 1 to k - 1 positions, as long as they fit in N; the last position of a block is never shown.

    Args:
      key: of the choice.
      wrong: where the first pass is wrong.
      share: of the wrong ones; falls from 0.4 to 0 while training.
      block: k; with 1 there is nothing to show.
      shift: position i lies in block (i + shift) // k; the first k positions are never shown.

    Returns:
      The positions to show.
    """
    b, l = wrong.shape
    if block == 1:
        return jnp.zeros((b, l), bool)
    where, what = jax.random.split(key)
    count = l // block + 2
    place = jnp.arange(l) + shift
    runs = jax.random.randint(what, (b, count), 1, block)
    # Blocks that begin before position k or behind the end come last, and never fit.
    begin = jnp.arange(count) * block - shift
    able = (begin >= block) & (begin < l)
    runs = jnp.where(able, jnp.minimum(runs, l - begin), 0)
    order = jnp.argsort(jax.random.uniform(where, (b, count)) + ~able, axis=1)
    shown = jnp.cumsum(jnp.take_along_axis(runs, order, axis=1), axis=1) <= jnp.floor(share * wrong.sum(1, keepdims=True))
    chosen = jnp.zeros((b, count), bool).at[jnp.arange(b)[:, None], order].set(shown) & able
    return chosen[:, place // block] & (place % block < runs[:, place // block])


def feature_distillation(
    features: Float[Array, "b l d"],
    guesses: Float[Array, "b l d"],
    logits: Float[Array, "b l v"],
    guessed: Float[Array, "b l v"],
    weights: Float[Array, "b l"],
    *,
    labels: Int[Array, "b l"] | None = None,
    distil: float = 0.1,
    soft: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """SmoothL1(f, f') + distil (soft KL(p, p') + (1 - soft) CE(t, p')), means over positions.

    With soft = 0.9 Falcon's loss (Gao et al. 2024, equations 2 to 8); with soft = 1 that of EAGLE (Li et al. 2024, section 4.2)
    and of SpecVLM's online distillation (Huang et al. 2025), whose cross-entropy to the target's law differs by a constant.

    Args:
      features: the target's.
      guesses: the drafter's.
      logits: the target's.
      guessed: the target's head on the drafter's features.
      weights: of positions.
      labels: t, tokens drawn from p; without them soft must be 1.
      distil: weight of the second part.
      soft: of the KL within it.

    Returns:
      (loss, metrics): "regression", "kl", and "agreement", the share of positions with the same most likely token.

    Raises:
      ValueError: hard labels are weighted and missing.
    """
    if labels is None and soft != 1:
        raise ValueError(f"soft={soft}: without labels it must be 1")
    off = jnp.abs(features - guesses)
    regression = jnp.where(off < 1, 0.5 * off**2, off - 0.5).mean(-1)
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(guessed)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    part = soft * kl
    if soft != 1:
        part -= (1 - soft) * jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]

    def mean(x):
        return (x * weights).sum() / jnp.maximum(weights.sum(), 1)

    same = (logits.argmax(-1) == guessed.argmax(-1)).astype(jnp.float32)
    metrics = {"regression": mean(regression), "kl": mean(kl), "agreement": mean(same)}
    return mean(regression + distil * part), metrics
