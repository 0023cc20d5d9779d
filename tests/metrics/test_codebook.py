import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.metrics import count_tokens, perplexity, usage


def test_counts_equal_a_loop():
    tokens = np.random.default_rng(0).integers(0, 9, (4, 5, 3))
    want = [int((tokens == v).sum()) for v in range(11)]
    np.testing.assert_array_equal(count_tokens(jnp.asarray(tokens), 11), want)
    np.testing.assert_array_equal(jax.jit(count_tokens, static_argnums=1)(tokens, 11), want)


def test_usage_is_the_fraction_that_occurs():
    assert float(usage(jnp.array([3, 0, 1, 0, 0]))) == pytest.approx(0.4)
    assert float(usage(jnp.zeros(4))) == 0


def test_perplexity_is_the_effective_number_of_codes():
    assert float(perplexity(jnp.full(64, 7))) == pytest.approx(64, rel=1e-5)
    assert float(perplexity(jnp.array([0, 5, 0]))) == pytest.approx(1)
    assert float(perplexity(jnp.zeros(3))) == 0
    p = np.array([0.5, 0.25, 0.25])
    assert float(perplexity(jnp.array([2, 1, 1, 0]))) == pytest.approx(np.prod(p**-p), rel=1e-5)
    assert float(perplexity(jnp.array([2e-3, 1e-3, 1e-3, 0]))) == pytest.approx(np.prod(p**-p), rel=1e-5)


def test_tokens_outside_the_codebook():
    with pytest.raises(ValueError, match=r"tokens 0\.\.4: must be in 0\.\.3"):
        count_tokens(jnp.array([0, 4]), 4)
    with pytest.raises(ValueError, match=r"tokens -1\.\.1"):
        count_tokens(jnp.array([-1, 1]), 4)
    with pytest.raises(ValueError, match="float32"):
        count_tokens(jnp.zeros(3), 4)
