import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.speculate import Context, Sequences
from jaxgen.decoding.transforms import (
    Sampling,
    apply_sampling,
    check_settings,
    compose,
    penalise,
    token_counts,
    truncate,
)

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
        ({"temperature": np.array([1.0, -2.0, 1.0])}, "temperature=-2.0: must be > 0"),
        ({"min_p": 1.0}, r"min_p=1.0: must be in \[0, 1\)"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"repetition": 0.0}, "repetition=0.0: must be > 0"),
        ({"repetition": -1.0}, "repetition=-1.0"),
        ({"presence": math.inf}, "presence=inf: must be finite"),
        ({"frequency": math.nan}, "frequency=nan: must be finite"),
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


def test_every_function_checks_its_settings():
    for bad in ({"temperature": 0.0}, {"top_p": 1.1}, {"min_p": 1}, {"top_k": -2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            truncate(LOGITS, **bad)
    for bad in ({"repetition": 0.0}, {"presence": np.nan}, {"frequency": np.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            penalise(LOGITS, CONTEXT, **bad)
    with pytest.raises(ValueError, match=r"temperature has shape \(3,\): must be a number or one a row of logits \(6, 5, 13\)"):
        truncate(LOGITS, temperature=np.ones(3))


def test_settings_a_row_are_those_of_the_row_alone():
    """Rows with settings on beside rows with settings off, which stay bit for bit as they were."""
    cases = [(1.0, 0, 0.0), (0.7, 3, 0.0), (1.0, 0, 0.6), (2.0, 5, 0.9), (1.3, 0, 1.0), (1.0, 1, 0.5)]
    got = np.asarray(run(LOGITS, *(np.array(column, np.float32) for column in zip(*cases))))
    for row, case, mine in zip(LOGITS, cases, got):
        np.testing.assert_array_equal(mine, run(row, *case))
    np.testing.assert_array_equal(got[0], LOGITS[0])


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 0.999])
def test_min_p(min_p):
    got = np.asarray(truncate(LOGITS, temperature=1.7, min_p=min_p))
    probs = np.apply_along_axis(softmax, -1, np.float64(LOGITS) / 1.7)
    keep = probs >= min_p * probs.max(-1, keepdims=True)
    np.testing.assert_array_equal(np.isfinite(got), keep)
    np.testing.assert_allclose(got[keep], (LOGITS / 1.7)[keep], rtol=1e-6)
    if min_p:
        both = truncate(LOGITS, temperature=1.7, top_k=4, top_p=0.8, min_p=min_p)
        top = np.isfinite(np.apply_along_axis(reference, -1, LOGITS, 1.7, 4, 0.8))
        np.testing.assert_array_equal(np.isfinite(both), keep & top)
        rows = truncate(LOGITS, min_p=np.array([0, min_p] * 3))
        np.testing.assert_array_equal(rows[0], LOGITS[0])
        np.testing.assert_array_equal(rows[1], truncate(LOGITS, min_p=min_p)[1])


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": -1.0}, {"top_p": 1.5}, {"min_p": -0.5}, {"repetition": -2.0}]
)
def test_a_bad_traced_setting_spoils_its_row_and_no_other(bad):
    """So that `speculate` stops the row and says so, where it cannot raise."""
    good = {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.01, "repetition": 1.1}
    sampling = Sampling(**{name: np.full(6, value, np.float32) for name, value in good.items()})
    name, value = next(iter(bad.items()))
    broken = sampling._replace(**{name: getattr(sampling, name).copy()})
    getattr(broken, name)[2] = value
    want, got = (np.asarray(sample(LOGITS, CONTEXT, s)) for s in (sampling, broken))
    assert np.isnan(jax.nn.log_softmax(got[2])).any(axis=-1).all()
    np.testing.assert_array_equal(np.delete(got, 2, 0), np.delete(want, 2, 0))


# Six rows of up to nine tokens, what lies behind the length being rubbish, and five queries with paths of up to two drafts.
LENGTHS = np.array([1, 3, 9, 5, 4, 7])
TOKENS = RNG.integers(0, V, (6, 9)).astype(np.int32)
PATHS = np.stack([[TOKENS[b, n - 1]] * 5 for b, n in enumerate(LENGTHS)])
PATHS = np.concatenate([PATHS[..., None], RNG.integers(0, 3, (6, 5, 2))], axis=-1)
PATHS[:, 0, 1:], PATHS[:, 1:3, 2] = -1, -1
CONTEXT = Context(Sequences(TOKENS, LENGTHS, np.arange(6)), PATHS, LENGTHS[:, None] + (PATHS[..., 1:] >= 0).sum(-1))
sample = jax.jit(apply_sampling)


def before(b, q):
    """All tokens before the law of row b's query q."""
    return TOKENS[b, : LENGTHS[b]].tolist() + [x for x in PATHS[b, q, 1:].tolist() if x >= 0]


def test_counts_are_of_prompt_generated_and_own_path():
    counts = np.asarray(token_counts(CONTEXT, V))
    for b in range(6):
        for q in range(5):
            assert counts[b, q].tolist() == [before(b, q).count(x) for x in range(V)]
    # A start token outside the vocabulary counts for nothing.
    seq = CONTEXT.seq._replace(tokens=np.full_like(TOKENS, V))
    assert token_counts(CONTEXT._replace(seq=seq, path=np.full((6, 5, 1), V)), V).sum() == 0


def penalised(row, seen, repetition, presence, frequency):
    row = np.float64(row).copy()
    for x in set(seen):
        row[x] = row[x] / repetition if row[x] > 0 else row[x] * repetition
        row[x] -= presence + frequency * seen.count(x)
    return row


@pytest.mark.parametrize("settings", [(1.2, 0, 0), (0.8, 0, 0), (1, 0.7, 0), (1, 0, -0.3), (1.5, 0.2, 0.4)])
def test_penalties(settings):
    got = penalise(LOGITS, CONTEXT, repetition=settings[0], presence=settings[1], frequency=settings[2])
    for b in range(6):
        for q in range(5):
            np.testing.assert_allclose(got[b, q], penalised(LOGITS[b, q], before(b, q), *settings), rtol=1e-5)


def test_penalties_a_row():
    repetition, presence, frequency = np.array([[1, 0, 0], [1.2, 0, 0], [1, 0.5, 0], [1, 0, 0.5], [2, 1, 1], [1, 0, 0]]).T
    got = np.asarray(penalise(LOGITS, CONTEXT, repetition=repetition, presence=presence, frequency=frequency))
    np.testing.assert_array_equal(got[[0, 5]], LOGITS[[0, 5]])
    for b in range(6):
        want = penalised(LOGITS[b, 3], before(b, 3), repetition[b], presence[b], frequency[b])
        np.testing.assert_allclose(got[b, 3], want, rtol=1e-5)


def test_a_chain_of_transforms_and_all_settings_at_once():
    def halve(logits, context):
        return logits / 2

    def add(logits, context):
        return logits + context.pos[..., None]

    np.testing.assert_allclose(compose(halve, add)(LOGITS, CONTEXT), LOGITS / 2 + CONTEXT.pos[..., None], rtol=1e-6)
    np.testing.assert_array_equal(compose()(LOGITS, CONTEXT), LOGITS)
    got = sample(LOGITS, CONTEXT, Sampling(0.7, 4, 0.8, 0.02, 1.3, 0.1, 0.2))
    for b in range(6):
        row = penalised(LOGITS[b, 4], before(b, 4), 1.3, 0.1, 0.2)
        want = reference(row, 0.7, 4, 0.8)
        want[want < want.max() + np.log(0.02)] = -np.inf
        np.testing.assert_allclose(got[b, 4], want, rtol=1e-5)
    # Off is off.
    np.testing.assert_array_equal(sample(LOGITS, CONTEXT, Sampling()), LOGITS)
