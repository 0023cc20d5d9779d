"""Codes that look alike under one label: k-means over a codebook (CTF, Guo et al. 2025, arXiv:2503.16194)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding.search_clusters import k_means
from jaxgen.quantizers.vector import nearest

__all__ = ["cluster_codes"]


def cluster_codes(
    codes: Float[Array, "v c"], clusters: int, *, key: Key[Array, ""] | None = None, iterations: int = 50
) -> Int[Array, "v"]:
    """The cluster of each code, 0 .. k - 1, so that codes lie near the mean of their cluster. None is empty.

    See `jaxgen.decoding.k_means`; a cluster that ends up empty takes the code that is farthest from its mean, of clusters of
    several.

    Args:
      codes: of the quantiser, as it compares them: unit vectors where it goes by direction.
      clusters: k.
      key: of the seeds; None is always the same.
      iterations: Lloyd's.

    Raises:
      ValueError: fewer than one cluster, or more than codes.

    Example:
      >>> cluster_codes(jnp.array([[0.0], [0.1], [5.0]]), 2)  # two alike and one by itself
    """
    v = len(codes)
    if not 1 <= clusters <= v:
        raise ValueError(f"clusters={clusters}: expected 1..{v}, as many as there are codes at most")
    means = k_means(jax.random.key(0) if key is None else key, codes, clusters, steps=iterations)
    labels = nearest(codes, means).astype(jnp.int32)

    def fill(i, labels):
        counts = jnp.zeros(clusters, jnp.int32).at[labels].add(1)
        far = jnp.square(codes - means[labels]).sum(-1)
        far = jnp.where(counts[labels] > 1, far, -1.0)
        return jnp.where(counts[i] > 0, labels, labels.at[far.argmax()].set(i))

    return jax.lax.fori_loop(0, clusters, fill, labels)
