"""S114: the drafter's training, the designed tree and the published sizes."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.generators.feature_drafter import FeatureDrafter
from jaxgen.recipes.falcon import FalconConfig
from jaxgen.recipes.feature_drafting import DrafterConfig

FALCON = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "falcon.py"))


@pytest.mark.parametrize("variant", FALCON.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = FALCON.get_config(variant)
    assert [stage.name for stage in recipe.stages] == ["generator", "drafter"] and recipe.stages[1].needs == ("generator",)
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'large' is not one of"):
        FALCON.get_config("large")


def test_published_sizes():
    """Vicuna-7B with a drafter of two LSTM layers and one decoder block, counted by hand."""
    config = FALCON.get_config("paper").config
    model, drafter = config.build_model(), config.build_drafter()
    tokens, vectors = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 8, 4096))
    count = {
        name: sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), *inputs)))
        for name, module, inputs in (("target", model, (tokens,)), ("drafter", drafter, (vectors, vectors)))
    }
    d, hidden = 4096, 11008
    block = 4 * d * d + 3 * d * hidden + 2 * d
    assert count["target"] == 32 * block + 2 * 32000 * d + d
    lstm = 4 * (2 * d * d + d * d + d) + 4 * (d * d + d * d + d)
    assert count["drafter"] == lstm + block + 2 * d + 2 * d  # norms of tokens and features, the first feature, one vector before
    assert (config.topology.drafts, len(config.topology.levels), config.drafter.block) == (75, 4, 2)
    assert [len(level) for level in config.topology.levels] == [20, 19, 21, 15]


@pytest.mark.slow
def test_what_a_guess_depends_on(randomize):
    """Its own block and those before: vectors of pairs in later blocks change nothing."""
    drafter = FeatureDrafter(width=8, heads=2, block=3, recurrent=1)
    rng = np.random.default_rng(0)
    tokens, behind = rng.standard_normal((2, 1, 9, 8)).astype(np.float32)
    variables = randomize(jax.eval_shape(drafter.init, jax.random.key(0), tokens, behind))
    apply = jax.jit(lambda tokens, shift: drafter.apply(variables, tokens, behind, shift=shift)[0])
    for shift in range(3):
        want = apply(tokens, shift)
        assert want.shape == (11, 8)
        for pair in (2, 5):
            moved = np.abs(apply(tokens + np.eye(9)[pair][:, None], shift) - want).max(-1) > 1e-6
            first = (pair + 2 + shift) // 3 * 3 - shift  # where the block of the pair's vector begins
            np.testing.assert_array_equal(moved, np.arange(11) >= max(first, 0))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiles")
def test_training_makes_the_drafter_agree():
    """On one batch, with the target's random laws; glancing shows positions at first, and none at the end."""
    config = dataclasses.replace(FALCON.get_config("smoke").config, drafter=DrafterConfig(noise=0.0, recurrent=1))
    model, stage = config.build_model(), config.recipe().stages[1]
    tokens = np.random.default_rng(0).integers(0, 256, (4, 25))
    frozen = {"generator": {"generator": model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))}}
    frozen["generator"]["generator"]["params"]["head"]["kernel"] *= 20
    params, state = stage.init(jax.random.key(1), frozen)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, moments, step):
        def loss(params):
            return stage.loss(params, state, {"tokens": tokens}, jax.random.key(3), step, frozen)

        (_, (metrics, _)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        changes, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, changes), moments, metrics

    moments, found = optimizer.init(params), []
    for _ in range(40):
        params, moments, metrics = update(params, moments, 0)
        found.append(metrics)
    assert found[0]["agreement"] < 0.2 and found[-1]["agreement"] > 0.5 and found[-1]["kl"] < 0.5 * found[0]["kl"]
    assert 0 < found[-1]["shown"] < found[0]["shown"] <= 0.4
    *_, metrics = update(params, moments, config.drafter_train.steps)
    assert metrics["shown"] == 0


@pytest.mark.slow
def test_the_claim_compares_equals(monkeypatch):
    """Drafters differ in one thing at a time and are trained alike; what trains and measures is tested elsewhere."""
    trained, compared = {}, {}

    def train_all(config, seed, given, log):
        trained[seed, len(trained)] = config
        params = given | {"drafter": {"drafter": len(trained)}, "generator": {"generator": 0}}
        return None, params, {}

    def compare(samplers, params, prompts, **settings):
        compared.update(samplers=samplers, params=params, prompts=prompts)
        return [{"method": name} for name in samplers]

    monkeypatch.setattr(FALCON.claims, "trained", lambda config, seed, log: (None, {"generator": {"generator": 0}}))
    monkeypatch.setattr(FALCON.claims, "train_all", train_all)
    monkeypatch.setattr(FALCON, "compare_samplers", compare)
    (claim,) = FALCON.claim("smoke", seeds=2, log=lambda line: None)
    assert len(claim.rows) == 2 * len(compared["samplers"]) and len(trained) == 8
    two, blind, one, draft = list(trained.values())[:4]
    assert dataclasses.replace(two, drafter=dataclasses.replace(two.drafter, glance=0.0)) == blind
    assert dataclasses.replace(two, drafter=dataclasses.replace(two.drafter, block=1)) == one
    assert draft.model_train == two.drafter_train and draft.model == dataclasses.replace(two.model, depth=2)
    methods = {name: sampler.method for name, sampler in compared["samplers"].items()}
    assert methods["k=2, tree, 2 passes"].topology == methods["k=1, tree, 4 passes"].topology == two.topology
    names = {method.name for name, method in methods.items() if name != "plain"}
    assert names | {"generator"} == set(compared["params"])


def test_bad_configurations():
    with pytest.raises(ValueError, match="tree='00'"):
        FalconConfig(tree="00")
    with pytest.raises(ValueError, match="drafter.glance=2"):
        DrafterConfig(glance=2)
    with pytest.raises(ValueError, match="drafter.block=0"):
        DrafterConfig(block=0)
    with pytest.raises(ValueError, match="budget 'huge'"):
        FALCON.claim("huge")
