"""Speculative sampling of continuous tokens against a target whose law is known: linear-Gaussian chains given linear features."""

import collections
import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.conformance import chi_square
from jaxgen.decoding.density import PathDensity
from jaxgen.decoding.speculate import BROKEN, FULL
from jaxgen.decoding.speculate_latents import LatentModel, random_order, speculate_latents
from jaxgen.decoding.step import Out
from jaxgen.orders import Order

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

L, S, B = 5, 3, 4096
ORDER = Order(((1,), (2,), (1,), (1,)))
POSITIONS = (3, 0, 4, 1, 2)


def step(params, cache, view, cond):
    """Features of a position: a linear function of the tokens that are known."""
    assert view.mask.shape[1:] == (1, L) and view.tokens.shape[1:] == (L, 1)
    z = jnp.where(view.mask[:, 0], view.tokens[..., 0], 1e9 * jnp.isnan(view.tokens[..., 0])) @ params["w"].T + params["h"]
    return Out(z + cond[:, None]), cache


def kernel(params, z, x, i):
    """mean = a x + b z + e, with numbers of their own at each step."""
    a, b, e, s = (params[name][i][..., None] for name in "abes")
    mean = a * x + b * jnp.asarray(z)[..., None] + e
    return mean, jnp.broadcast_to(s, mean.shape)


MODEL = LatentModel(step, kernel, S)


