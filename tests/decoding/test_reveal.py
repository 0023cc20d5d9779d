"""How many slots each order reveals, and at what noise level, against counts made in exact arithmetic."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.reveal import (
    Agreement,
    Ancestral,
    ByConfidence,
    Drawn,
    Each,
    EntropyBound,
    Even,
    FirstHitting,
    LeftToRight,
    RandomOrder,
    Scheduled,
    Slots,
    Threshold,
)
from jaxgen.paths import Cosine, Linear, Power

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

WIDTH, KEY = 256, jax.random.key(0)


def slots(left, total, step, width=WIDTH, b=None):
    """The first `left` of the slots are open."""
    left = jnp.atleast_1d(jnp.asarray(left))
    b = len(left) if b is None else b
    pos = jnp.broadcast_to(jnp.arange(width), (b, width))
    whole = [jnp.broadcast_to(jnp.asarray(x), (b,)) for x in (total, step)]
    return Slots(pos < left[:, None], *whole, pos, jnp.arange(b), KEY, jnp.zeros((b, width), jnp.int32))


def counts_of(count, totals, passes):
    """What `count` reveals at each pass, [pass, row]."""

    def one(left, step):
        n = count(slots(left, totals, step))
        return left - n, n

    left, revealed = jax.jit(lambda: jax.lax.scan(one, jnp.asarray(totals), jnp.arange(passes)))()
    np.testing.assert_array_equal(left, 0)
    return np.asarray(revealed)


RATES = {
    "cosine": (Cosine(), lambda r: math.cos(math.pi / 2 * r)),
    "linear": (Linear(), lambda r: 1 - r),
    "square": (Power(2.0), lambda r: (1 - r) ** 2),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("steps", [1, 7, 12])
def test_scheduled_counts_are_the_published_ones(name, steps):
    """MaskGIT's clip(floor(N rate), 1, masked - 1), and all at the last pass."""
    schedule, rate = RATES[name]
    totals = np.arange(1, WIDTH + 1)
    got = counts_of(Scheduled(steps, schedule), totals, steps)
    for n, revealed in zip(totals.tolist(), got.T.tolist()):
        masked = n
        for i, count in enumerate(revealed, 1):
            stay = max(1, math.floor(n * rate(i / steps) + 1e-9))
            stay = min(stay, masked - 1) if i < steps else 0
            assert count == (masked - stay if masked else 0), (n, i)
            masked -= count
    assert (got[:, WIDTH - 1] > 0).all()


def test_even_counts_split_the_slots():
    totals = np.arange(1, 41)
    got = counts_of(Even(7), totals, 7)
    for n, revealed in zip(totals.tolist(), got.T.tolist()):
        assert revealed == [n // 7 + (i < n % 7) for i in range(7)]
    np.testing.assert_array_equal(counts_of(Each(9), totals, 5).sum(axis=0), totals)


def drawn(scores, b=1):
    scores = jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (b, len(scores)))
    return Drawn(jnp.zeros(scores.shape, jnp.int32), scores)


def test_counts_are_exact_among_equals():
    """Equal confidences: still so many, the leftmost first; slots that are not open are left alone."""
    s = slots(5, 5, 0, width=8)._replace(open=jnp.array([[False, True, True, False, True, True, True, False]]))
    equal = drawn(jnp.full(8, -1.0))
    chosen = np.asarray(ByConfidence(Each(2)).reveal(s, equal))[0]
    assert chosen.tolist() == [False, True, True, False, False, False, False, False]
    np.testing.assert_array_equal(LeftToRight(Each(2)).reveal(s, equal)[0], chosen)
    for order in (RandomOrder(Each(3)), Threshold(2.0, Each(3)), ByConfidence(Scheduled(12), 4.5)):
        picked = np.asarray(order.reveal(s, equal))[0]
        assert not picked[[0, 3, 7]].any() and picked.sum() == (3 if order != ByConfidence(Scheduled(12), 4.5) else 1)


def test_the_threshold_adds_to_the_count():
    scores = jnp.log(jnp.array([0.9, 0.2, 0.7, 0.95, 0.1]))
    s = slots(5, 5, 0, width=5)
    for tau, least, want in ((0.8, 1, {0, 3}), (0.8, 3, {0, 2, 3}), (0.99, 1, {3}), (1.1, 2, {0, 3}), (0.15, 1, {0, 1, 2, 3})):
        got = np.asarray(Threshold(tau, Each(least)).reveal(s, drawn(scores)))[0]
        assert set(np.flatnonzero(got).tolist()) == want


