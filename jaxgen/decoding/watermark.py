"""Was a sequence drawn towards secret lists of tokens? Counts, and false-positive rates that hold.

A list colours every token green or red; a watermark makes green tokens more likely. Without the watermark a token is green
with probability gamma, the share of the vocabulary that is green, so that of T tokens g are green with g ~ Binomial(T, gamma)
(Kirchenbauer et al. 2023, section 3). That law supposes that each token is coloured by a coin of its own. Where one list serves
all positions, a token that occurs ten times has one coin, and images, whose background repeats a code, exceed the binomial
threshold far too often. `decoy_p_value` is right for any sequence: it compares with lists that were drawn like the secret
ones and never used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

__all__ = ["Detection", "binomial_p_value", "decoy_p_value", "detect", "green_counts", "histogram", "min_green"]


class Detection(NamedTuple):
    """What was found in b sequences.

    Attributes:
      green: green tokens under the list that fits best.
      count: tokens that were looked at.
      index: of that list.
      z: (green - gamma count) / sqrt(count gamma (1 - gamma)).
      p_value: of the binomial law, times the number of lists (Bonferroni): at most the false-positive rate if every token has a
        coin of its own.
    """

    green: Float[Array, "b"]
    count: Float[Array, "b"]
    index: Int[Array, "b"]
    z: Float[Array, "b"]
    p_value: Float[Array, "b"]


def histogram(
    tokens: Int[Array, "*b l"], *, vocab: int, positions: int = 1, counted: Bool[Array, "*b l"] | None = None
) -> Float[Array, "*b n v"]:
    """How often each token occurs at places 0, n, 2n, ..., at places 1, n + 1, ..., and so on.

    Args:
      tokens: of any leading shape.
      vocab: v.
      positions: n, see `green_lists`.
      counted: which tokens to look at; broadcasts against `tokens`. None is all.
    """
    counted = jnp.broadcast_to(True if counted is None else counted, tokens.shape)
    place = jnp.broadcast_to(jnp.arange(tokens.shape[-1]) % positions, tokens.shape)

    def one(tokens, place, counted):
        return jnp.zeros((positions, vocab)).at[place, tokens].add(counted.astype(jnp.float32))

    flat = (x.reshape(-1, tokens.shape[-1]) for x in (tokens, place, counted))
    return jax.vmap(one)(*flat).reshape(*tokens.shape[:-1], positions, vocab)


def green_counts(occurrences: Float[Array, "*b n v"], lists: Bool[Array, "p n v"]) -> Float[Array, "*b p"]:
    """Green tokens under each list, from a `histogram`.

    Raises:
      ValueError: lists of another vocabulary or number of positions.
    """
    if occurrences.shape[-2:] != lists.shape[-2:]:
        raise ValueError(f"a histogram {occurrences.shape} does not fit lists {lists.shape}: [positions, vocabulary] differ")
    return jnp.einsum("...nv,pnv->...p", occurrences, lists.astype(jnp.float32), precision="highest")


def detect(tokens: Int[Array, "b l"], lists: Bool[Array, "p n v"], *, counted: Bool[Array, "*b l"] | None = None) -> Detection:
    """The list of a pool that explains the tokens best, and how unlikely that is by chance.

    Args:
      tokens: read back from what is suspected, such as an image's tokens from its encoder.
      lists: the pool.
      counted: see `histogram`.
    """
    occurrences = histogram(tokens, vocab=lists.shape[-1], positions=lists.shape[-2], counted=counted)
    green, count = green_counts(occurrences, lists), occurrences.sum((-2, -1))
    gamma = lists.mean(axis=(-2, -1))
    z = (green - gamma * count[:, None]) / jnp.sqrt(jnp.maximum(count[:, None] * gamma * (1 - gamma), 1e-9))
    index = jnp.argmax(z, axis=-1)
    best = [jnp.take_along_axis(x, index[:, None], axis=1)[:, 0] for x in (green, z)]
    p_value = jnp.minimum(1.0, lists.shape[0] * binomial_p_value(best[0], count, gamma[index]))
    return Detection(best[0], count, index.astype(jnp.int32), best[1], p_value)


def binomial_p_value(green: Float[Array, "..."], count: Float[Array, "..."], gamma) -> Float[Array, "..."]:
    """P(X >= green) for X ~ Binomial(count, gamma): the regularised incomplete beta function I_gamma(g, T - g + 1)."""
    some = green > 0
    a, b = jnp.where(some, green, 1.0), jnp.where(some, count - green + 1.0, 1.0)
    return jnp.where(some, jax.scipy.special.betainc(a, b, gamma), 1.0)


def min_green(count: int, *, gamma: float, rate: float, tests: int = 1) -> int:
    """The least number of green tokens, of `count`, that chance reaches with probability at most `rate`.

    Args:
      count: T; the answer is T + 1 where no number is rare enough.
      gamma: share of the vocabulary that is green.
      rate: of false positives.
      tests: lists of the pool, or places of a crop, that are all tried: each gets `rate / tests` (Bonferroni).

    Raises:
      ValueError: no tokens, or a share, a rate or a number of tests out of range.

    Example:
      >>> min_green(256, gamma=0.5, rate=1.2e-4)
      158
    """
    if count < 1 or tests < 1:
        raise ValueError(f"count={count} and tests={tests} must be at least 1")
    if not 0 < gamma < 1 or not 0 < rate < 1:
        raise ValueError(f"gamma={gamma} and rate={rate} must be between 0 and 1")
    g = np.arange(count + 1)
    choose = np.array([math.lgamma(count + 1) - math.lgamma(i + 1) - math.lgamma(count - i + 1) for i in g])
    mass = np.exp(choose + g * math.log(gamma) + (count - g) * math.log1p(-gamma))
    tail = np.cumsum(mass[::-1])[::-1]
    rare = tail <= rate / tests
    return int(np.argmax(rare)) if rare.any() else count + 1


def decoy_p_value(
    key: Key[Array, ""],
    statistic: Callable[[Any], Float[Array, "b"]],
    draw: Callable[[Key[Array, ""]], Any],
    secret: Any,
    *,
    decoys: int,
) -> Float[Array, "b"]:
    """(1 + decoys that look at least as marked) / (1 + decoys): a p-value for any sequence, pool and crops included.

    Where the sequence was made without knowing the secret, the secret and the decoys are draws of one law, so that no place in
    their order is likelier than another (Besag & Clifford 1989). The smallest p-value is 1 / (1 + decoys).

    Args:
      key: of the decoys; not the one that the secret was drawn with.
      statistic: how marked each of b sequences looks under a secret, larger is more: all that is tried belongs inside, such as
        the maximum over a pool or over the places of a crop.
      draw: a fresh secret.
      secret: the one that was used.
      decoys: how many; a rate of r needs at least 1 / r - 1.

    Raises:
      ValueError: no decoys.
    """
    if decoys < 1:
        raise ValueError(f"decoys={decoys} must be at least 1")
    observed = statistic(secret)

    def one(above, index):
        return above + (statistic(draw(jax.random.fold_in(key, index))) >= observed), None

    above, _ = jax.lax.scan(one, jnp.zeros(observed.shape, jnp.int32), jnp.arange(decoys))
    return (1.0 + above) / (1.0 + decoys)
