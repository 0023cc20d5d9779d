"""Training models of any subset: random orders, and which place is asked for behind each token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.any_subset import reading_order

__all__ = ["lattice_orders", "places_ahead"]


def lattice_orders(
    key: Key[Array, ""], b: int, length: int, hidden: tuple[float | Float[Array, ""], float | Float[Array, ""]]
) -> tuple[Int[Array, "b l"], Int[Array, "b"]]:
    """Random subsets to condition on, and the order that reads them and then the rest, each from left to right.

    Guo and Ermon (2025, arXiv:2504.20456), after Shih et al. (2022, arXiv:2205.13554): subsets of one size are equally
    likely, and the share of hidden tokens is uniform in a range, drawn for each row.

    Args:
      key: of the draw.
      b: rows.
      length: l, at least 2.
      hidden: the range of the share, within [0, 1]; at least one token is hidden and one is not.

    Returns:
      (order, how many tokens are visible) as `jaxgen.decoding.any_subset.reading_order`.
    """
    which, how_many = jax.random.split(key)
    low, high = hidden
    share = low + (high - low) * jax.random.uniform(how_many, (b,))
    count = jnp.clip(jnp.round((1 - share) * length), 1, length - 1)
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(which, (b, length)), axis=1), axis=1)
    return reading_order(rank < count[:, None])


def places_ahead(
    key: Key[Array, ""], known: Int[Array, "b"], length: int, *, furthest: int, share: float
) -> tuple[Int[Array, "b l-1"], Bool[Array, "b l-1"]]:
    """The position of the order that is asked for behind each position, and whether it counts.

    The joint law needs the next position only. Drafts are the answers behind position i for positions i + 1 .. i + k; a model
    that did not learn to skip tokens before would guess them badly, so a share of the queries looks 1 to k - 1 positions
    further (the published model has learnt it from XLNet's random permutations).

    Args:
      key: of the draw.
      known: visible tokens, which are not asked for.
      length: l.
      furthest: k.
      share: of the queries that skip tokens.

    Returns:
      (target in 1 .. l - 1, whether it is hidden).
    """
    whether, how_far = jax.random.split(key)
    here = jnp.arange(1, length)
    shape = (known.shape[0], length - 1)
    skips = jax.random.bernoulli(whether, share, shape) if furthest > 1 else jnp.zeros(shape, bool)
    further = here + jax.random.randint(how_far, shape, 1, max(furthest, 2))
    target = jnp.where(skips & (further < length), further, here)
    return target, here >= known[:, None]
