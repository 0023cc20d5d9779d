"""Counterfactual tokens: hindsight noise is what it claims to be, and interventions change no more than they must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.decoding import Coupled, Sequential, gumbel, speculate, truncate
from jaxgen.decoding.counterfactual import Factual, alternative, hindsight, intervene, posterior_gumbel
from jaxgen.decoding.speculate import FULL

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, S, B = 4, 7, 1024
RNG = np.random.default_rng(0)


def laws(n, v=6):
    return jnp.asarray(np.log(RNG.dirichlet(np.ones(v), n)), jnp.float32)


@pytest.mark.slow
def test_posterior_noise_explains_the_token_and_is_plain_gumbel_noise_over_tokens():
    n, v = 6000, 6
    log_p = laws(n, v)
    rows, pos = jnp.arange(n), jnp.zeros((n, 1), jnp.int32)
    tokens = jax.random.categorical(jax.random.key(1), log_p)
    draw = jax.jit(lambda tokens: posterior_gumbel(jax.random.key(0), rows, pos, log_p[:, None], tokens[:, None])[:, 0])
    noise = np.asarray(draw(tokens))
    np.testing.assert_array_equal(np.argmax(log_p + noise, axis=-1), tokens)
    assert stats.kstest(noise.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    for i in range(v):
        assert stats.kstest(noise[:, i], stats.gumbel_r.cdf).pvalue > 1e-3
    uniform = stats.gumbel_r.cdf(noise)
    assert np.abs(np.corrcoef(uniform.T) - np.eye(v)).max() < 4 / np.sqrt(n)
    # Given a token that the law would rarely write, it isn't: the noise had to be unusual.
    other = np.asarray(draw(jnp.argmin(log_p, axis=-1)))
    assert stats.kstest(other.ravel(), stats.gumbel_r.cdf).pvalue < 1e-6


@pytest.mark.slow
def test_what_becomes_likelier_stays():
    """Counterfactual stability (Oberst & Sontag 2019): a token gives way only to one whose odds against it rose."""
    n, v = 4000, 6
    log_p, changed = laws(n, v), laws(n, v)
    rows, pos = jnp.arange(n), jnp.zeros((n, 1), jnp.int32)
    tokens = np.asarray(jax.random.categorical(jax.random.key(2), log_p))
    noise = posterior_gumbel(jax.random.key(3), rows, pos, log_p[:, None], jnp.asarray(tokens)[:, None])[:, 0]
    gain = np.asarray(changed - log_p)
    at = np.arange(n)

    def rises(new):
        return gain[at, new] - gain[at, tokens]

    replayed = np.asarray(jnp.argmax(changed + noise, axis=-1))
    moved = replayed != tokens
    assert moved.any() and (rises(replayed)[moved] > 0).all()
    most = gain.argmax(-1) == tokens
    assert most.any() and (replayed[most] == tokens[most]).all()
    # The control: sampled anew, the same laws leave tokens for less likely ones.
    anew = np.asarray(jnp.argmax(changed + gumbel(jax.random.key(4), rows, pos, v)[:, 0], axis=-1))
    assert (rises(anew)[anew != tokens] <= 0).any() and (anew[most] != tokens[most]).any()
    # Both are draws from the changed law.
    for new in (replayed, anew):
        hits = np.take_along_axis(np.exp(changed), new[:, None], 1)[:, 0]
        expected, spread = np.exp(2 * changed).sum(-1), np.exp(3 * changed).sum(-1) - np.exp(2 * changed).sum(-1) ** 2
        assert abs((hits - expected).sum()) < 4 * np.sqrt(spread.sum())


@pytest.fixture(scope="module")
def world(table_model):
    model = table_model(vocab=V)
    target = model.params(0)

    def transform(temperature):
        return lambda logits, context: truncate(logits, temperature=temperature, top_p=0.95)

    def sampler(proposer=None):
        @jax.jit
        def sample(key, noise=None, prompt=None, prompt_length=None, params=target, temperature=0.8, factual=None):
            prompt = jnp.ones((B, 1), jnp.int32) if prompt is None else prompt
            made = Sequential() if factual is None else Factual(factual, 3)
            given = {} if noise is None else dict(noise=noise)
            shared = dict(params=params, cache=model.cache(prompt.shape[0]), cond=None, prompt=prompt, key=key)
            lengths = dict(prompt_length=prompt_length, max_length=S)
            return speculate(model.step, made, Coupled(), **shared, **lengths, transform=transform(temperature), **given)

        return sample

    @jax.jit
    def look_back(key, tokens, prompt_length, length=None, params=target):
        shared = dict(params=params, cache=model.cache(tokens.shape[0]), cond=None, tokens=tokens, key=key)
        return hindsight(model.step, **shared, prompt_length=prompt_length, length=length, transform=transform(0.8))

    world = type("World", (), {})()
    world.sample, world.look_back, world.target, world.model = sampler(), look_back, target, model
    world.written = world.sample(jax.random.key(0)).tokens
    return world


ONE = jnp.ones((B,), jnp.int32)


@pytest.mark.slow
def test_an_unchanged_model_writes_the_same_again(world):
    seen = world.look_back(jax.random.key(9), world.written, ONE)
    assert bool(seen.possible.all())
    again = world.sample(jax.random.key(9), seen)
    np.testing.assert_array_equal(again.tokens, world.written)
    assert (np.asarray(world.sample(jax.random.key(9)).tokens) != np.asarray(world.written)).mean() > 0.3  # without the noise
    # Any other text is explained too, up to what the law excludes.
    foreign = jnp.asarray(RNG.integers(0, V, (B, S))).at[:, 0].set(1)
    seen = world.look_back(jax.random.key(9), foreign, ONE)
    ok = np.asarray(seen.possible.all(axis=1))
    assert 0.05 < ok.mean() < 0.95
    np.testing.assert_array_equal(np.asarray(world.sample(jax.random.key(9), seen).tokens)[ok], np.asarray(foreign)[ok])


@pytest.mark.slow
def test_hindsight_noise_of_text_is_gumbel_noise(world):
    noise = np.asarray(world.look_back(jax.random.key(9), world.written, ONE).noise)
    assert stats.kstest(noise.ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    by_place = stats.gumbel_r.cdf(noise).reshape(B, -1)
    assert np.abs(np.corrcoef(by_place.T) - np.eye(S * V)).max() < 5 / np.sqrt(B)
    # Prompts were not sampled, nor was what lies behind the end: there the noise is the key's own.
    fresh = gumbel(jax.random.key(9), jnp.arange(B), jnp.arange(S), V)
    cut = np.asarray(world.look_back(jax.random.key(9), world.written, 3 * ONE, 5 * ONE).noise)
    same = (cut == np.asarray(fresh)).all(-1)
    assert same[:, [0, 1, 2, 5, 6]].all() and not same[:, 3:5].any()


@pytest.mark.slow
def test_hindsight_noise_belongs_to_its_row(world):
    order = jnp.array([5, 0, 9, 2])
    read = dict(params=world.target, cache=world.model.cache(4), cond=None, tokens=world.written[order])
    few = hindsight(world.model.step, **read, prompt_length=ONE[:4], key=jax.random.key(9), rows=order)
    read |= dict(cache=world.model.cache(B), tokens=world.written)
    many = hindsight(world.model.step, **read, prompt_length=ONE, key=jax.random.key(9))
    np.testing.assert_allclose(few.noise, many.noise[order], rtol=1e-5)


@pytest.mark.slow
def test_interventions_keep_the_prefix_and_more_of_the_rest_than_chance(world):
    at = jnp.asarray(RNG.integers(1, S - 2, B))
    rows = jnp.arange(B)
    value = (world.written[rows, at] + 1) % V
    prompt, length = intervene(world.written, at, value)
    seen = world.look_back(jax.random.key(9), world.written, ONE)
    counterfactual = world.sample(jax.random.key(9), seen, prompt, length)
    anew = world.sample(jax.random.key(5), None, prompt, length)
    place, written = np.arange(S), np.asarray(world.written)
    for result in (counterfactual, anew):
        tokens = np.asarray(result.tokens)
        assert (np.asarray(result.status) == FULL).all()
        np.testing.assert_array_equal(np.where(place < at[:, None], tokens, written), written)
        assert (tokens[rows, at] == value).all()
    after = place > np.asarray(at)[:, None]
    kept, chance = ((np.asarray(r.tokens) == written)[after].mean() for r in (counterfactual, anew))
    assert kept > chance + 0.05
    # An intervention that writes what was written changes nothing.
    prompt, length = intervene(world.written, at, world.written[rows, at])
    np.testing.assert_array_equal(world.sample(jax.random.key(9), seen, prompt, length).tokens, world.written)


@pytest.mark.slow
def test_drafting_what_was_written_changes_no_token_and_saves_calls(world):
    at = jnp.asarray(RNG.integers(1, S - 2, B))
    rows = jnp.arange(B)
    prompt, length = intervene(world.written, at, (world.written[rows, at] + 2) % V)
    seen = world.look_back(jax.random.key(9), world.written, ONE)
    want = world.sample(jax.random.key(9), seen, prompt, length)
    got = world.sample(jax.random.key(9), seen, prompt, length, factual=world.written)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert float(got.row_calls.mean()) < 0.9 * float(want.row_calls.mean())
    # Text sampled here needs no hindsight: its key is its noise.
    own = world.sample(jax.random.key(0), None, prompt, length)
    assert ((np.asarray(own.tokens) == np.asarray(world.written)) | (np.arange(S) >= np.asarray(at)[:, None])).all()
    unchanged = world.sample(jax.random.key(0), None, world.written, ONE, factual=world.written)
    np.testing.assert_array_equal(unchanged.tokens, world.written)


@pytest.mark.slow
def test_a_changed_model_is_an_intervention_too(world):
    """Between the same model and another one, the nearer the more stays."""
    other, shares = world.model.params(1), []
    seen = world.look_back(jax.random.key(9), world.written, ONE)
    for weight in (0.0, 0.2, 1.0):
        result = world.sample(jax.random.key(9), seen, params=world.target + weight * other)
        shares.append((np.asarray(result.tokens) == np.asarray(world.written)).mean())
    assert shares[0] == 1 and shares[0] > shares[1] > shares[2]


@pytest.mark.slow
def test_alternatives_are_likely_and_other():
    log_p = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05], [0.96, 0.01, 0.02, 0.01]]))
    n = 3000
    many = jnp.repeat(log_p, n, axis=0)
    token = jnp.zeros(2 * n, jnp.int32)
    first, second = np.split(np.asarray(alternative(jax.random.key(0), jnp.arange(2 * n), many, token)), 2)
    share = np.bincount(first, minlength=4) / n
    np.testing.assert_allclose(share, [0, 0.3 / 0.45, 0.15 / 0.45, 0], atol=4 * 0.5 / np.sqrt(n))
    assert (second == 2).all()  # nothing else is in the top-p set


def test_bad_input(world):
    with pytest.raises(ValueError, match=r"tokens \(2, 1\)"):
        world.look_back(jax.random.key(0), jnp.ones((2, 1), jnp.int32), jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match="count=0"):
        Factual(jnp.ones((1, 3), jnp.int32), 0)
