import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import gumbel

pytestmark = pytest.mark.numeric

KEY = jax.random.key(0)
noise = jax.jit(gumbel, static_argnames=("vocab", "stream"))


def test_noise_belongs_to_its_row_and_position():
    whole = np.asarray(noise(KEY, jnp.arange(4), jnp.arange(6), 5))
    assert whole.shape == (4, 6, 5)
    part = noise(KEY, jnp.array([3, 1]), jnp.array([5, 2]), 5)
    np.testing.assert_array_equal(part, whole[[3, 1]][:, [5, 2]])
    assert len(np.unique(whole)) == whole.size
    for other in (
        noise(jax.random.key(1), jnp.arange(4), jnp.arange(6), 5),
        noise(KEY, jnp.arange(4), jnp.arange(6), 5, stream=1),
    ):
        assert not np.any(other == whole)


def test_argmax_samples_from_the_softmax():
    law = np.array([0.05, 0.6, 0.0, 0.35])
    with np.errstate(divide="ignore"):
        logits = np.log(law)
    n = 20_000
    ids = np.argmax(logits + noise(KEY, jnp.arange(n // 10), jnp.arange(10), 4), axis=-1)
    counts = np.bincount(ids.reshape(-1), minlength=4)
    assert counts[2] == 0
    z = (counts - n * law)[[0, 1, 3]] / np.sqrt(n * law * (1 - law))[[0, 1, 3]]
    assert np.abs(z).max() < 4, z
