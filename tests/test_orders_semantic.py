"""Orders of patches that their features decide, on maps small enough to look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.orders_semantic import KINDS, patch_order, similarities

pytestmark = pytest.mark.numeric
KEY = jax.random.key(0)
# Each has its most similar patch at another place of a 3 x 3 grid.
MAPS = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.9, 0.5, 0.6, 0.7, 0.8], [0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]])


def test_similarities_are_cosines_with_the_first():
    tokens = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    want = [[np.dot(t[0], p) / np.linalg.norm(t[0]) / np.linalg.norm(p) for p in t[1:]] for t in tokens]
    np.testing.assert_allclose(similarities(tokens), want, atol=1e-5)


def test_semantic_goes_outwards_from_the_most_similar():
    orders = np.asarray(patch_order("semantic", MAPS, KEY))
    assert orders[0, 0] == 4 and set(orders[0, 1:5]) == {1, 3, 5, 7} and set(orders[0, 5:]) == {0, 2, 6, 8}
    rings = ({0}, {1, 3}, {4}, {2, 6}, {5, 7}, {8})
    assert [set(part) for part in np.split(orders[1], np.cumsum([len(r) for r in rings])[:-1])] == list(rings)
    others = np.asarray(patch_order("semantic", MAPS, jax.random.key(1)))
    assert (others != orders).any()  # ties are broken by chance


def test_other_kinds():
    np.testing.assert_array_equal(patch_order("similarity", MAPS, KEY)[0], [4, 8, 7, 6, 5, 3, 2, 1, 0])
    np.testing.assert_array_equal(patch_order("raster", MAPS, KEY), np.tile(np.arange(9), (2, 1)))
    chance = np.asarray(patch_order("random", jnp.zeros((200, 9)), KEY))
    assert (np.sort(chance, axis=1) == np.arange(9)).all()
    # Any patch may come first: 200 / 9 times each, give or take 5 deviations.
    assert (np.abs(np.bincount(chance[:, 0], minlength=9) - 200 / 9) < 5 * np.sqrt(200 / 9)).all()


def test_bad_input():
    with pytest.raises(ValueError, match=f"kind 'spiral' of 9 patches: expected one of {', '.join(KINDS)}"):
        patch_order("spiral", MAPS, KEY)
    with pytest.raises(ValueError, match="of 8 patches"):
        patch_order("semantic", MAPS[:, :8], KEY)
