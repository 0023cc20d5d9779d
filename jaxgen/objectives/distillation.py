"""Losses that pull a draft's law q towards a target's law p: divergences, and the policy-gradient view of total variation.

Speculative sampling accepts a draft with probability 1 - TVD(p, q), so that total variation is what a draft should minimise
(Leviathan et al. 2023, corollary 3.6). Its gradient is a policy gradient with a reward of 0 or 1 (Goel et al. 2024,
arXiv:2403.00858, lemma 1), of which TVD++ lowers the variance as one does there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["forward_kl", "policy_gradient", "total_variation", "tvd_plus_plus"]


def forward_kl(draft: Float[Array, "*b v"], target: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    """KL(p || q) = sum_x p(x) (log p(x) - log q(x)) in nats.

    Args:
      draft: logits of q.
      target: logits of p; no gradient goes there, here and below.
    """
    log_q, log_p = _laws(draft, target)
    return jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0.0).sum(axis=-1)


def total_variation(draft: Float[Array, "*b v"], target: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    """TVD(p, q) = 1/2 sum_x |p(x) - q(x)|: the probability that a draft from q is rejected. Arguments as of `forward_kl`."""
    log_q, log_p = _laws(draft, target)
    return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(axis=-1)


def tvd_plus_plus(
    draft: Float[Array, "*b v"], target: Float[Array, "*b v"], where: Bool[Array, "*b"] | None = None
) -> Float[Array, "*b"]:
    """A loss with the gradient of TVD++: E_{x~q}[-A(x) grad log q(x)], A = (r - mean(r)) / std(r), r(x) = [p(x) > q(x)].

    With r in the place of A this is the gradient of `total_variation`. Mean and deviation are over all positions of the batch,
    with x ~ q at each. Expectations are sums over the vocabulary here, so that the mean changes nothing and the deviation
    rescales a batch's gradient; it is of sampled tokens (`policy_gradient`) that the mean lowers the variance.

    The value of the loss is 0 in expectation and means nothing.

    Args:
      draft, target: see `forward_kl`.
      where: positions that count; None is all.
    """
    log_q, log_p = _laws(draft, target)
    q = jax.lax.stop_gradient(jnp.exp(log_q))
    reward = _reward(jax.lax.stop_gradient(log_q), log_p)
    weight = q if where is None else q * where[..., None]
    advantage = _normalised(reward, weight)
    # log q is -inf where the draft's logits are; q is 0 there.
    return -(q * advantage * jnp.where(q > 0, log_q, 0.0)).sum(axis=-1)


def policy_gradient(
    draft: Float[Array, "*b v"],
    target: Float[Array, "*b v"],
    tokens: Int[Array, "*b"],
    where: Bool[Array, "*b"] | None = None,
    *,
    normalise: bool = True,
) -> Float[Array, "*b"]:
    """The same of tokens x ~ q sampled at each position, for vocabularies too large to sum over: -A(x) log q(x).

    Args:
      draft, target: see `forward_kl`.
      tokens: drawn from q.
      where: positions that count; None is all.
      normalise: TVD++; else A is r, whose gradient is that of `total_variation` in expectation.
    """
    log_q, log_p = _laws(draft, target)
    picked = jnp.take_along_axis(log_q, tokens[..., None], axis=-1)[..., 0]
    reward = _reward(jax.lax.stop_gradient(log_q), log_p)
    reward = jnp.take_along_axis(reward, tokens[..., None], axis=-1)[..., 0]
    if normalise:
        reward = _normalised(reward, jnp.ones_like(reward) if where is None else where.astype(jnp.float32))
    return -reward * picked


def _laws(draft, target):
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    return jax.nn.log_softmax(draft.astype(jnp.float32), axis=-1), jax.nn.log_softmax(target, axis=-1)


def _reward(log_q, log_p):
    return (log_p > log_q).astype(jnp.float32)


def _normalised(reward, weight):
    """(reward - mean) / deviation, both weighted; 0 where all rewards are the same."""
    total = jnp.maximum(weight.sum(), 1e-9)
    mean = (weight * reward).sum() / total
    deviation = jnp.sqrt((weight * jnp.square(reward - mean)).sum() / total)
    return (reward - mean) / jnp.maximum(deviation, 1e-4)
