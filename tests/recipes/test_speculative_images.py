"""The recipe of S089, S054 and S039: configuration, draft stage, sampler and the three configurations."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data import digits
from jaxgen.decoding import Coupled, Jacobi, NGram, Rejection, Sequential, Settings, branches, chain
from jaxgen.decoding.relaxed import Grouped, Lantern
from jaxgen.recipe import modules
from jaxgen.recipes.next_scale import generator_stage
from jaxgen.recipes.speculative_images import DecodeConfig, codebook_of, draft_stage

CONFIGS = Path(__file__).parents[2] / "configs"
SYSTEMS = {name: cli.load_config_file(str(CONFIGS / f"{name}.py")) for name in ("sjd", "lantern", "gsd")}


@pytest.fixture(scope="module")
def config():
    """Smallest sizes, with a draft."""
    return config_lib.override(SYSTEMS["lantern"].get_config("smoke").config, ["model.depth=1", "decode.length=2"])


@pytest.fixture(scope="module")
def params(config, randomize):
    recipe, tokenizer = config.recipe(), config.build_tokenizer()
    abstract = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    found = {"tokenizer": {"tokenizer": randomize(abstract)}}
    for seed, name in enumerate(("generator", "draft"), 1):
        shapes, _ = jax.eval_shape(recipe.stage(name).init, jax.random.key(0), found)
        found[name] = randomize(shapes, seed)
    return jax.device_put(found)


def test_bad_numbers_are_named():
    for edits, message in (
        (["decode.proposer=tree"], "decode.proposer='tree': expected one of none, jacobi, ngram, draft"),
        (["decode.rule=mss"], "decode.rule='mss': expected one of rejection, coupled, lantern, grouped"),
        (["decode.initial=left"], "decode.initial='left': expected one of uniform, repeat_left"),
        (["decode.delta=-0.1"], "decode.delta=-0.1: expected at least 0"),
        (["decode.above=0"], "decode.above=0: expected at least 1"),
        (["decode.branches=2,0"], r"decode.branches=\(2, 0\): expected positive numbers, with decode.proposer=draft"),
        (["decode.initial=repeat_left"], "decode.initial='repeat_left': decode.proposer='draft' has no window"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(SYSTEMS["lantern"].get_config("smoke").config, edits)


def test_what_the_fields_build(config):
    def built(**fields):
        changed = dataclasses.replace(config, decode=DecodeConfig(**fields))
        return changed.build_proposer(), changed.decode.build_rule(jnp.eye(16))

    proposer, rule = built(proposer="jacobi", length=3, initial="repeat_above")
    assert proposer == Jacobi(3, initial="repeat_above", width=4) and rule == Rejection()
    proposer, rule = built(proposer="jacobi", length=3, rule="coupled")
    assert proposer == Jacobi(3, coupled=True, width=4) and rule == Coupled()
    assert built(proposer="ngram", length=3, order=1)[0] == NGram(3, 1)
    assert isinstance(built(proposer="none")[0], Sequential)
    proposer, rule = built(proposer="draft", length=3, rule="lantern", delta=0.2, relative=True)
    assert (proposer.topology, proposer.coupled, rule.delta, rule.relative) == (chain(3), False, 0.2, True)
    assert isinstance(rule, Lantern) and rule.neighbours.shape == (16, 15)  # of 1000 asked for
    assert built(proposer="draft", rule="lantern", neighbours=5)[1].neighbours.shape == (16, 5)
    proposer, rule = built(proposer="draft", branches=(2, 1), rule="coupled")
    assert proposer.topology == branches((2, 1)) and proposer.coupled
    rule = built(proposer="jacobi", rule="grouped", below=2, above=3, p_radius=0.1, d_radius=0.7)[1]
    assert isinstance(rule, Grouped) and (rule.below, rule.above, rule.p_radius, rule.d_radius) == (2, 3, 0.1, 0.7)


@pytest.mark.slow
def test_the_draft_is_trained_as_a_generator_of_its_own_size(config, params):
    """Its loss is that of a recipe whose generator has the draft's size."""
    stage = config.recipe().stage("draft")
    assert stage.steps == config.draft_train.steps and stage.needs == ("tokenizer",)
    assert [s.name for s in config.recipe().stages] == ["tokenizer", "generator", "classifier", "draft"]
    alone = generator_stage(dataclasses.replace(config, model=dataclasses.replace(config.draft, num_classes=10)))
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:8]), "label": jnp.asarray(source.labels[:8])}
    got = jax.jit(stage.eval_loss)(params["draft"], (), batch, jax.random.key(0), params)
    want = jax.jit(alone.eval_loss)({"generator": params["draft"]["draft"]}, (), batch, jax.random.key(0), params)
    assert got["loss"] == want["loss"] and got["loss"] > 1
    value, _ = jax.eval_shape(stage.loss, params["draft"], (), batch, jax.random.key(0), 0, params)
    assert value.shape == ()
    shapes, _ = jax.eval_shape(draft_stage(config).init, jax.random.key(0), params)
    assert set(shapes) == {"draft"}


