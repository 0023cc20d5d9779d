"""configs/xar.py: published sizes and schedule, bad values, a few images learnt by heart, the claim's systems."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.optim import lr_schedule
from jaxgen.recipes import claims
from jaxgen.recipes.masked_latent import LATENT_RULES
from jaxgen.recipes.next_x import FlowTrainConfig, NextXModelConfig, SolverConfig
from jaxgen.train.mesh import AXES, shardings

XAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "xar.py"))


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", XAR.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = XAR.get_config(variant)
    assert [stage.name for stage in recipe.stages if stage.name != "tokenizer"][:1] == ["generator"]
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'mini' is not one of smoke, small, paper, large, huge"):
        XAR.get_config("mini")


@pytest.mark.parametrize("variant, millions, steps", [("paper", 172, 40), ("large", 608, 50), ("huge", 1100, 50)])
def test_published_sizes(variant, millions, steps):
    """172 M, 608 M and 1.1 B parameters, as published; 256 tokens of 16 numbers in four cells; placed over the mesh's axes."""
    recipe = XAR.get_config(variant)
    generator = recipe.config.build_generator()
    shapes = generator.param_shapes()
    assert size(shapes) / 1e6 == pytest.approx(millions, rel=0.005 if millions < 1000 else 0.08)
    assert generator.order.sizes == (64,) * 4 and generator.channels == 16 and recipe.config.sampler.steps == steps
    placed = shardings(AbstractMesh((1, 8, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4), shapes, LATENT_RULES)
    split = jax.tree.leaves(jax.tree.map(lambda leaf, s: math.prod(leaf.shape) * any(s.spec), shapes, placed))
    assert sum(split) > 0.95 * size(shapes)


def test_the_published_schedule_and_sampler():
    """Their README and the defaults of their arguments: 5e-5 for 256 images of 2048, 100 of 800 epochs of warm-up."""
    recipe = XAR.get_config("paper")
    train, optim = recipe.config.model_train, recipe.config.model_train.optim
    epoch = 1_281_167 // 2048
    assert (train.batch_size, train.steps, train.ema, train.class_drop) == (2048, 800 * epoch, 0.9999, 0.1)
    assert (optim.b1, optim.b2, optim.clip, optim.weight_decay) == (0.9, 0.96, 1.0, 0.02)
    lr = lr_schedule(optim, train.steps)
    np.testing.assert_allclose([lr(0), lr(50 * epoch), lr(100 * epoch), lr(600 * epoch)], [0, 2e-4, 4e-4, 4e-4], rtol=1e-5)
    shapes = {}
    for stage in recipe.stages:
        shapes[stage.name] = jax.eval_shape(stage.init, jax.random.key(0), {name: shapes[name] for name in stage.needs})[0]
    images = jax.eval_shape(lambda p: recipe.sample(p, jax.random.key(0), jnp.zeros((2,), jnp.int32)), shapes)["images"]
    assert images.shape == (2, 256, 256, 3)


def test_bad_configurations():
    for make, match in (
        (lambda: NextXModelConfig(unit="row"), "model.unit='row': expected one of token"),
        (lambda: NextXModelConfig(context="half"), "model.context='half': expected one of noisy, clean"),
        (lambda: NextXModelConfig(dtype="float8"), "model.dtype='float8'"),
        (lambda: NextXModelConfig(width=0), "model.width=0"),
        (lambda: FlowTrainConfig(ema=2.0), "model_train.ema=2.0"),
        (lambda: SolverConfig(steps=0), "sampler.steps=0"),
        (lambda: SolverConfig(solver="rk"), "sampler.solver='rk'"),
        (lambda: XAR.get_config("smoke").override(["model.unit_size=3"]), "model.unit_size=3: size=3: cells of that size do not"),
        (lambda: XAR.get_config("smoke").override(["model.unit=image"]), "model.unit='image', model.unit_size=2: size=2: only"),
        (lambda: XAR.get_config("smoke").override(["sampler.steps=1"]), "steps=1: expected at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.fixture(scope="module")
def smoke():
    return XAR.get_config("smoke").config.resolve()


@pytest.mark.slow  # a whole system, trained or measured
def test_a_few_images_are_learnt_by_heart(smoke):
    """The loss on four images falls far below that of saying nothing, which is about 2."""
    recipe = smoke.recipe()
    stage, optimizer = recipe.stage("generator"), optax.adam(1e-2)
    source = digits("train")
    batch = {name: np.stack([source[i][name] for i in range(4)]) for name in ("image", "label")}
    (params, state), sample = stage.init(jax.random.key(0), {}), jax.random.key(1)

    @jax.jit
    def update(params, moments, key):
        def loss(p):
            return stage.loss(p, state, batch, key, 0, {})[0]

        value, slope = jax.value_and_grad(loss)(params)
        change, moments = optimizer.update(slope, moments)
        return optax.apply_updates(params, change), moments, value

    moments, values = optimizer.init(params), []
    for i in range(200):
        params, moments, value = update(params, moments, jax.random.fold_in(sample, i))
        values.append(float(value))
    assert np.mean(values[-30:]) < 0.6 * np.mean(values[:5])
    images = recipe.sample({"generator": params}, sample, batch["label"])["images"]
    assert images.shape == pixels(batch["image"]).shape and np.isfinite(images).all()


def test_sampling_options(smoke):
    recipe = smoke.recipe()
    for settings, match in ((dict(top_k=3), "top_k=3: continuous tokens"), (dict(top_p=0.9), "top_p=0.9: continuous tokens")):
        with pytest.raises(ValueError, match=match):
            recipe.sample({}, jax.random.key(0), np.array([0]), **settings)


def test_the_claim_compares_equals(monkeypatch):
    """What is measured against what; the measuring itself is tested with the claims."""
    seen = {}
    monkeypatch.setattr(claims, "compare_generators", lambda systems, **kwargs: seen.update(systems=systems, **kwargs))
    XAR.claim("small", seeds=2, edits=["model.width=32"], log=print)
    ours, *others = seen["systems"].values()
    assert seen["seeds"] == 2 and ours.model.width == 32 and ours.model.context == "noisy"
    assert all(dataclasses.replace(other, model=ours.model) == ours for other in others)
    steps = [config.build_generator().order.steps for config in seen["systems"].values()]
    assert steps == [4, 16, 4, 16, 4, 3, 1]
    assert [c.model.context for c in (ours, *others)] == ["noisy", "noisy", "clean", "clean", "noisy", "noisy", "noisy"]
    sizes = [size(config.build_generator().param_shapes()) for config in seen["systems"].values()]
    # Positions of the scales aside, which are more than the grid's.
    assert max(sizes) / min(sizes) < 1.05
    calls = seen["columns"](ours.recipe(), {})
    assert calls == {"model calls": 4 * 20 + 3}
    assert seen["columns"](ours.recipe().override(["sampler.solver=heun"]), {}) == {"model calls": 4 * 40 + 3}
    XAR.claim("smoke", seeds=1, log=print)
    assert list(seen["systems"]) == ["S048 xAR, cells, noisy context", "tokens, noisy context", "cells, teacher forcing"]
    with pytest.raises(ValueError, match="budget 'huge'"):
        XAR.claim("huge")
