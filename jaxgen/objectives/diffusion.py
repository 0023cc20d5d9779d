"""Losses of masked diffusion: the bound on the likelihood, and MaskGIT's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.objectives.likelihood import cross_entropy

__all__ = ["masked_elbo", "masked_prediction", "stratified_times"]


def stratified_times(
    key: Key[Array, ""], shape: tuple[int, ...], *, low: float = 1e-3, high: float = 1.0
) -> Float[Array, "*shape"]:
    """Times that are each uniform in [low, high) and together spread evenly, which makes a batch's loss less noisy.

    With n entries, t_i = (u + i / n) mod 1 in shuffled order (Kingma et al. 2021, appendix I.1).

    Args:
      key: of the draw.
      shape: such as (b,), or (b, blocks) to be repeated over each block's positions.
      low: > 0, since the bound's weight grows like 1 / t. BD3-LM picks a range [low, high] for each block size, with less
        variance (Arriola et al. 2025), and trains on the plain loss within it.
      high: at most 1.

    Raises:
      ValueError: a range that is not within (0, 1].
    """
    if not 0 < low < high <= 1:
        raise ValueError(f"low={low} and high={high}: expected 0 < low < high <= 1")
    offset, shuffle = jax.random.split(key)
    n = int(np.prod(shape))
    t = (jax.random.uniform(offset) + jnp.arange(n) / n) % 1.0
    return low + (high - low) * jax.random.permutation(shuffle, t).reshape(shape)


def masked_elbo(
    logits: Float[Array, "b l v"], tokens: Int[Array, "b l"], masked: Bool[Array, "b l"], weight: Float[Array, "b *l"]
) -> Float[Array, "b l"]:
    """weight(t) * -log p(token | tokens at time t) where masked, else 0.

    Summed over positions and averaged over t this is an upper bound on -log p(tokens) in nats, the same for every schedule
    (Sahoo et al. 2024, section 3.4; for blocks Arriola et al. 2025): the mean over all orders of revealing of what an
    autoregressive model in that order would pay.

    Args:
      logits: of each position's own token, the mask not among them.
      tokens: data.
      masked: which the model did not see.
      weight: `Masking.weight(t)`, one a row or one a position.
    """
    weight = weight[:, None] if weight.ndim == 1 else weight
    return jnp.where(masked, weight * cross_entropy(logits, tokens), 0.0)


def masked_prediction(
    logits: Float[Array, "b l v"], tokens: Int[Array, "b l"], masked: Bool[Array, "b l"], *, label_smoothing: float = 0.1
) -> Float[Array, ""]:
    """Mean of -log p(token) over the masked positions of a batch (MaskGIT, Chang et al. 2022, eq. 1).

    Args:
      logits: as in `masked_elbo`.
      tokens: data.
      masked: which the model did not see.
      label_smoothing: the authors' 0.1.
    """
    loss = cross_entropy(logits, tokens, label_smoothing=label_smoothing)
    return jnp.where(masked, loss, 0.0).sum() / jnp.maximum(masked.sum(), 1)