@pytest.mark.slow
def test_the_recipe_samples_with_its_rule(config, params):
    """The table is made once; delta changes what is accepted; a new codebook makes a new table."""
    recipe = config_lib.override(config, ["decode.delta=0.6", "decode.neighbours=15"]).recipe()
    labels = np.arange(10, dtype=np.int32)
    relaxed = recipe.sample(params, jax.random.key(0), labels, cfg=0.5)
    rule = recipe.sample._last[1]
    assert set(relaxed) == {"images", "tokens", "status", "calls", "row_calls"}
    assert relaxed["images"].shape == (10, 8, 8, 1) and relaxed["tokens"].shape == (10, 16)
    strict = recipe.sample.sampler(
        modules(params), jax.random.key(0), labels, Settings(cfg=0.5), dataclasses.replace(rule, delta=0.0)
    )
    assert float(relaxed["row_calls"].mean()) < float(strict.row_calls.mean())
    recipe.sample(params, jax.random.key(1), labels, cfg=0.5)
    assert recipe.sample._last[1] is rule
    assert codebook_of(config.build_tokenizer(), params["tokenizer"]["tokenizer"]).shape == (16, 4)


@pytest.mark.parametrize("variant", ["smoke", "small", "paper"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_variant_builds_and_survives_json(name, variant):
    recipe = SYSTEMS[name].get_config(variant)
    want = ["tokenizer", "generator"] + ["classifier"] * (variant != "paper") + ["draft"] * (name == "lantern")
    assert [stage.name for stage in recipe.stages] == want
    assert all(stage.steps > 0 for stage in recipe.stages)
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    pixels = recipe.config.data.image_size
    assert recipe.config.build_tokenizer().image_size == (pixels, pixels)
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, small, paper"):
        SYSTEMS[name].get_config("large")


# Layers, width, heads, hidden width of the MLP, codes, width of a code, tokens of an image; drafts.
PUBLISHED = {
    "sjd": (32, 4096, 32, 11008, 8192, 256, 48 * 48, 16),
    "gsd": (32, 4096, 32, 11008, 8192, 256, 48 * 48, 16),
    "lantern": (36, 1280, 20, 5120, 16384, 8, 16 * 16, 60),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """Counted by hand from the published layers, with this library's modulation by the class in each of them."""
    depth, c, heads, hidden, v, z, length, drafts = PUBLISHED[name]
    config = SYSTEMS[name].get_config("paper").config

    def count(module):
        labels, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((1, length), jnp.int32)
        shapes = jax.eval_shape(module.init, jax.random.key(0), labels, tokens)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    def by_hand(depth):
        attention = 3 * c * c + 2 * c + heads + c * c + c  # no bias for keys; a scale for each head
        block = 6 * c * c + 6 * c + attention + 2 * c * hidden + hidden + c
        return depth * block + v * c + 1001 * c + length * c + 2 * c * c + 2 * c + c * v + v

    sampler = config.build_sampler()
    assert count(sampler.generator) == by_hand(depth)
    assert sampler.proposer.topology.drafts == drafts
    if name == "lantern":
        assert count(sampler.proposer.generator) == by_hand(1)
    assert (config.tokenizer.vocab, config.tokenizer.width) == (v, z)


def test_published_decoding():
    sjd, gsd, lantern = (SYSTEMS[name].get_config("paper").config.decode for name in ("sjd", "gsd", "lantern"))
    assert (sjd.proposer, sjd.initial, sjd.rule) == ("jacobi", "repeat_left", "rejection")
    assert (gsd.below, gsd.above, gsd.p_radius, gsd.d_radius) == (7, 7, 0.15, 0.5)
    assert (lantern.neighbours, lantern.delta, lantern.relative) == (1000, 0.1, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_claims_check_their_budget_and_edits(name):
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        SYSTEMS[name].claim("huge")
    with pytest.raises(ValueError, match="unknown key 'window'"):
        SYSTEMS[name].claim("smoke", edits=["decode.window=3"])
