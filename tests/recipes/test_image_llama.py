"""LlamaGen and S022 NAR as recipes: the loss by hand, greedy samples, published sizes, and what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from configs import llamagen, nar
from jaxgen import config as config_lib
from jaxgen.recipes import neighbour_claims
from jaxgen.recipes.image_llama import RULES, ImageLlamaConfig
from jaxgen.recipes.neighbours import in_raster_order
from jaxgen.train.mesh import AXES, shardings

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0")


@pytest.mark.numeric
@pytest.mark.parametrize("system", [llamagen, nar])
def test_stage_and_sampler(system, raster_recipe_agrees):
    config = config_lib.override(system.build("smoke"), SHAPE)
    raster_recipe_agrees(config)


# In millions, as in the authors' tables of weights, where they say.
PUBLISHED_M = {
    llamagen: {"paper": 111, "large": 343, "xl": 775, "xxl": 1400, "3b": 3100},
    nar: {"base": None, "paper": None, "xl": 816, "xxl": None},
}


@pytest.mark.parametrize("system, variant", [(s, v) for s in PUBLISHED_M for v in s.VARIANTS])
def test_every_variant_builds_and_survives_json(system, variant):
    """Those of published sizes count the layers of the authors' models."""
    config = system.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert config.build_tokenizer().image_size == (config.data.image_size or 8,) * 2
    if variant in PUBLISHED_M[system]:
        shapes = config.build_generator().param_shapes()["params"]
        size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        d, layers = config.model.width, config.model.depth + getattr(config.model, "head_depth", 0)
        heads = 1 if system is llamagen else 2
        block = 4 * d * d + 3 * d * config.model.hidden + 2 * d
        assert size == layers * block + (1 + heads) * 16384 * d + 1001 * d + heads * d
        published = PUBLISHED_M[system][variant]
        assert published is None or size / 1e6 == pytest.approx(published, rel=0.01)
        assert config.model.dropout == config.model.token_dropout == 0.1


def test_the_parts_of_a_model_are_placed():
    """Every block, both heads and the embeddings are split; the classes, one more than devices divide, by width."""
    shapes = {"generator": nar.build("paper").build_generator().param_shapes()}
    mesh = AbstractMesh((1, 2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    placed = shardings(mesh, shapes, RULES)["generator"]["params"]
    for stack in ("transformer", "stacks_0"):
        kernels = placed[stack]["blocks"]
        for kernel in (kernels["attention"]["qkv"], kernels["attention"]["o"], kernels["mlp"]["w13"], kernels["mlp"]["w2"]):
            assert {"fsdp", "tensor"} <= set(kernel["kernel"].spec)
    for name in ("head", "heads_before_0"):
        assert tuple(placed[name]["kernel"].spec) == ("fsdp", "tensor")
    assert tuple(placed["token_embed"]["embedding"].spec) == ("tensor", "fsdp")
    assert tuple(placed["class_embed"]["embedding"].spec) == (None, "fsdp")


def test_the_baseline_has_as_many_blocks():
    ours = nar.build("demo")
    other = in_raster_order(ours)
    assert type(other) is ImageLlamaConfig and other.model.depth == 3 and ours.build_generator().layers == 3
    assert dataclasses.replace(other, model=ours.model) == dataclasses.replace(llamagen.build("demo"), model=ours.model)
    assert ours.build_generator().order.steps == 7 and other.build_generator().order.steps == 16


@pytest.mark.parametrize(
    "edit, message",
    [
        ("tokenizer.patch_nums=2,4", r"tokenizer.patch_nums=\(2, 4\): next-token models take one scale"),
        ("model.heads=3", "model.heads=3: width 16"),
        ("model.kv_heads=3", "model.kv_heads=3 must divide model.heads=2"),
        ("model.dropout=1.5", r"model.dropout=1.5: expected a share in \[0, 1\]"),
        ("model.num_classes=0", "model.num_classes=0"),
        ("model.head_depth=0", "model.head_depth=0"),
        ("model.dtype=int8", "model.dtype='int8'"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(nar.build("smoke"), [edit])
    for system in (llamagen, nar):
        with pytest.raises(ValueError, match="variant 'd17' is not one of smoke, demo, small"):
            system.get_config("d17")
    with pytest.raises(ValueError, match="budget 'large' is not one of smoke, small"):
        nar.claim("large")


@pytest.mark.numeric
def test_calls_and_times_are_told(monkeypatch):
    """Of clips, whose tokens both orders sample; who is faster is not this test's to say."""
    monkeypatch.setattr(neighbour_claims, "add_times", lambda rows, systems, batches: asked.append((rows, systems, batches)))
    asked = []
    config = config_lib.override(nar.build("smoke"), ["model.width=24"])
    claim = neighbour_claims.speed(config, ((2, 3), (2, 2, 2)), batches=(3,), log=lambda line: None)
    assert [row["model calls"] for row in claim.rows] == [4, 6, 4, 8]
    assert [row["tokens"] for row in claim.rows] == ["2x3"] * 2 + ["2x2x2"] * 2
    rows, systems, batches = asked[1]
    assert rows == claim.rows[2:] and batches == (3,)
    for recipe, params in systems:
        made = recipe.sample(params, jax.random.key(0), np.arange(3))["images"]
        assert made.shape == (3, 8) and made.min() >= 0 and made.max() < 16


@pytest.mark.slow  # it trains a tokenizer, a classifier and two generators
def test_the_claim_at_its_smallest():
    comparison, speed = nar.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["model calls"] for row in comparison.rows] == [7, 16]
    assert [row["model calls"] for row in speed.rows] == [7, 16, 8, 32]