def make(seed, shift=0.0, log_std=0.0):
    rng = np.random.default_rng(seed)
    params = {
        "w": rng.normal(0, 0.4, (L, L)),
        "h": rng.normal(0, 0.5, L),
        "a": rng.uniform(0.4, 0.9, S + 1),
        "b": rng.uniform(0.2, 0.5, S + 1),
        "e": rng.normal(0, 0.2, S + 1) + shift,
        "s": np.log(rng.uniform(0.4, 0.9, S + 1)) + log_std,
    }
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def whitened(params, tokens, cond=0.0):
    """Residuals of each token given those before its group, over their standard deviation: independent standard normals."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    gain, offset, variance = 0.0, 0.0, 1.0
    for i in range(S, 0, -1):
        gain, offset = p["a"][i] * gain + p["b"][i], p["a"][i] * offset + p["e"][i]
        variance = p["a"][i] ** 2 * variance + np.exp(2 * p["s"][i])
    tokens, known, columns = np.asarray(tokens, np.float64)[..., 0], np.zeros(L), []
    for k in range(ORDER.steps):
        group = list(POSITIONS[slice(*ORDER.span(k))])
        z = (tokens * known) @ p["w"].T + p["h"] + cond
        columns.append((tokens - gain * z - offset)[:, group] / np.sqrt(variance))
        known[group] = 1
    return np.concatenate(columns, axis=1)


def deviates(params, tokens):
    """(Kolmogorov-Smirnov sqrt(n) D of all residuals; deviate of Pearson's chi-square over 3^5 cells of equal mass)."""
    e = whitened(params, tokens)
    u = 0.5 * (1 + np.vectorize(math.erf)(e / np.sqrt(2)))
    flat = np.sort(u.ravel())
    steps = np.arange(len(flat) + 1) / len(flat)
    distance = max((steps[1:] - flat).max(), (flat - steps[:-1]).max())
    cells = collections.Counter(map(tuple, np.minimum((3 * u).astype(int), 2).tolist()))
    law = {cell: 3.0**-L for cell in np.ndindex(*(3,) * L)}
    return np.sqrt(len(flat)) * distance, chi_square(cells, law)


@dataclasses.dataclass(frozen=True)
class Released(PathDensity):
    """exp(sum of log std of the target - that of the draft), or its inverse, as a factor of the ratio: the released code's."""

    log_factor: jax.Array = 0.0

    def accepts(self, log_p, log_q, u):
        return super().accepts(log_p + self.log_factor, log_q, u)

    def keeps(self, log_p, log_q, u):
        return super().keeps(log_p + self.log_factor, log_q, u)


@pytest.fixture(scope="module")
def world():
    target = make(0)
    draft = make(0, shift=0.15, log_std=0.3) | {"w": make(0)["w"] + 0.1}
    samplers = {}

    def sampler(rule=None, drafts=2, **static):
        """Compiled once a configuration; `traces` counts."""
        name = (rule, drafts, *sorted(static.items()))
        if name in samplers:
            return samplers[name]
        traces = []

        @jax.jit
        def compiled(key, rows, params, draft_params, prefill, cond, positions, law):
            traces.append(1)
            b = len(rows)
            return speculate_latents(
                MODEL,
                MODEL if drafts else None,
                rule and rule(*law),
                params=params,
                draft_params=draft_params,
                cond=jnp.broadcast_to(cond, (b,)),
                batch=b,
                channels=1,
                order=ORDER,
                positions=jnp.broadcast_to(jnp.asarray(positions), (b, L)),
                drafts=drafts,
                prefill=prefill,
                key=key,
                rows=rows,
                **static,
            )

        def sample(key, *, rows=range(B), params=target, draft_params=draft, prefill=1, cond=0.0, order=POSITIONS, law=(1, 0)):
            traced = jnp.int32(prefill), jnp.float32(cond), jnp.asarray(order), jnp.float32(law)
            return compiled(key, jnp.asarray(rows), params, draft_params, *traced)

        sample.traces = traces
        samplers[name] = sample
        return sample

    return types.SimpleNamespace(target=target, draft=draft, sampler=sampler)


@pytest.mark.parametrize("drafts", [0, 2, 5])
def test_the_law_is_the_targets(world, drafts):
    sample = world.sampler(drafts=drafts)
    result = sample(jax.random.key(drafts))
    distance, z = deviates(world.target, result.tokens)
    assert distance < 1.95 and abs(z) < 4
    assert (np.asarray(result.status) == FULL).all() and int(result.exhausted.sum()) == 0
    if not drafts:
        assert int(result.calls) == ORDER.steps and int(result.paths.sum()) == 0
        return
    # The cost of exactness: one path of the target a token that was checked, whatever the draft.
    checked, accepted = int(result.checked.sum()), int(result.accepted.sum())
    assert 0.3 < accepted / checked < 0.9
    extra = np.asarray(result.paths - result.checked, float)
    assert abs(extra.sum()) < 4 * np.sqrt((extra**2).sum()) and int(result.paths.sum()) == pytest.approx(checked, rel=0.15)
    assert float(result.row_calls.mean()) < ORDER.steps - 0.3


def test_the_controls_fail(world):
    """The draft alone, the two signs of the released code's scale factor, and its temperature."""
    alone = world.sampler(drafts=0)(jax.random.key(0), params=world.draft)
    factor = float((world.target["s"][1:] - world.draft["s"][1:]).sum())
    assert abs(factor) > 0.5
    sample = world.sampler(Released, most=32)
    released = [sample(jax.random.key(0), law=rule) for rule in ((1, factor), (1, -factor), (42, 0))]
    for result in (alone, *released):
        distance, _ = deviates(world.target, result.tokens)
        assert distance > 2.5


def test_a_perfect_draft_gives_plain_samples_in_the_fewest_calls(world):
    plain = world.sampler(drafts=0)(jax.random.key(1))
    result = world.sampler(drafts=2)(jax.random.key(1), draft_params=world.target, prefill=0)
    np.testing.assert_allclose(result.tokens, plain.tokens, atol=1e-5)
    np.testing.assert_array_equal(result.checked, result.accepted)
    assert int(result.calls) == 2  # of three groups, then one


def test_the_prefill_is_the_targets_own(world):
    """All steps: plain sampling. Rows then take a call a step."""
    plain, sample = world.sampler(drafts=0)(jax.random.key(2)), world.sampler(drafts=2)
    result = sample(jax.random.key(2), prefill=ORDER.steps)
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    part = sample(jax.random.key(2), prefill=2)
    first = list(POSITIONS[: ORDER.ends[1]])
    np.testing.assert_array_equal(np.asarray(part.tokens)[:, first], np.asarray(plain.tokens)[:, first])
    assert (np.asarray(part.row_calls) >= 3).all() and int(part.checked.sum()) < int(sample(jax.random.key(2)).checked.sum())
    assert len(sample.traces) == 1  # for all the prefills, keys and parameters so far


def test_rows_do_not_depend_on_their_batch(world):
    rng = np.random.default_rng(0)
    rows, cond = jnp.asarray(rng.permutation(1000)[:8]), jnp.asarray(rng.normal(size=8), jnp.float32)
    places = jnp.asarray([rng.permutation(L) for _ in range(8)])
    sample, shuffle = world.sampler(drafts=2), rng.permutation(8)
    want = sample(jax.random.key(2), rows=rows, cond=cond, order=places)
    got = sample(jax.random.key(2), rows=rows[shuffle], cond=cond[shuffle], order=places[shuffle])
    for field in ("tokens", "status", "row_calls", "checked", "accepted", "paths"):
        np.testing.assert_array_equal(getattr(got, field), np.asarray(getattr(want, field))[shuffle])
    # Another batch size and other company.
    many = [jnp.resize(x, (B, *x.shape[1:])) for x in (rows, cond, places)]
    many = sample(jax.random.key(2), rows=many[0], cond=many[1], order=many[2])
    np.testing.assert_allclose(many.tokens[:8], want.tokens, atol=1e-5)
    other = sample(jax.random.key(3), rows=rows, cond=cond, order=places)
    assert np.abs(np.asarray(want.tokens) - np.asarray(other.tokens)).max() > 0.1


def test_how_many_paths_are_drawn_at_once_changes_nothing(world):
    want, got = (world.sampler(**static)(jax.random.key(4), rows=jnp.arange(8)) for static in ({}, {"at_once": 3}))
    np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-6)
    np.testing.assert_array_equal(got.paths, want.paths)
    assert int(want.paths.sum()) > 8


