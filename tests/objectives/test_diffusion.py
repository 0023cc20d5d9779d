"""The bound on the likelihood against what an any-order autoregressive model pays, by going through all patterns of masks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives.diffusion import masked_elbo, masked_prediction, stratified_times
from jaxgen.paths import Cosine, Linear, Masking, Power

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

V, L = 3, 4
TOKENS = np.array([2, 0, 1, 1], np.int32)
# An own law at each place for every pattern of masks.
LOGITS = 1.5 * np.random.default_rng(0).standard_normal((2**L, L, V))
NLL = np.log(np.exp(LOGITS).sum(-1)) - np.take_along_axis(LOGITS, TOKENS[None, :, None], axis=2)[..., 0]  # [pattern, place]


def any_order():
    """The mean over all orders of sum_i -log p(token i | tokens before it in the order)."""
    total = 0.0
    for order in itertools.permutations(range(L)):
        masked = set(range(L))
        for i in order:
            total += NLL[sum(2**j for j in masked), i]
            masked.remove(i)
    return total / math.factorial(L)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Power(2.0)], ids=["linear", "cosine", "square"])
def test_the_bound_is_the_any_order_cost_for_every_schedule(schedule):
    """Its integral over t, by quadrature over all patterns, and as what corruption draws."""
    path, patterns = Masking(V, schedule), np.array(list(itertools.product([0, 1], repeat=L)), bool)[:, ::-1]
    logits = jnp.asarray(LOGITS, jnp.float32)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t, weights = (nodes + 1) / 2, weights / 2

    def loss(t):
        rate = schedule.rate(t)
        p = jnp.where(patterns, rate, 1 - rate).prod(axis=1)
        tokens = jnp.broadcast_to(TOKENS, patterns.shape)
        return (p * masked_elbo(logits, tokens, patterns, jnp.broadcast_to(path.weight(t), len(patterns))).sum(axis=1)).sum()

    exact = float((weights * np.asarray(jax.jit(jax.vmap(loss))(jnp.asarray(t)))).sum())
    assert exact == pytest.approx(any_order(), rel=2e-3)

    def draw(key):
        times, noise = jax.random.split(key)
        t = stratified_times(times, (4096,))
        noisy, masked = path.corrupt(noise, jnp.broadcast_to(TOKENS, (4096, L)), t)
        code = (masked * 2 ** jnp.arange(L)).sum(axis=1)
        return masked_elbo(logits[code], jnp.broadcast_to(TOKENS, (4096, L)), masked, path.weight(t)).sum(axis=1).mean()

    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 16)))
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / 4 + 0.01


def test_weights_may_differ_by_position():
    masked = jnp.array([[True, False, True, True]])
    logits, weight = jnp.asarray(LOGITS[:1], jnp.float32), jnp.array([[1.0, 2.0, 3.0, 4.0]])
    got = masked_elbo(logits, TOKENS[None], masked, weight)
    np.testing.assert_allclose(got[0], NLL[0] * np.array([1, 0, 3, 4]), rtol=1e-5)


def test_masked_prediction_is_the_mean_over_masked_tokens():
    tokens = np.stack([TOKENS, TOKENS])
    masked = np.array([[True, False, False, False], [True, True, False, True]])
    logits = jnp.asarray(LOGITS[:2], jnp.float32)
    want = NLL[:2][masked].mean()
    assert float(masked_prediction(logits, tokens, masked, label_smoothing=0.0)) == pytest.approx(want, rel=1e-5)
    log_p = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    smooth = 0.9 * want - 0.1 * log_p[masked].mean()
    assert float(masked_prediction(logits, tokens, masked)) == pytest.approx(smooth, rel=1e-5)
    assert float(masked_prediction(logits, tokens, np.zeros_like(masked))) == 0


def test_times_are_uniform_one_by_one_and_spread_together():
    t = np.asarray(
        jax.vmap(lambda key: stratified_times(key, (4, 5), low=0.2, high=0.6))(jax.random.split(jax.random.key(0), 999))
    )
    assert t.shape == (999, 4, 5) and t.min() >= 0.2 and t.max() < 0.6
    gaps = np.diff(np.sort(t.reshape(999, 20), axis=1), axis=1)
    np.testing.assert_allclose(gaps, 0.02, atol=1e-6)
    for place in ((0, 0), (2, 3)):
        u = np.sort((t[:, *place] - 0.2) / 0.4)
        assert np.abs(u - (np.arange(999) + 0.5) / 999).max() < 1.95 / 999**0.5
    with pytest.raises(ValueError, match="low=0"):
        stratified_times(jax.random.key(0), (3,), low=0)
