"""S132: the vision-language recipe, its sampler and the published sizes."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.generators.vision_language import Blind
from jaxgen.recipe import modules
from jaxgen.recipes import spec_vlm, spec_vlm_claims
from jaxgen.recipes.spec_vlm import CompressorConfig, SpecVLMConfig, TreeConfig
from jaxgen.recipes.spec_vlm_claims import measure_captions, picture_cost

SPEC_VLM = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "spec_vlm.py"))


@pytest.mark.parametrize("variant", SPEC_VLM.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = SPEC_VLM.get_config(variant)
    assert [stage.name for stage in recipe.stages] == ["generator", "drafter"]
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'large' is not one of"):
        SPEC_VLM.get_config("large")


def test_published_sizes():
    config = SPEC_VLM.get_config("paper").config
    assert config.build_model().visual_tokens == 576
    text, visual = (jax.ShapeDtypeStruct((1, n, 4096), jnp.float32) for n in (8, 576))

    def init(text, visual):
        return config.build_drafter().init(jax.random.key(0), text, text, visual, method=spec_vlm._initialise)

    shapes = jax.eval_shape(init, text, visual)["params"]
    compressor = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes.pop("compressor")))
    drafter = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    d, hidden = 4096, 11008
    # A decoder block, the linear maps of pairs and of visual tokens, norms of both inputs, and the first feature.
    assert drafter == 4 * d * d + 3 * d * hidden + 2 * d + 2 * (2 * d * d + d) + 2 * d + d
    gate, score, conv = 2 * d * 5 + 5, d + 1, 4 * d * d + d
    assert compressor == gate + score + conv + (144 * d + 576 * d + 4 * (d * d + d))


@pytest.mark.slow
def test_losses_count_answers_alone():
    """Traced, not run: what a stage's loss gives, and which positions count."""
    config = SPEC_VLM.get_config("smoke").config
    batch = next(iter(config.recipe().stages[0].data(0, 1)))
    weights = np.asarray(spec_vlm._weights(batch))
    for row in range(len(weights)):
        counted = batch["tokens"][row, 1:][weights[row] > 0]
        text = batch["tokens"][row, batch["prompt"][row] : batch["length"][row]]
        np.testing.assert_array_equal(counted, text)
    frozen = {}
    for stage in config.recipe().stages:
        params, state = jax.eval_shape(stage.init, jax.random.key(0), frozen)
        step = jax.ShapeDtypeStruct((), jnp.int32)
        value, (metrics, _) = jax.eval_shape(stage.loss, params, state, batch, jax.random.key(1), step, frozen)
        assert value.shape == () and all(x.shape == () for x in metrics.values())
        frozen[stage.name] = params
    assert {f"way_{way}" for way in config.compressor.ways} <= set(metrics)


@pytest.mark.slow
def test_the_sampler_continues_prompts(quick_compiles):
    config = SPEC_VLM.get_config("smoke").config
    recipe = config.recipe()
    frozen = {}
    for stage in recipe.stages:
        frozen[stage.name] = jax.jit(lambda frozen, stage=stage: stage.init(jax.random.key(0), frozen)[0])(frozen)
    out = recipe.sample(frozen, jax.random.key(0), ["describe: ", "total: "], length=16)
    images = out["images"]
    assert images.shape == (2, *config.data.image_size, 1) and out["tokens"].shape == (2, 16)
    assert bytes(out["tokens"][0, :10].astype(np.uint8)) == b"describe: " and (out["length"] > [10, 7]).all()
    # The claim's columns.
    variables, prompts = modules(frozen), np.tile(out["tokens"][:1, :10], (2, 1))
    plain = dataclasses.replace(config.build_sampler(), method=Blind())
    (row,) = measure_captions({"plain": plain}, variables, images, prompts, ["", ""], max_length=12, repeats=1)
    assert row["tokens a target call"] == 1 and row["right"] == 0 and row["speed-up, batch 1"] == 1
    few = dataclasses.replace(config, compressor=CompressorConfig(ways=("pool",)))
    without_gate = variables["drafter"]["params"]["compressor"] | {"gate": {"kernel": np.zeros((64, 1)), "bias": np.zeros(1)}}
    variables["drafter"] = {"params": variables["drafter"]["params"] | {"compressor": without_gate}}
    count, shares, cost = picture_cost(plain, few.method(), variables, images, prompts, repeats=1)
    assert count == 4 and shares == [1] and cost > 0


@pytest.mark.slow
def test_the_claim_compares_equals(monkeypatch):
    """One target; drafters that differ in what they see of the picture."""
    trained, compared = [], {}

    def train_all(config, seed, given, log):
        trained.append(config)
        return None, given | {"drafter": {"drafter": len(trained)}}, {}

    def measure(samplers, params, images, prompts, right, **settings):
        compared.update(samplers=samplers, params=params, right=right)
        return [{"method": name} for name in samplers]

    monkeypatch.setattr(spec_vlm_claims.claims, "trained", lambda config, seed, log: (None, {"generator": {"generator": 0}}))
    monkeypatch.setattr(spec_vlm_claims.claims, "train_all", train_all)
    monkeypatch.setattr(spec_vlm_claims, "measure_captions", measure)
    monkeypatch.setattr(spec_vlm_claims, "picture_cost", lambda *args: (3.0, [0.75, 0.25, 0, 0, 0], 7.2))
    (claim,) = SPEC_VLM.claim("smoke", log=lambda line: None)
    assert [config.compressor.ways[0] for config in trained] == ["keep", "pool", "drop", "prune"]
    assert len({dataclasses.replace(config, compressor=CompressorConfig()) for config in trained}) == 1
    rows = {row["method"]: row for row in claim.rows}
    assert rows["tree, visual tokens: elastic"]["ways"].startswith("prune 0.75, pool 0.25")
    assert rows["plain"]["visual tokens read"] == "-"
    assert [text[:10] + text[-2:] for text in compared["right"]] == ["describe: .\n"] * 4
    assert {"drafter all", "drafter elastic", "generator"} <= set(compared["params"])


def test_bad_configurations():
    with pytest.raises(ValueError, match="tree.beam=0"):
        TreeConfig(beam=0)
    with pytest.raises(ValueError, match="model.vocab=100"):
        SpecVLMConfig(model=dataclasses.replace(SpecVLMConfig().model, vocab=100)).resolve()
    with pytest.raises(ValueError, match="ways="):
        SpecVLMConfig(compressor=CompressorConfig(ways=("zip",))).build_drafter()
    with pytest.raises(ValueError, match="budget 'huge'"):
        SPEC_VLM.claim("huge")
