"""Distances of features against NumPy, and what the contrastive loss tells apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives.alignment import cosine_distance, info_nce

pytestmark = pytest.mark.numeric
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 5, 3)).astype(np.float32)


def test_cosine_distance():
    want = [1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(X, Y)]
    np.testing.assert_allclose(cosine_distance(X, Y), want, atol=1e-6)
    np.testing.assert_allclose(cosine_distance(X, -3 * X), 2.0, atol=1e-6)
    assert cosine_distance(X[:, None], Y[None]).shape == (5, 5)
    # Half the squared distance of the unit vectors.
    x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (X, Y))
    np.testing.assert_allclose(2 * cosine_distance(X, Y), np.square(x - y).sum(-1), atol=1e-6)
    gradient = jax.grad(lambda x: cosine_distance(x, jnp.ones(3)))(jnp.zeros(3))
    assert np.isfinite(gradient).all() and cosine_distance(jnp.zeros(3), jnp.ones(3)) == 1


def test_info_nce_by_enumeration():
    """The mean over rows and columns of -log of the share that the own pair has."""
    x, y = (np.float64(z) / np.linalg.norm(z, axis=-1, keepdims=True) for z in (X, Y))
    scores = np.exp([[a @ b / 0.3 for b in y] for a in x])
    shares = [scores[i, i] / np.array([scores[i].sum(), scores[:, i].sum()]) for i in range(5)]
    assert info_nce(X, Y, temperature=0.3) == pytest.approx(-np.log(shares).mean(), rel=1e-5)
    assert info_nce(X, X, temperature=0.01) < 1e-3  # each finds itself
    assert info_nce(np.ones_like(X), np.ones_like(X)) == pytest.approx(np.log(5), rel=1e-5)
