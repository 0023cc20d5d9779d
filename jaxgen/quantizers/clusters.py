"""Codes that look alike under one label: k-means over a codebook (CTF, Guo et al. 2025, arXiv:2503.16194)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.quantizers.vector import nearest

__all__ = ["cluster_codes"]


def cluster_codes(
    codes: Float[Array, "v c"], clusters: int, *, key: Key[Array, ""] | None = None, iterations: int = 50
) -> Int[Array, "v"]:
    """The cluster of each code, 0 .. k - 1, so that codes lie near the mean of their cluster (Lloyd 1982). None is empty.

    It starts from codes that are drawn in turn, each with a probability in proportion to its squared distance from those drawn
    before (k-means++, Arthur & Vassilvitskii 2007). A cluster that ends up empty takes the code that is farthest from its mean
    among clusters of several.

    Args:
      codes: of the quantiser, as it compares them: unit vectors where it goes by direction.
      clusters: k.
      key: of the start; None is always the same.
      iterations: of Lloyd's two steps.

    Raises:
      ValueError: fewer than one cluster, or more than codes.

    Example:
      >>> cluster_codes(jnp.array([[0.0], [0.1], [5.0]]), 2)  # two alike and one by itself
    """
    v = len(codes)
    if not 1 <= clusters <= v:
        raise ValueError(f"clusters={clusters}: expected 1..{v}, as many as there are codes at most")
    key = jax.random.key(0) if key is None else key

    def improve(_, means):
        labels = nearest(codes, means)
        counts = jnp.zeros(clusters).at[labels].add(1.0)
        sums = jnp.zeros_like(means).at[labels].add(codes)
        return jnp.where(counts[:, None] > 0, sums / jnp.maximum(counts, 1)[:, None], means)

    means = jax.lax.fori_loop(0, iterations, improve, _spread(codes, clusters, key))
    labels = nearest(codes, means).astype(jnp.int32)

    def fill(i, labels):
        counts = jnp.zeros(clusters, jnp.int32).at[labels].add(1)
        far = jnp.square(codes - means[labels]).sum(-1)
        far = jnp.where(counts[labels] > 1, far, -1.0)
        return jnp.where(counts[i] > 0, labels, labels.at[far.argmax()].set(i))

    return jax.lax.fori_loop(0, clusters, fill, labels)


def _spread(codes: Float[Array, "v c"], clusters: int, key: Key[Array, ""]) -> Float[Array, "k c"]:
    """Codes to start from, far from one another."""
    first = codes[jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(codes))]
    means = jnp.zeros((clusters, codes.shape[1]), codes.dtype).at[0].set(first)

    def draw(i, carry):
        means, distance = carry
        # Once all codes are taken, those that are alike included, any will do.
        odds = jnp.where(distance.any(), jnp.log(distance), 0.0)
        mean = codes[jax.random.categorical(jax.random.fold_in(key, i), odds)]
        return means.at[i].set(mean), jnp.minimum(distance, jnp.square(codes - mean).sum(-1))

    return jax.lax.fori_loop(1, clusters, draw, (means, jnp.square(codes - first).sum(-1)))[0]
