"""configs/himar.py: published sizes, bad values, what the claim compares; digits trained and sampled for a moment."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.benchmark import count_flops
from jaxgen.recipes import claims, pivots
from jaxgen.recipes.masked_latent import LATENT_RULES
from jaxgen.recipes.pivots import PivotConfig, PivotModelConfig, PivotSamplingConfig, PivotTrainConfig
from jaxgen.train import train
from jaxgen.train.mesh import AXES, shardings

HIMAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "himar.py"))


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shaken(params):
    """Ten updates leave zero weights near 0, behind which nothing shows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def generator_shapes(recipe):
    shapes = {}
    for stage in recipe.stages[: 2 if recipe.config.tokenizer.features else 1]:
        frozen = {name: shapes[name] for name in stage.needs}
        shapes[stage.name] = jax.eval_shape(stage.init, jax.random.key(0), frozen)[0]
    return shapes


@pytest.mark.parametrize("variant", HIMAR.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = HIMAR.get_config(variant)
    assert recipe.stage("generator").needs == (("tokenizer",) if variant in HIMAR.PUBLISHED else ())
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'mini' is not one of smoke, small, paper"):
        HIMAR.get_config("mini")


@pytest.mark.parametrize("variant, millions", [("paper", 244), ("large", 529), ("huge", 1090)])
def test_published_sizes(variant, millions):
    """244 M, 529 M and 1,090 M parameters (their README), 64 pivots and 256 tokens of 16 numbers."""
    recipe = HIMAR.get_config(variant)
    module = recipe.config.build_generator()
    assert (module.pivots, module.length, module.channels) == (64, 256, 16)
    shapes = generator_shapes(recipe)
    assert size(shapes["generator"]) / 1e6 == pytest.approx(millions, abs=1)
    if variant == "paper":
        placed = shardings(AbstractMesh((1, 4, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4), shapes["generator"], LATENT_RULES)
        split = jax.tree.leaves(jax.tree.map(lambda leaf, s: math.prod(leaf.shape) * any(s.spec), shapes["generator"], placed))
        assert sum(split) > 0.9 * size(shapes["generator"])
        labels = jnp.zeros((2,), jnp.int32)
        images = jax.eval_shape(lambda p: recipe.sample(p, jax.random.key(0), labels, cfg=1.5), shapes)["images"]
        assert images.shape == (2, 256, 256, 3)


def test_bad_configurations():
    smoke = HIMAR.get_config("smoke").config
    for make, match in (
        (lambda: PivotModelConfig(dense_depth=0), "model.dense_depth=0"),
        (lambda: PivotModelConfig(width=0), "model.width=0"),
        (lambda: PivotTrainConfig(shown=1.5), "train.shown=1.5"),
        (lambda: PivotTrainConfig(steps=-1), "train.steps=-1"),
        (lambda: PivotSamplingConfig(chain_steps=1), "sampling.chain_steps=1"),
        (lambda: PivotConfig(pivot_image_size=8), "pivot_image_size=8: expected less than tokenizer.image_size=8"),
        (lambda: dataclasses.replace(smoke, pivot_image_size=3).recipe(), "image_size=3: patches of 2 pixels"),
        (lambda: config_lib.override(smoke, ["sampling.pivot_steps=5"]).recipe(), "steps=5: expected 1 to length=4"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_the_claim_compares_equals(monkeypatch):
    """MAR with a step a token and with as many calls; as many parameters, the same data, tokens and updates."""
    seen = {}

    def compare(systems, **kwargs):
        seen.update(systems=systems, **kwargs)
        recipes = [config.recipe() for config in systems.values()]
        return claims.Claim("T", [kwargs["columns"](recipe, generator_shapes(recipe)) for recipe in recipes])

    monkeypatch.setattr(pivots.claims, "compare_generators", compare)
    (claim,) = HIMAR.claim("small", seeds=2, edits=["model_train.steps=77"], log=print)
    ours, mar, fewer = seen["systems"].values()
    assert (seen["seeds"], ours.num_classes, mar.model_train.steps, mar.speculation.drafts) == (2, 10, 77, 0)
    assert (mar.speculation.steps, fewer.speculation.steps) == (16, 8) and mar.model == fewer.model
    for name in ("data", "tokenizer", "classifier", "prediction", "num_classes"):
        assert getattr(ours, name) == getattr(mar, name)
    sizes = [size(generator_shapes(config.recipe())["generator"]) for config in (ours, mar)]
    assert sizes[0] / sizes[1] == pytest.approx(1, abs=0.03)
    assert [(row["model calls"], row["tokens"]) for row in claim.rows] == [(8, 20), (16, 16), (8, 16)]
    # MAR's transformer runs once a step, its head for every step of the chain and as many tokens as the widest group has.
    module, variables = mar.build_generator(), generator_shapes(mar.recipe())["generator"]["generator"]

    def flops(method, *args):
        return count_flops(lambda v: module.apply(v, *args, method=method), variables)

    features = flops("features", jnp.zeros((1,), jnp.int32), jnp.zeros((1, 16, 4)), jnp.zeros((1, 16), bool))
    for row, steps, widest in zip(claim.rows[1:], (16, 8), (1, 3)):
        # Of sixteen rows, at one level.
        head = flops("predict", jnp.zeros((16 * widest, 64)), jnp.zeros((16 * widest, 4)), jnp.int32(0)) / 16
        assert row["sampling GFLOP/image"] == pytest.approx(steps * (features + 20 * head) / 1e9, rel=0.01)
    assert "sampling GFLOP/image" not in claim.rows[0]
    assert "4 of 20 tokens are pivots" in claim.notes
    with pytest.raises(ValueError, match="budget 'huge'"):
        HIMAR.claim("huge")


# Trains and samples a whole system.
@pytest.mark.slow
def test_training_and_sampling(tmp_path):
    config = HIMAR.smoke().resolve()
    config = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, steps=0))
    recipe = config.recipe()
    results = train(recipe, tmp_path, run=config.run, log=lambda line: None)
    params = {name: result.params for name, result in results.items()}
    assert list(params) == ["generator"] and np.isfinite(results["generator"].metrics["loss"])
    params = shaken(params)
    drawn = [recipe.sample(params, jax.random.key(0), np.array([3, 5]), cfg=c) for c in (0.0, 3.0)]
    assert drawn[0]["images"].shape == (2, 8, 8, 1) and drawn[0]["pivots"].shape == (2, 4, 4)
    assert np.abs(np.asarray(drawn[0]["images"] - drawn[1]["images"])).max() > 1e-4
    stage = recipe.stage("generator")
    batch = {"image": np.random.default_rng(0).integers(0, 255, (4, 8, 8, 1), np.uint8), "label": np.arange(4)}

    def loss(*edits):
        stage = recipe.override(["model_train.class_drop=0.0", *edits]).stage("generator")
        return float(jax.jit(stage.loss)(params["generator"], (), batch, jax.random.key(0), 0, {})[0])

    plain = loss()
    assert stage.steps == 10
    edits = "model_train.class_drop=1.0", "model_train.shown=0.0", "model_train.least_masked=1.0", "model_train.repeats=2"
    assert all(abs(loss(edit) - plain) > 1e-6 for edit in edits)
