import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import check_settings, truncate

pytestmark = pytest.mark.numeric

V = 13
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 2, size=(6, 5, V)).astype(np.float32)


@jax.jit
def run(logits, temperature, top_k, top_p):
    return truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p)


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def reference(row, temperature, top_k, top_p):
    """One token after another, most probable first (Fan et al. 2018; Holtzman et al. 2020, eq. 2)."""
    row = np.float64(row) / temperature
    order = sorted(range(V), key=lambda i: -row[i])
    if top_k:
        order = order[:top_k]
    if top_p:
        mass, kept = 0.0, []
        for i, p in zip(order, softmax(row[order])):
            if mass >= top_p:
                break
            kept.append(i)
            mass += p
        order = kept
    return np.array([row[i] if i in order else -np.inf for i in range(V)])


def published(row, top_k, top_p):
    """VAR's rule: in ascending order everything with a cumulative mass <= 1 - p goes, but never the best."""
    row = np.float64(row).copy()
    if top_k:
        row[row < np.sort(row)[-top_k]] = -np.inf
    if top_p:
        order = np.argsort(row)
        gone = np.cumsum(softmax(row[order])) <= 1 - top_p
        gone[-1] = False
        row[order[gone]] = -np.inf
    return row


CASES = [(1.0, 0, 0.0), (0.7, 0, 0.0), (1.0, 3, 0.0), (1.0, 1, 0.0), (1.0, V, 0.0), (1.0, 0, 0.6), (2.0, 0, 0.95)]
CASES += [(1.0, 5, 0.8), (0.5, 4, 0.3), (1.0, 0, 1e-6), (1.0, 0, 1.0), (1.3, 6, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_truncate(temperature, top_k, top_p):
    got = run(LOGITS, temperature, top_k, top_p)
    want = np.apply_along_axis(reference, -1, LOGITS, temperature, top_k, top_p)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    if temperature == 1.0:
        np.testing.assert_allclose(got, np.apply_along_axis(published, -1, LOGITS, top_k, top_p), rtol=1e-5)


def test_all_settings_share_a_program():
    for case in CASES:
        run(LOGITS, *map(float, case))
    before = run._cache_size()
    for case in CASES:
        run(LOGITS, *map(float, case))
    run(LOGITS, 0.123, 7.0, 0.456)
    assert run._cache_size() == before


def test_off_keeps_everything_however_unlikely():
    row = np.array([[0.0, -30.0, -60.0, -90.0] + [-100.0] * 9], np.float32)
    np.testing.assert_array_equal(run(row, 1.0, 0, 0.0), row)
    np.testing.assert_array_equal(run(row, 1.0, 3, 0.0)[0, :3], row[0, :3])
    np.testing.assert_array_equal(run(row, 1.0, 3, 1.0)[0, :3], row[0, :3])


def test_ties_with_the_last_token_kept_are_kept():
    row = np.array([[1.0, 3.0, 1.0, 1.0] + [-5.0] * 9], np.float32)
    np.testing.assert_array_equal(np.isfinite(run(row, 1.0, 2, 0.0)[0]), [True] * 4 + [False] * 9)


def test_minus_infinity_stays_out():
    row = np.array([[0.0, -np.inf, 1.0, -np.inf] + [-np.inf] * 9], np.float32)
    for settings in ((1.0, 3, 0.0), (1.0, 0, 0.9), (2.0, 5, 0.99)):
        np.testing.assert_array_equal(np.isfinite(run(row, *settings)[0]), [True, False, True] + [False] * 10)


def test_half_precision_logits_become_float32():
    assert truncate(jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be > 0"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1: must be in 0..v"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": 17, "vocab": 16}, r"top_k=17: must be in 0\.\.16"),
        ({"top_p": 1.5}, r"top_p=1.5: must be in \[0, 1\]"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"cfg": math.nan}, "cfg=nan: must be finite"),
        ({"cfg": jnp.float32(jnp.inf)}, "cfg=inf"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(**settings)


def test_good_settings_and_traced_ones_pass():
    check_settings(cfg=-1.5, temperature=0.1, top_k=16, top_p=1.0, vocab=16)
    jax.jit(lambda t, k, p, c: check_settings(temperature=t, top_k=k, top_p=p, cfg=c))(-1.0, -1, -1.0, 0.0)
