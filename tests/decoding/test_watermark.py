"""False-positive rates: against the binomial law, and against sequences for which it does not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.decoding.watermark import binomial_p_value, decoy_p_value, detect, green_counts, histogram, min_green
from jaxgen.decoding.watermark_bias import green_lists

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, T, B = 32, 40, 4000
RATE = 0.02
RNG = np.random.default_rng(0)
# As in pictures: one code is half of the background.
SKEWED = np.where(RNG.random((B, T)) < 0.5, RNG.integers(0, V, (B, 1)), RNG.integers(0, V, (B, T)))


def z_of_rate(hits, rate=RATE):
    return (hits.sum() - rate * hits.size) / np.sqrt(rate * (1 - rate) * hits.size)


def test_counts_are_those_of_a_loop():
    tokens = jnp.asarray(SKEWED[:3])
    lists = green_lists(jax.random.key(1), pool=3, vocab=V, gamma=0.3, positions=7)
    counted = RNG.random((3, T)) < 0.7
    got = green_counts(histogram(tokens, vocab=V, positions=7, counted=jnp.asarray(counted)), lists)
    table = np.asarray(lists)
    want = [[sum(table[p, i % 7, t] for i, t in enumerate(row) if c[i]) for p in range(3)] for row, c in zip(SKEWED, counted)]
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="does not fit lists"):
        green_counts(histogram(tokens, vocab=V, positions=2), lists)


def test_the_tail_is_the_binomial_one():
    for n, gamma in ((10, 0.5), (64, 0.25), (256, 0.5)):
        g = np.arange(n + 1)
        got = binomial_p_value(jnp.asarray(g, jnp.float32), jnp.float32(n), gamma)
        np.testing.assert_allclose(got, stats.binom.sf(g - 1, n, gamma), rtol=1e-3, atol=1e-12)
        for rate, tests in ((1e-3, 1), (0.05, 8)):
            least = min_green(n, gamma=gamma, rate=rate, tests=tests)
            assert stats.binom.sf(least - 1, n, gamma) <= rate / tests < stats.binom.sf(least - 2, n, gamma)
    assert min_green(256, gamma=0.5, rate=1.2e-4) == 158  # the authors' 0.615 of 256 tokens
    assert min_green(3, gamma=0.5, rate=1e-3) == 4


@pytest.mark.parametrize("pool", [1, 5])
def test_own_coins_give_the_nominal_rate(pool):
    """A list a place: each token has a coin of its own, whatever repeats; the correction for the pool keeps the rate."""
    draw = jax.jit(lambda key: green_lists(key, pool=pool, vocab=V, gamma=0.5, positions=T))
    tokens = jnp.asarray(SKEWED[:40])
    p_values = np.concatenate([detect(tokens, draw(jax.random.key(i))).p_value for i in range(60)])
    exact = stats.binom.sf(min_green(T, gamma=0.5, rate=RATE, tests=pool) - 1, T, 0.5)
    assert z_of_rate(p_values <= RATE, 1 - (1 - exact) ** pool) < 4
    assert (p_values <= RATE).mean() < RATE * 1.3
    if pool > 1:  # without the correction the pool finds something far too often
        assert (p_values / pool <= RATE).mean() > 2 * RATE


def test_repeated_codes_break_the_binomial_law_and_not_the_decoys():
    """One list for all places, as published, on sequences that repeat one code."""

    def draw(key):
        return green_lists(key, pool=2, vocab=V, gamma=0.5)

    @jax.jit
    def both(key, tokens):
        """40 sequences, one secret."""
        occurrences = histogram(tokens, vocab=V)
        secret, others = jax.random.split(key)
        p_value = decoy_p_value(others, lambda lists: green_counts(occurrences, lists).max(-1), draw, draw(secret), decoys=99)
        return p_value, detect(tokens, draw(secret)).p_value

    found = [both(jax.random.key(i), jnp.asarray(SKEWED[40 * i : 40 * i + 40])) for i in range(100)]
    decoys, binomial = (np.concatenate(x) for x in zip(*found))
    assert (binomial <= RATE).mean() > 4 * RATE
    assert z_of_rate(decoys <= RATE) < 4 and (decoys <= RATE).mean() > 0.25 * RATE
    assert decoys.min() == pytest.approx(0.01) and decoys.max() == 1


def test_a_mark_is_found_and_its_list_named():
    lists = green_lists(jax.random.key(0), pool=4, vocab=V, gamma=0.25)
    which = RNG.integers(0, 4, 50)
    green = [np.flatnonzero(lists[p, 0]) for p in range(4)]
    tokens = np.stack([np.where(RNG.random(T) < 0.7, RNG.choice(green[p], T), RNG.integers(0, V, T)) for p in which])
    found = detect(jnp.asarray(tokens), lists)
    assert (np.asarray(found.index) == which).mean() > 0.95 and (np.asarray(found.p_value) < 1e-3).mean() > 0.95
    np.testing.assert_allclose(found.z, (found.green - 0.25 * T) / np.sqrt(T * 0.25 * 0.75), rtol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="count=0 and tests=1"):
        min_green(0, gamma=0.5, rate=0.1)
    with pytest.raises(ValueError, match="gamma=1.0 and rate=0.1"):
        min_green(5, gamma=1.0, rate=0.1)
    with pytest.raises(ValueError, match="decoys=0"):
        decoy_p_value(jax.random.key(0), lambda x: x, lambda key: key, 0, decoys=0)