def test_the_entropy_bound_is_the_largest_prefix():
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.full(6, 0.4), size=(1, 7)))
    entropy = -(np.exp(log_p) * log_p).sum(-1)[0]
    ranked = np.argsort(entropy)
    found = set()
    for bound in (0.0, 0.3, 0.7, 1.5, 3.0, 100.0):
        most = max(n for n in range(1, 8) if entropy[ranked[:n]].sum() - entropy[ranked[:n]].max() <= bound)
        data = drawn(np.zeros(7))._replace(log_p=jnp.asarray(log_p, jnp.float32))
        got = np.asarray(EntropyBound(bound).reveal(slots(7, 7, 0, width=7), data))[0]
        assert set(np.flatnonzero(got).tolist()) == set(ranked[:most].tolist())
        found.add(most)
    assert {1, 7} < found


@pytest.mark.parametrize("schedule", [Linear(), Power(0.5)], ids=["linear", "root"])
def test_ancestral_leaves_the_share_of_its_schedule(schedule):
    """After the pass that ends at time s of the grid, rate(s) of the slots are masked; the noise level is the pass's start."""
    order, steps = Ancestral(5, schedule), 5
    s, nothing = slots(WIDTH, WIDTH, 0, b=64), drawn(np.zeros(WIDTH), 64)
    ask = jax.jit(lambda s: (order.time(s), order.reveal(s, nothing)))
    for i in range(steps):
        time, chosen = ask(s)
        np.testing.assert_allclose(time, 1 - i / steps, atol=1e-6)
        s = s._replace(open=s.open & ~chosen)
        rate = float(schedule.rate(1 - (i + 1) / steps))
        share, spread = float(s.open.mean()), (rate * (1 - rate) / s.open.size) ** 0.5
        assert abs(share - rate) <= 4 * spread
    assert not s.open.any()
    # Alone, a slot waits for its own step: passes at which nothing would happen are skipped.
    time, chosen = ask(slots(1, 1, 0, b=64))
    np.testing.assert_array_equal(chosen[:, 0], True)
    assert len(np.unique(np.asarray(time).round(4))) == steps


def test_first_hitting_times_are_the_largest_of_uniforms():
    """One slot a pass; the rate at the time of m open slots has the law u ** (1 / m) times the last one's."""
    schedule, b, m = Power(2.0), 4096, 6
    order, nothing = FirstHitting(schedule), drawn(np.zeros(m), 4096)
    s, last, picks = slots(m, m, 0, width=m, b=b), np.ones(b), []
    ask = jax.jit(lambda s: (schedule.rate(order.time(s)), order.reveal(s, nothing)))
    for left in range(m, 0, -1):
        rate, chosen = (np.asarray(x) for x in ask(s))
        rate = rate.astype(np.float64)
        u = np.sort((rate / last) ** left)  # uniform, if the law is right
        assert np.abs(u - (np.arange(b) + 0.5) / b).max() < 1.95 / b**0.5  # Kolmogorov-Smirnov, p = 0.001
        assert (chosen.sum(axis=1) == 1).all()
        picks.append(chosen.argmax(axis=1))
        s, last = s._replace(open=s.open & ~chosen), rate
    orders = np.stack(picks, axis=1)
    seen = np.array([(orders == np.array(p)).all(axis=1).sum() for p in itertools.permutations(range(m))])
    expected = b / math.factorial(m)
    chi2, freedom = ((seen - expected) ** 2 / expected).sum(), len(seen) - 1
    assert abs(chi2 - freedom) / (2 * freedom) ** 0.5 < 4


def test_noise_levels_of_counted_orders_are_the_share_left():
    s = slots([8, 6, 1, 0], 8, 3, width=8)
    for order in (ByConfidence(Even(3)), RandomOrder(Each(1)), LeftToRight(Each(1)), Threshold(0.5), EntropyBound(1.0)):
        np.testing.assert_allclose(order.time(s), [1, 0.75, 0.125, 0])


def test_agreement_reveals_up_to_the_first_disagreement():
    open_ = jnp.array([[False, True, True, False, True, True]])
    agrees = jnp.array([[False, True, True, False, False, True]])
    s = slots(6, 6, 0, width=6)._replace(open=open_)
    got = Agreement().reveal(s, drawn(np.zeros(6))._replace(agrees=agrees)) & open_
    assert np.asarray(got)[0].tolist() == [False, True, True, False, True, False]
    with pytest.raises(ValueError, match="a kernel with a second model"):
        Agreement().reveal(s, drawn(np.zeros(6)))
