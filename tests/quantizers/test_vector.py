import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.quantizers import CodebookState, nearest, revive

pytestmark = pytest.mark.numeric


def test_nearest_is_the_smallest_distance():
    rng = np.random.default_rng(0)
    x, codebook = rng.normal(size=(3, 20, 5)), rng.normal(size=(17, 5))
    distance = np.square(x[:, :, None] - codebook).sum(-1)
    ids = nearest(jnp.asarray(x, jnp.float32), jnp.asarray(codebook, jnp.float32))
    assert ids.shape == (3, 20)
    np.testing.assert_array_equal(ids, distance.argmin(-1))


def test_nearest_by_angle():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5))
    codebook = rng.normal(size=(17, 5)) * rng.uniform(0.1, 10, (17, 1))  # lengths that would decide a distance
    cosine = (x / np.linalg.norm(x, axis=1)[:, None]) @ (codebook / np.linalg.norm(codebook, axis=1)[:, None]).T
    args = jnp.asarray(x, jnp.float32), jnp.asarray(codebook, jnp.float32)
    np.testing.assert_array_equal(nearest(*args, cosine=True), cosine.argmax(-1))
    assert np.any(nearest(*args) != cosine.argmax(-1))


def test_usage_is_a_moving_average_and_candidates_come_from_the_batch():
    rng = np.random.default_rng(2)
    vectors = jnp.asarray(rng.normal(size=(50, 3)), jnp.float32)
    state, usage = CodebookState.zeros(4, 3, 6), np.zeros(4)
    assert state.usage.shape == (4,) and state.candidates.shape == (6, 3)
    for i in range(3):
        counts = rng.integers(0, 9, 4)
        state = state.update(jnp.asarray(counts), vectors, jax.random.key(i), decay=0.9)
        usage = 0.9 * usage + 0.1 * counts
    np.testing.assert_allclose(state.usage, usage, rtol=1e-6)
    rows = {tuple(v) for v in np.asarray(vectors).tolist()}
    assert all(tuple(c) in rows for c in np.asarray(state.candidates).tolist())
    again = state.update(jnp.zeros(4), vectors, jax.random.key(9))
    assert np.any(again.candidates != state.candidates)
    np.testing.assert_allclose(again.usage, 0.99 * usage, rtol=1e-6)


def test_revive_moves_dead_codes_onto_candidates_and_nothing_else():
    rng = np.random.default_rng(3)
    codebook = jnp.asarray(rng.normal(size=(30, 4)), jnp.float32)
    candidates = jnp.asarray(rng.normal(10, 1, size=(8, 4)), jnp.float32)
    usage = jnp.where(jnp.arange(30) < 20, 0.5, 3.0)
    new, state, revived = jax.jit(revive)(codebook, CodebookState(usage, candidates), jax.random.key(0), threshold=1.0)
    assert revived == 20
    np.testing.assert_array_equal(new[20:], codebook[20:])
    np.testing.assert_array_equal(state.usage, np.where(np.arange(30) < 20, 2.0, 3.0))
    np.testing.assert_array_equal(state.candidates, candidates)
    distance = np.linalg.norm(np.asarray(new)[:20, None] - candidates, axis=-1)
    assert distance.min(1).max() < 0.1 and len(set(distance.argmin(1).tolist())) > 3
    # Two codes on one candidate are still two codes.
    assert len({tuple(c) for c in np.asarray(new).tolist()}) == 30


def test_revive_leaves_a_healthy_codebook_alone():
    codebook = jnp.ones((5, 2))
    state = CodebookState(jnp.full(5, 2.0), jnp.zeros((3, 2)))
    new, state, revived = revive(codebook, state, jax.random.key(0), threshold=1.0)
    assert revived == 0
    np.testing.assert_array_equal(new, codebook)
    np.testing.assert_array_equal(state.usage, 2.0)
