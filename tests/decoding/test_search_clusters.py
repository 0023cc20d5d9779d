"""k-means against scikit-learn's, and what has to hold of any choice of representatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from jaxgen.decoding import k_means, representatives

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


@pytest.fixture(scope="module")
def blobs():
    """Three clouds of points, far from each other, in five dimensions; shuffled."""
    rng = np.random.default_rng(0)
    centres = 8 * rng.standard_normal((3, 5))
    member = rng.permutation(np.repeat(np.arange(3), (7, 5, 4)))
    return (centres[member] + 0.5 * rng.standard_normal((16, 5))).astype(np.float32), member


def test_clusters_are_those_of_scikit_learn(blobs):
    points, member = blobs
    theirs = KMeans(n_clusters=3, n_init=5, random_state=0).fit(points)
    run = jax.jit(jax.vmap(lambda key: (k_means(key, points, 3), representatives(key, points, 3))))
    centres, chosen = run(jax.random.split(jax.random.key(0), 20))
    want = np.array(sorted(theirs.cluster_centers_.tolist()))
    nearest = {int(np.square(points - centre).sum(1).argmin()) for centre in theirs.cluster_centers_}
    for mine, ids in zip(np.asarray(centres), np.asarray(chosen)):
        np.testing.assert_allclose(np.array(sorted(mine.tolist())), want, atol=1e-4)
        assert set(ids.tolist()) == nearest and set(member[ids]) == {0, 1, 2}


def test_centres_are_the_means_of_their_points():
    """Where no iteration changes anything any more, on points without clusters; few iterations are not there yet."""
    points = np.random.default_rng(1).standard_normal((60, 2)).astype(np.float32)
    run = jax.jit(lambda key: [k_means(key, points, 5, steps=steps) for steps in (1, 100)])
    early, late = run(jax.random.key(3))
    member = np.square(points[:, None] - np.asarray(late)).sum(-1).argmin(1)
    means = np.stack([points[member == k].mean(axis=0) for k in range(5)])
    np.testing.assert_allclose(late, means, atol=1e-5)
    assert np.abs(np.asarray(early) - np.asarray(late)).max() > 0.01


def test_representatives_differ_whatever_the_points():
    same = jnp.ones((6, 3))
    two = jnp.concatenate([jnp.zeros((5, 3)), jnp.ones((1, 3))])
    run = jax.jit(lambda key: (representatives(key, same, 4), representatives(key, two, 2), representatives(key, two, 6)))
    for seed in range(5):
        alike, pair, every = run(jax.random.key(seed))
        assert len(set(alike.tolist())) == 4
        assert 5 in pair.tolist()  # the odd one out is a cluster of its own
        assert sorted(every.tolist()) == list(range(6))


def test_of_equally_near_points_the_first_is_taken():
    """Both points of a pair are as far from its middle, but for rounding."""
    pairs = np.random.default_rng(0).standard_normal((40, 2, 9)).astype(np.float32)
    run = jax.jit(jax.vmap(lambda points: representatives(jax.random.key(0), points, 1)))
    np.testing.assert_array_equal(run(pairs), np.zeros((40, 1)))
