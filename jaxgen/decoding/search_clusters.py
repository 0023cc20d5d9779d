"""Choosing a few points that stand for many: k-means and the points nearest to its centres."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["k_means", "representatives"]

# Squared distances that differ by less are equal: how they were summed, on one device or several, is to make no difference.
_ROUNDING = 1e-4


def k_means(key: Key[Array, ""], points: Float[Array, "n d"], count: int, *, steps: int = 20) -> Float[Array, "k d"]:
    """Centres of clusters, by Lloyd's iterations from k-means++ seeds (Arthur & Vassilvitskii 2007).

    The first seed is a point at random; each other one is drawn with a probability proportional to the squared distance to the
    nearest seed so far. A centre that loses all its points stays where it is.

    Args:
      key: of the seeds.
      points: what is to be clustered.
      count: k.
      steps: Lloyd's iterations.
    """
    points = jnp.asarray(points, jnp.float32)
    first = points[jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(points))]

    def seed(i, carry):
        seeds, nearest = carry
        one = points[jax.random.categorical(jax.random.fold_in(key, i), jnp.log(nearest))]
        return seeds.at[i].set(one), jnp.minimum(nearest, _distances(points, one[None])[:, 0])

    seeds = jnp.zeros((count, points.shape[1])).at[0].set(first)
    seeds, _ = jax.lax.fori_loop(1, count, seed, (seeds, _distances(points, first[None])[:, 0]))

    def step(_, centres):
        member = jax.nn.one_hot(_distances(points, centres).argmin(axis=1), count)
        sizes = member.sum(axis=0)[:, None]
        means = jnp.einsum("nk,nd->kd", member, points, precision="highest") / jnp.maximum(sizes, 1)
        return jnp.where(sizes > 0, means, centres)

    return jax.lax.fori_loop(0, steps, step, seeds)


def representatives(key: Key[Array, ""], points: Float[Array, "n d"], count: int, *, steps: int = 20) -> Int[Array, "k"]:
    """For each cluster of `k_means` its point nearest to the centre; different points, whatever the clusters.

    A cluster without a point of its own left takes the nearest one of another. Of points that are equally near, as both of a
    cluster of two are, the first one is taken.

    Args:
      key, points, steps: see `k_means`.
      count: k, at most n.
    """
    points = jnp.asarray(points, jnp.float32)
    distances = _distances(points, k_means(key, points, count, steps=steps))
    foreign = distances.argmin(axis=1)[:, None] != jnp.arange(count)
    # Not infinite, so that points of other clusters remain ordered by distance.
    distances += jnp.where(foreign, 1e3 * (1 + distances.max()), 0.0)
    chosen = []
    for cluster in range(count):
        taken = jnp.zeros(len(points), bool).at[jnp.array(chosen, jnp.int32)].set(True) if chosen else False
        near = jnp.where(taken, jnp.inf, distances[:, cluster])
        chosen.append((near <= (1 + _ROUNDING) * near.min()).argmax())
    return jnp.stack(chosen)


def _distances(points: Float[Array, "n d"], centres: Float[Array, "k d"]) -> Float[Array, "n k"]:
    """Squared."""
    return jnp.square(points[:, None] - centres).sum(axis=-1)
