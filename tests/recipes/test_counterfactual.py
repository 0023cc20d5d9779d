"""The recipe of S110: what is written, changed and written again; its claim and its configuration."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.decoding.counterfactual import intervene
from jaxgen.recipe import modules
from jaxgen.recipes import claims, counterfactual_claims
from jaxgen.recipes.counterfactual import ReplayConfig
from jaxgen.recipes.counterfactual_claims import intervals

SYSTEM = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "counterfactual.py"))
CONFIG = config_lib.override(SYSTEM.get_config("smoke").config, ["model.depth=1"])
S, B = 20, 6
TOLD = "the quick", "brown fox", "jumps over", "a lazy dog", "x", "and so on"


@pytest.fixture(scope="module")
def params(randomize):
    shapes = jax.eval_shape(CONFIG.build_model().init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    variables = jax.device_put(randomize(shapes))
    return {"generator": {"generator": jax.tree.map(lambda x: 1.3 * x, variables)}}


@pytest.fixture(scope="module")
def told(params):
    return CONFIG.recipe().sample(params, jax.random.key(0), TOLD, length=S, top_p=0.9)


@pytest.mark.slow
def test_a_sample_keeps_the_prefix_and_changes_one_byte(told):
    tokens, factual, at = told["tokens"], told["factual"], told["at"]
    lengths = np.array([len(text) for text in TOLD])
    assert tokens.shape == factual.shape == (B, S) and (told["length"] == S).all()
    assert ((at >= lengths) & (at < lengths + np.maximum((S - lengths) // 2, 1))).all()
    for row, other, text, i in zip(tokens, factual, TOLD, at):
        assert bytes(other[: len(text)].astype(np.uint8)).decode() == text
        np.testing.assert_array_equal(row[:i], other[:i])
        assert row[i] != other[i]


@pytest.mark.slow
def test_the_same_noise_writes_the_same_and_drafts_change_nothing(params):
    variables, sampler = modules(params)["generator"], CONFIG.build_replay()
    slow = dataclasses.replace(CONFIG, replay=ReplayConfig(drafts=0)).build_replay()
    key, start = jax.random.key(4), jnp.full((B,), 3, jnp.int32)
    prompt = jax.random.randint(jax.random.key(5), (B, S), 0, 256)
    factual = sampler.write(variables, key, prompt, start).tokens
    again = sampler.replay(variables, key, factual, prompt, start)
    np.testing.assert_array_equal(again.tokens, factual)
    at = jnp.array([4, 5, 6, 7, 8, 9])
    value = sampler.other_byte(variables, key, factual, at)
    assert (value != factual[jnp.arange(B), at]).all()
    changed, known = intervene(factual, at, value)
    want, got = (s.replay(variables, key, factual, changed, known) for s in (slow, sampler))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert int(again.calls) < S / 2
    # Text from elsewhere, its noise drawn in hindsight: the model would write it again.
    foreign = jax.random.randint(jax.random.key(6), (B, S), 32, 127)
    back = sampler.replay(variables, jax.random.key(7), foreign, foreign, start, observed_from=start)
    np.testing.assert_array_equal(back.tokens, foreign)


@pytest.mark.slow
def test_intervals_by_hand():
    factual, told = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]), np.array([[1, 9, 3, 4, 6], [1, 2, 9, 3, 4]])
    stays, distance = intervals(factual, told, np.array([2, 3]))
    assert stays == pytest.approx(2 / 5)
    # 3 4 5 against 3 4 6 is one of three; 4 5 against 3 4 takes two of two.
    assert distance == pytest.approx((1 / 3 + 2 / 2) / 2)


@pytest.mark.slow
def test_the_claim_sets_the_same_noise_against_new_noise(params, monkeypatch):
    monkeypatch.setattr(claims, "trained", lambda config, seed, log: (None, params))
    options = dict(temperatures=(1.0,), texts=B, prompt=4, length=S, log=lambda text: None)
    found = counterfactual_claims.compare_noise(CONFIG, seeds=2, **options)
    assert [(row["text"], row["noise"]) for row in found.rows] == [
        ("its own", "the same"),
        ("its own", "new"),
        ("held out", "the same"),
        ("held out", "new"),
    ]
    assert {"bytes that stay", "edit distance", "calls a byte"} < set(found.rows[0])
    with pytest.raises(ValueError, match="seeds=0"):
        counterfactual_claims.compare_noise(CONFIG, seeds=0, **options)


def test_every_variant_builds_and_survives_json():
    for variant in SYSTEM.VARIANTS:
        config = SYSTEM.get_config(variant).config
        assert config_lib.from_json(config_lib.to_json(config)) == config
    model = SYSTEM.get_config("paper").config.build_model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert abs(sum(x.size for x in jax.tree.leaves(shapes)) / 1e9 - 8.03) < 0.01  # Llama 3 8B
    with pytest.raises(ValueError, match="variant 'huge' is not one of smoke, small, paper"):
        SYSTEM.get_config("huge")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        SYSTEM.claim("huge")


def test_bad_input(params):
    with pytest.raises(ValueError, match="replay.drafts=-1: expected at least 0"):
        config_lib.override(CONFIG, ["replay.drafts=-1"])
    with pytest.raises(ValueError, match="length=9: a prompt of 9 bytes leaves no room"):
        CONFIG.recipe().sample(params, jax.random.key(0), ["the quick"], length=9)
    with pytest.raises(ValueError, match="top_p=2"):
        CONFIG.recipe().sample(params, jax.random.key(0), ["the quick"], length=S, top_p=2)
