"""S162's recipe: the loss by hand, greedy samples, its variants and baseline, and what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import axial
from jaxgen import config as config_lib
from jaxgen.data import digits
from jaxgen.recipes import axial as axial_recipe
from jaxgen.recipes.axial import costs_by_size, dependences, plain
from jaxgen.recipes.pixel_tokens import PixelConfig

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "model_train.class_drop=0")


@pytest.mark.numeric
def test_stage_and_sampler(raster_recipe_agrees):
    raster_recipe_agrees(config_lib.override(axial.build("smoke"), SHAPE))


@pytest.mark.numeric
def test_pixels_need_no_tokenizer(randomize):
    """The loss of the stage is that of the pixels' values, its samples are pictures of few levels."""
    config = config_lib.override(axial.build("smoke"), ["levels=4", "tokenizer.patch_nums=8", "model_train.class_drop=0"])
    recipe, generator = config.recipe(), config.build_generator()
    assert [stage.name for stage in recipe.stages] == ["generator", "classifier"] and generator.grid == (8, 8)
    stage = recipe.stage("generator")
    params = {"generator": jax.device_put(randomize(jax.eval_shape(stage.init, jax.random.key(0), {})[0]))}
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:4]), "label": jnp.asarray(source.labels[:4])}
    value, _ = jax.jit(stage.loss)(params["generator"], (), batch, jax.random.key(0), 0, {})
    tokens = np.round(np.asarray(source.images[:4], np.float64) / 255 * 3).astype(np.int32).reshape(4, 64)
    logits = np.float64(jax.jit(generator.apply)(params["generator"]["generator"], batch["label"], tokens))
    law = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert value == pytest.approx(-np.log(np.take_along_axis(law, tokens[..., None], -1)).mean(), rel=1e-4)
    made = recipe.sample(params, jax.random.key(0), np.asarray(batch["label"]))
    assert made["images"].shape == (4, 8, 8, 1) and plain(config).build_generator().length == 64
    np.testing.assert_allclose(made["images"].reshape(4, 64), made["tokens"] * 2 / 3 - 1, atol=1e-6)


@pytest.mark.parametrize("variant", axial.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = axial.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    generator = config.build_generator()
    assert config.build_sampler().generator == generator
    assert generator.depth + 2 * generator.outer == config.model.depth
    if variant in ("paper", "deep"):
        d, depth = 1536, config.model.depth
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(generator.param_shapes()))
        # Of each block attention, an MLP as wide as the model, and 6 vectors from the class; the head has two vectors.
        assert size == pytest.approx(depth * (4 + 2 + 6) * d**2 + 2 * d**2 + (1001 + 2 * 256 + 128) * d, rel=2e-3)
        assert (generator.outer, generator.depth) == {"paper": (4, 8), "deep": (6, 12)}[variant]
        assert generator.grid == (96, 32) and generator.vocab == 256


def test_the_baseline_has_as_many_blocks():
    ours = axial.build("demo")
    other = plain(ours)
    assert type(other) is PixelConfig and other.build_generator().depth == 4
    same = {field.name for field in dataclasses.fields(other)}
    assert all(getattr(ours, name) == getattr(other, name) for name in same)


@pytest.mark.parametrize(
    "edit, message",
    [
        ("levels=1", "levels=1: expected 0, or at least 2"),
        ("outer=0", "outer=0, model.depth=3: expected at least one pair"),
        ("outer=2", "outer=2, model.depth=3: .* and a block besides"),
        ("tokenizer.patch_nums=2,4", "next-token models take one scale"),
        ("model.shared_adaln=true", "model.shared_adaln=True"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(axial.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke"):
        axial.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        axial.claim("large")


@pytest.mark.numeric
def test_what_does_not_need_training(monkeypatch):
    """Every law depends on all earlier tokens and no others; where attention is axial a token meets rows and columns of keys."""
    config = axial.build("smoke")
    ours, full = dependences(config).rows
    for row in (ours, full):
        assert row["earlier tokens that move a law"] == "120 of 120" and row["other tokens that do"] == "0 of 136"
    monkeypatch.setattr(axial_recipe, "measure", lambda *args: {"seconds": 64e-6})
    (row,) = costs_by_size(config, (8,)).rows
    assert row == {
        "tokens": 64,
        "axial: attended a token": 8 + 4.5 + 4.5,  # a whole row, then half a column, then half a row
        "axial: us a token": 1.0,
        "full attention: attended a token": 3 * 32.5,
        "full attention: us a token": 1.0,
    }


@pytest.mark.slow  # it trains a tokenizer, a classifier and two generators
def test_the_claim_at_its_smallest():
    comparison, dependent, costs = axial.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["model calls"] for row in comparison.rows] == ["16 + 4", 16]
    assert len(dependent.rows) == len(costs.rows) == 2
