"""configs/flover.py: the server as a sampler, and its claim."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data.text import encode_bytes
from jaxgen.decoding.speculate import FULL
from jaxgen.generators.sequence_sampler import Lookup, SequenceSampler
from jaxgen.recipes import serving_claims
from jaxgen.recipes.serving import ServingConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

FLOVER = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "flover.py"))


@pytest.mark.parametrize("variant", FLOVER.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = FLOVER.get_config(variant)
    assert [stage.name for stage in recipe.stages] == ["generator"] and recipe.modality == "text"
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config


def test_published_sizes():
    """LLaMA 65B without its vocabulary: 80 blocks of four square projections and three of the MLP."""
    model = FLOVER.get_config("paper").config.build_model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    weights = sum(x.size for x in jax.tree.leaves(shapes))
    assert weights == pytest.approx(80 * (4 * 8192**2 + 3 * 8192 * 22016), rel=1e-3)
    assert weights / 1e9 == pytest.approx(65, abs=1)


@pytest.fixture(scope="module")
def params(randomize):
    model = FLOVER.get_config("smoke").config.build_model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return {"generator": {"generator": jax.tree.map(jnp.asarray, randomize(shapes, seed=4))}}


@pytest.mark.slow
def test_the_sampler_gives_the_tokens_of_the_plain_one(params):
    """Seven prompts through four slots, drafts or not: the tokens of one batch, row by row."""
    recipe = FLOVER.get_config("smoke")
    prompts, key = ["a", "bc def", "The ", b"\xff\x00", "print(1", "if x:\n    return", "q"], jax.random.key(3)
    settings = dict(length=24, temperature=0.9, top_k=50, top_p=0.95)
    out = recipe.sample(params, key, prompts, **settings)
    plain = SequenceSampler(model=recipe.config.build_model())
    tokens, lengths = encode_bytes(prompts)
    want = plain(params["generator"], key, tokens, lengths, max_length=24, temperature=0.9, top_k=50, top_p=0.95)
    for name in ("tokens", "length", "status", "row_calls"):
        np.testing.assert_array_equal(out[name], getattr(want, name))
    assert (out["status"] == FULL).all()


@pytest.mark.slow
def test_drafting_in_the_slots(params):
    """What repeats is drafted: the same tokens of a greedy sampler, in fewer calls."""
    plain, drafted = FLOVER.get_config("smoke"), FLOVER.get_config("smoke").override(["serving.lookup=2"])
    assert drafted.config.build_sampler().method == Lookup(2)
    want, got = (recipe.sample(params, jax.random.key(0), ["a" * 8] * 3, length=24, top_k=1) for recipe in (plain, drafted))
    np.testing.assert_array_equal(got["tokens"], want["tokens"])
    assert (got["row_calls"] < want["row_calls"]).all()


def test_bad_input(params):
    for options, message in (
        ({"slots": 0}, "serving.slots=0: expected at least 1"),
        ({"lookup": -1}, "serving.lookup=-1"),
        ({"slots": 4, "narrow": (5,)}, r"serving.narrow=\(5,\): expected numbers in 1..slots=4"),
    ):
        with pytest.raises(ValueError, match=message):
            ServingConfig(**options)
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, paper"):
        FLOVER.get_config("large")
    with pytest.raises(ValueError, match="budget 'paper' is not one of smoke, small"):
        FLOVER.claim("paper")
    recipe = FLOVER.get_config("smoke")
    for prompt, settings, message in (("x", {"temperature": 0.0}, "temperature=0.0"), ("long" * 9, {}, "prompt of shape")):
        with pytest.raises(ValueError, match=message):
            recipe.sample(params, jax.random.key(0), [prompt], length=24, **settings)


@pytest.mark.slow
def test_streams_are_poisson_and_mixed():
    config = FLOVER.get_config("smoke").config
    stream = serving_claims.stream(config, requests=2000, gap=0.25, prompt=(2, 12), new=(3, 9), seed=1)
    gaps = np.diff([0.0, *(arrival.at for arrival in stream)])
    assert gaps.mean() == pytest.approx(0.25, rel=0.1) and gaps.std() == pytest.approx(0.25, rel=0.1)
    assert {len(arrival.request["prompt"]) for arrival in stream} == set(range(2, 13))
    assert {arrival.request["max_new"] for arrival in stream} == set(range(3, 10))
    assert len({arrival.request["settings"] for arrival in stream}) == 4


@pytest.mark.slow
def test_the_claim():
    said = []
    (claim,) = FLOVER.claim("smoke", seeds=1, log=said.append)
    rows = {row["served"]: row for row in claim.rows}
    alone, static, slots, reordered = rows.values()
    assert list(rows) == ["one request at a time", "static batches of 4", "4 slots", "4 slots, reordered"]
    assert alone["tokens a call"] == 1 and alone["speed-up"] == 1 and static["against static"] == 1
    for row in (static, slots, reordered):
        assert row["model calls"] < alone["model calls"] and row["tokens a call"] > 1
        assert 0 < row["latency s, mean"] <= row["latency s, 95th percentile"]
    assert "12 of 12 requests got the same tokens from all" in claim.notes
    with pytest.raises(ValueError, match="seeds=0"):
        FLOVER.claim("smoke", seeds=0)
