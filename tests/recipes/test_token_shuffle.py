"""S026's recipe: what its variants are, what it is compared with, and that training and sampling work."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.recipes.token_shuffle import ShuffleConfig, unshuffled

SHUFFLE = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "token_shuffle.py"))


def parameters(config):
    generator = config.build_generator()
    tokens = np.zeros((1, generator.length), np.int32)
    shapes = jax.eval_shape(generator.init, jax.random.key(0), np.zeros(1, np.int32), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("variant", SHUFFLE.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = SHUFFLE.get_config(variant)
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    sampler = recipe.config.build_sampler()
    assert sampler.generator.order.steps * 4 == sampler.tokenizer.order.length


def test_the_published_sizes():
    """1024 windows of 2 x 2, and 3.6 billion numbers.

    In squares of the width: each of 20 blocks has 12, and 6 that modulate; the head has 2; joining and parting 8.5. Beside those,
    embedding and head of 16384 codes.
    """
    config = SHUFFLE.get_config("paper").config
    assert config.build_tokenizer().image_size == (1024, 1024)
    assert config.build_generator().order.steps == 1024
    assert parameters(config) == pytest.approx((20 * 18 + 2 + 8.5) * 3072**2 + 2 * 16384 * 3072, rel=5e-3)


def test_the_baseline_is_as_large():
    for window in (2, 4):
        config = dataclasses.replace(SHUFFLE.get_config("demo").config, shuffle=ShuffleConfig(window=window))
        baseline = unshuffled(config)
        assert baseline.build_generator().order.steps == 16
        assert parameters(baseline) == pytest.approx(parameters(config), rel=0.01)
        assert (baseline.data, baseline.tokenizer, baseline.model_train) == (config.data, config.tokenizer, config.model_train)


def test_bad_input():
    config = SHUFFLE.get_config("smoke").config
    for edit, message in {
        "shuffle.window=3": "window=3: must divide both sides of the grid, 4 x 4",
        "shuffle.window=0": "shuffle.window=0",
        "shuffle.mixing=-1": "shuffle.mixing=-1",
        "model.width=18": "shuffle.window=2: its square must divide the model's width, 18",
        "tokenizer.patch_nums=1,4": "next-token models take one scale",
    }.items():
        with pytest.raises(ValueError, match=message):
            config_lib.override(config, [edit])
    with pytest.raises(ValueError, match="variant 'tiny' is not one of"):
        SHUFFLE.get_config("tiny")
    with pytest.raises(ValueError, match="budget 'huge'"):
        SHUFFLE.claim("huge")


# Trains, compiles and samples every stage of three systems.
@pytest.mark.slow
def test_the_claim_trains_samples_and_measures():
    (claim,) = SHUFFLE.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["model calls"] for row in claim.rows] == [row["sequence length"] for row in claim.rows] == [4, 1, 16]
    assert all(0 < row["test nats a token"] < 2 * np.log(16) for row in claim.rows)
