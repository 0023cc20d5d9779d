"""k-means over codes: separate groups are found, it is a fixed point of Lloyd's steps, and nothing is empty."""

import jax
import numpy as np
import pytest

from jaxgen.quantizers import cluster_codes

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

RUN = jax.jit(cluster_codes, static_argnums=1, static_argnames="iterations")


def test_groups_far_apart_are_found():
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(5), 8))
    codes = 10 * np.eye(5, 4)[group] + 0.1 * rng.standard_normal((40, 4))  # the fifth group is at the origin
    found = np.asarray(RUN(codes.astype(np.float32), 5))
    np.testing.assert_array_equal(found[:, None] == found, group[:, None] == group)
    assert sorted(set(found)) == list(range(5))


def test_every_code_is_nearest_to_the_mean_of_its_cluster():
    codes = np.random.default_rng(1).standard_normal((40, 4)).astype(np.float32)
    found, start = np.asarray(RUN(codes, 5)), np.asarray(RUN(codes, 5, iterations=0))

    def spread(labels):
        means = np.stack([codes[labels == i].mean(0) for i in range(5)])
        distance = ((codes[:, None] - means) ** 2).sum(-1)
        return distance, distance[np.arange(40), labels].sum()

    distance, within = spread(found)
    np.testing.assert_array_equal(distance.argmin(1), found)
    assert within < spread(start)[1]
    other = np.asarray(RUN(codes, 5, key=jax.random.key(1)))
    assert np.any(other != found)


def test_no_cluster_is_empty():
    """Though all codes but two are the same."""
    codes = np.zeros((8, 2), np.float32)
    codes[:2] = [[1, 0], [0, 3]]
    found = np.asarray(RUN(codes, 6))
    assert sorted(set(found)) == list(range(6))
    np.testing.assert_array_equal(np.sort(np.asarray(RUN(codes, 8))), np.arange(8))


@pytest.mark.parametrize("clusters", [0, 9])
def test_clusters_that_cannot_be(clusters):
    with pytest.raises(ValueError, match=f"clusters={clusters}: expected 1..8"):
        cluster_codes(np.zeros((8, 2), np.float32), clusters)
