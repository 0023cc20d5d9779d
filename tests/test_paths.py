"""Masking paths: rates, their inverses and slopes, and what corruption does to tokens."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.paths import Cosine, Linear, Masking, Power

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SCHEDULES = {
    "linear": (Linear(), lambda t: t, lambda t: 1.0),
    "cosine": (Cosine(), lambda t: math.sin(math.pi * t / 2), lambda t: math.pi / 2 * math.cos(math.pi * t / 2)),
    "square": (Power(2.0), lambda t: t**2, lambda t: 2 * t),
    "root": (Power(0.5), lambda t: t**0.5, lambda t: 0.5 * t**-0.5),
}
TIMES = np.linspace(0.05, 1, 20)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_times_and_weights(name):
    schedule, rate, slope = SCHEDULES[name]
    want = np.array([rate(t) for t in TIMES])
    np.testing.assert_allclose(schedule.rate(TIMES), want, rtol=1e-5)
    np.testing.assert_allclose(schedule.time(schedule.rate(TIMES)), TIMES, atol=2e-3)  # the cosine is flat at its end
    weight = np.array([slope(t) / rate(t) for t in TIMES])
    np.testing.assert_allclose(Masking(9, schedule).weight(TIMES), weight, rtol=1e-4, atol=1e-6)
    assert float(schedule.rate(0.0)) == 0 and float(schedule.rate(1.0)) == pytest.approx(1)


def test_tokens_are_masked_one_by_one_at_their_rate():
    b, l = 512, 64
    tokens = jax.random.randint(jax.random.key(0), (b, l), 0, 9)
    t = jnp.where(jnp.arange(l) < 32, 0.3, 0.8) * jnp.ones((b, 1))
    noisy, masked = Masking(9, Power(2.0)).corrupt(jax.random.key(1), tokens, t)
    np.testing.assert_array_equal(noisy, np.where(masked, 9, tokens))
    for half, rate in ((slice(0, 32), 0.09), (slice(32, 64), 0.64)):
        counts = np.asarray(masked[:, half]).sum(axis=1)
        spread = (32 * rate * (1 - rate)) ** 0.5
        assert abs(counts.mean() - 32 * rate) < 4 * spread / b**0.5
        assert counts.std() == pytest.approx(spread, rel=0.15)  # binomial, not fixed
    a_row = Masking(9).corrupt(jax.random.key(1), tokens, jnp.arange(b) / b)[1]
    assert not a_row[0].any() and float(a_row[b // 2 :].mean()) == pytest.approx(0.75, abs=0.02)
    assert (noisy != Masking(9, Power(2.0)).corrupt(jax.random.key(2), tokens, t)[0]).any()


def test_exact_counts():
    l = 12
    t = jnp.linspace(0.0, 1.0, 49)
    tokens = jnp.zeros((49, l), jnp.int32)
    _, masked = Masking(9, Cosine()).corrupt(jax.random.key(0), tokens, t, exact=True)
    want = [math.ceil(l * math.sin(math.pi / 2 * i / 48) - 1e-9) for i in range(49)]
    np.testing.assert_array_equal(masked.sum(axis=1), want)
    _, many = Masking(9).corrupt(jax.random.key(0), jnp.zeros((4096, l), jnp.int32), jnp.full(4096, 0.25), exact=True)
    np.testing.assert_allclose(many.mean(axis=0), 0.25, atol=4 * (0.1875 / 4096) ** 0.5)


def test_bad_input():
    tokens = jnp.zeros((3, 4), jnp.int32)
    for t, exact in ((jnp.zeros(4), False), (jnp.zeros((3, 1)), False), (jnp.zeros((3, 4)), True)):
        with pytest.raises(ValueError, match=r"does not fit tokens \(3, 4\)"):
            Masking(9).corrupt(jax.random.key(0), tokens, t, exact=exact)
    with pytest.raises(ValueError, match="exponent=0"):
        Power(0)
