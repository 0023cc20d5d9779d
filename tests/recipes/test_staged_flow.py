"""configs/ecar.py: sizes, bad values, what the claim compares and says; digits trained and sampled for a moment."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.recipes import claims, staged_flow
from jaxgen.recipes.staged_flow import StagedFlowModelConfig
from jaxgen.train import train

ECAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "ecar.py"))


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def shaken(params):
    """Ten updates leave zero weights near 0, behind which nothing shows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


@pytest.mark.parametrize("variant", ECAR.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = ECAR.get_config(variant)
    assert recipe.stage("generator").needs == (("tokenizer",) if variant == "paper" else ())
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'mini' is not one of smoke, small, paper"):
        ECAR.get_config("mini")


def test_the_large_model():
    """About as many parameters as DiT-XL's 675 M; three stages on the latents of 256 pixels."""
    recipe = ECAR.get_config("paper")
    generator = recipe.config.build_generator()
    assert generator.order.shapes == ((4, 4), (8, 8), (16, 16)) and generator.path.starts == (1.0, 1 - 1 / 3, 1 - 2 / 3)
    assert size(generator.param_shapes()) / 1e6 == pytest.approx(675, rel=0.1)
    shapes = {}
    for stage in recipe.stages:
        shapes[stage.name] = jax.eval_shape(stage.init, jax.random.key(0), {name: shapes[name] for name in stage.needs})[0]
    images = jax.eval_shape(lambda p: recipe.sample(p, jax.random.key(0), jnp.zeros((2,), jnp.int32)), shapes)["images"]
    assert images.shape == (2, 256, 256, 3)


def test_bad_configurations():
    smoke = ECAR.get_config("smoke")
    for make, match in (
        (lambda: StagedFlowModelConfig(head_depth=0), "model.head_depth=0"),
        (lambda: StagedFlowModelConfig(starts=(1.0, -0.5)), r"model.starts=\(1.0, -0.5\)"),
        (lambda: smoke.override(["model.starts=1.0,0.5,0.2"]), r"starts=\(1.0, 0.5, 0.2\): expected one for each of sides"),
        (lambda: smoke.override(["model.scales=3,4"]), r"sides=\(3, 4\): expected positive sizes, each a multiple"),
        (lambda: smoke.override(["model.scales=1,2"]), r"scales=\(1, 2\): the last is not the latent's size, 4"),
        (lambda: smoke.override(["sampler.steps=0"]), "sampler.steps=0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.slow  # a whole system, trained or measured
def test_the_claim_trains_once_and_samples_in_several_counts(monkeypatch):
    """Trainings and measuring replaced: who is compared, what a row says, and what the notes conclude."""
    trained, distance = [], {("E-CAR", 2): 3.0, ("E-CAR", 4): 1.05, ("E-CAR", 8): 1.0}

    def train_all(config, seed, given, log):
        trained.append((config, seed, sorted(given)))
        recipe = config.recipe()
        shapes = {stage.name: jax.eval_shape(stage.init, jax.random.key(0), {})[0] for stage in recipe.stages}
        return recipe, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), {}

    def evaluate(recipe, params, key, **kwargs):
        name = "E-CAR" if isinstance(recipe.config, staged_flow.StagedFlowConfig) else "DiT"
        assert kwargs["settings"]["cfg"] == 0 and kwargs["num"] == 500
        value = distance.get((name, recipe.config.sampler.steps), 1.0)
        return {"generation": {"class_accuracy": 0.9, "frechet": value}}, None

    monkeypatch.setattr(claims, "train_all", train_all)
    monkeypatch.setattr(staged_flow, "evaluate_images", evaluate)
    monkeypatch.setattr(claims, "seconds_an_image", lambda systems, batch: [0.001 * r.config.sampler.steps for r, _ in systems])
    monkeypatch.setattr(claims, "compile_report", lambda fn, *args: (None, {"temp_MB": 1.5}))
    (claim,) = ECAR.claim("small", seeds=2, edits=["model_train.steps=77"], log=lambda line: None)
    assert [(type(config).__name__, seed, given) for config, seed, given in trained] == [
        ("StagedFlowConfig", 0, []),
        ("StagedFlowConfig", 1, ["classifier"]),
        ("NextXConfig", 0, ["classifier"]),
        ("NextXConfig", 1, ["classifier"]),
    ]
    ours, dit = trained[0][0], trained[2][0]
    for name in ("data", "tokenizer", "classifier", "num_classes", "model_train"):
        assert getattr(ours, name) == getattr(dit, name)
    assert [row["steps a stage"] for row in claim.rows] == [2, 4, 8, 4, 8, 16, 32]
    assert [row["stages"] for row in claim.rows] == [2] * 3 + [1] * 4
    assert claim.rows[0]["parameters M"] / claim.rows[-1]["parameters M"] == pytest.approx(1, abs=0.1)
    assert (claim.rows[0]["Frechet"], claim.rows[0]["ms/image, batch 1"]) == ("3 (0)", 2.0)
    assert {row["sampling temporary MB, batch 16"] for row in claim.rows} == {1.5}
    flops = [row["sampling GFLOP/image"] for row in claim.rows]
    # Twice the steps are twice the calls of the baseline's transformer; the system's runs once a stage, however many.
    assert flops[4] / flops[3] == pytest.approx(2, rel=0.15) and flops[1] / flops[0] < 1.95
    assert "S093 E-CAR comes within a tenth of it with 4 steps a stage" in claim.notes
    assert "baseline, one stage comes within a tenth of it with 4 steps a stage" in claim.notes
    distance |= {("E-CAR", n): 9.0 for n in (2, 4, 8)}
    assert "S093 E-CAR does not come within a tenth of it" in ECAR.claim("small", seeds=1, log=lambda line: None)[0].notes
    for call, match in ((lambda: ECAR.claim("huge"), "budget 'huge'"), (lambda: ECAR.claim("smoke", seeds=0), "seeds=0")):
        with pytest.raises(ValueError, match=match):
            call()


# Trains and samples a whole system.
@pytest.mark.slow
def test_training_and_sampling(tmp_path):
    config = ECAR.smoke().resolve()
    config = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, steps=0))
    recipe = config.recipe()
    results = train(recipe, tmp_path, run=config.run, log=lambda line: None)
    params = {name: result.params for name, result in results.items()}
    assert list(params) == ["generator"] and np.isfinite(results["generator"].metrics["loss"])
    params = shaken(params)
    images = [np.asarray(recipe.sample(params, jax.random.key(0), np.array([3, 5]), cfg=c)["images"]) for c in (0.0, 3.0)]
    assert images[0].shape == (2, 8, 8, 1) and np.abs(images[0]).max() <= 1 and np.abs(images[0] - images[1]).max() > 1e-4