def test_a_token_whose_paths_run_out_is_reported(world):
    result = world.sampler(at_once=1, most=1)(jax.random.key(4))
    assert (np.asarray(result.status) == FULL).all()
    assert 0 < int(result.exhausted.sum()) <= int(result.paths.sum())
    assert int(result.paths.sum()) == int(result.checked.sum() - result.accepted.sum())


def test_rows_without_numbers_stop_alone(world):
    cond = np.zeros(8, np.float32)
    cond[[1, 4]] = np.nan
    rows, good = jnp.arange(8), ~np.isnan(cond)
    for drafts in (0, 2):
        sample = world.sampler(drafts=drafts)
        want, got = sample(jax.random.key(5), rows=rows, cond=np.zeros(8)), sample(jax.random.key(5), rows=rows, cond=cond)
        np.testing.assert_array_equal(np.asarray(got.status) == BROKEN, ~good)
        np.testing.assert_array_equal(np.asarray(got.tokens)[good], np.asarray(want.tokens)[good])
        assert (np.asarray(got.tokens)[~good] == 0).all()


def test_a_draft_without_numbers_breaks_rows_off(world):
    bad = world.draft | {"h": world.draft["h"] * np.nan}
    result = world.sampler(drafts=2)(jax.random.key(5), rows=jnp.arange(8), draft_params=bad, cond=np.zeros(8))
    assert (np.asarray(result.status) == BROKEN).all()
    tokens = np.asarray(result.tokens)[..., 0]
    assert np.isfinite(tokens).all() and (tokens[:, POSITIONS[0]] != 0).all() and (tokens[:, list(POSITIONS[1:])] == 0).all()


def test_random_orders():
    rows = jnp.arange(4000)
    orders = np.asarray(random_order(jax.random.key(0), rows, 4))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(4), (4000, 1)))
    counts = collections.Counter(map(tuple, orders.tolist()))
    assert len(counts) == 24 and abs(chi_square(counts, {cell: 1 / 24 for cell in counts})) < 4
    np.testing.assert_array_equal(random_order(jax.random.key(0), rows[7:8], 4)[0], orders[7])


def test_bad_input(world):
    fields = dict(params=world.target, cond=jnp.zeros(1), batch=1, channels=1, order=ORDER, key=jax.random.key(0))
    with pytest.raises(ValueError, match="drafts=2: expected at least 0, and a draft model"):
        speculate_latents(MODEL, drafts=2, **fields)
    with pytest.raises(ValueError, match="drafts=-1"):
        speculate_latents(MODEL, MODEL, drafts=-1, **fields)
    with pytest.raises(ValueError, match="chain has 4 steps, the target's 3"):
        speculate_latents(MODEL, MODEL._replace(steps=4), drafts=1, draft_params=world.draft, **fields)
