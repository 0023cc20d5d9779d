"""The supernet's stage, its schedule, its depths at run time, and configs/variant.py."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data import digits
from jaxgen.generators import NextScaleSampler
from jaxgen.recipes import claims, supernet
from jaxgen.recipes.next_scale import generator_stage, param_shapes
from jaxgen.recipes.next_scale_costs import cache_bytes
from jaxgen.recipes.supernet import SubnetShare, SupernetConfig
from jaxgen.train import train

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANT = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "variant.py"))


@pytest.fixture(scope="module")
def config():
    """Three blocks, one subnet of two."""
    config = VARIANT.get_config("smoke").config
    model = dataclasses.replace(config.model, depth=3)
    train = dataclasses.replace(config.supernet_train, class_drop=0.0, steps=30)
    return dataclasses.replace(config, model=model, depths=(2,), supernet_train=train)


@pytest.fixture(scope="module")
def params(config, randomize):
    return {
        name: {name: jax.tree.map(jnp.asarray, randomize(shapes, seed=len(name)))}
        for name, shapes in param_shapes(config.build_sampler()).items()
    }


def test_the_published_shares():
    """Two of ten for 5 epochs, then 0.2 + 0.8 (epoch - 5) / 15, then all."""
    share = SubnetShare()
    epochs = np.array([0, 4.9, 5, 12.5, 20, 29])
    np.testing.assert_allclose(share.at(epochs / 30), [0.2, 0.2, 0.2, 0.6, 1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(SubnetShare(first=0.5, last=0.5).at(epochs / 30), 0.5)
    np.testing.assert_allclose(SubnetShare(rise_from=0.0, rise_to=0.5).at(0.25), 0.6, atol=1e-6)
    for fields, message in (
        (dict(first=1.2), "share.first=1.2"),
        (dict(last=-0.1), "share.last=-0.1"),
        (dict(rise_from=0.7), "share.rise_from=0.7: expected less than share.rise_to=0.666"),
    ):
        with pytest.raises(ValueError, match=message):
            SubnetShare(**fields)


@pytest.mark.numeric
def test_an_update_trains_one_depth(config, params):
    """The loss is that of the full network or of the subnet, as often as the share says."""
    config = dataclasses.replace(config, share=SubnetShare(first=0.3, last=0.3))
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:4]), "label": jnp.asarray(source.labels[:4])}
    stage = config.recipe().stage("supernet")
    assert stage.needs == ("tokenizer", "generator") and stage.steps == 30
    start, state = jax.jit(stage.init)(jax.random.key(0), params)
    jax.tree.map(np.testing.assert_array_equal, start, params["generator"])
    assert state == ()

    @jax.jit
    def losses(start):
        singles = [generator_stage(dataclasses.replace(config, subnet=subnet)) for subnet in (0, 2)]
        return jnp.stack([single.eval_loss(start, (), batch, None, params)["loss"] for single in singles])

    full, subnet = losses(start)
    assert abs(full - subnet) > 1e-3
    keys = jax.random.split(jax.random.key(1), 60)
    values, (metrics, _) = jax.jit(lambda keys: jax.lax.map(lambda k: stage.loss(start, (), batch, k, 3, params), keys))(keys)
    which = np.abs(values - subnet) < 1e-4
    np.testing.assert_allclose(values, np.where(which, subnet, full), atol=1e-4)
    assert abs(which.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 60)
    np.testing.assert_allclose(metrics["share"], 0.3, rtol=1e-6)

    measured = jax.jit(stage.eval_loss)(start, (), batch, jax.random.key(0), params)
    assert measured["nll"] == pytest.approx(float(full), abs=1e-5)
    assert measured["nll_d2"] == pytest.approx(float(subnet), abs=1e-5)
    assert measured["loss"] == pytest.approx(float(full + subnet) / 2, abs=1e-5)


@pytest.mark.numeric
def test_depths_at_run_time(config, params):
    """The depth of a call, and the one of the configuration; each is compiled once, whatever is asked for between."""
    recipe, key, labels = config.recipe(), jax.random.key(0), np.array([1, 4], np.int32)
    before = NextScaleSampler._sample._cache_size()
    made = {depth: recipe.sample(params, key, labels, depth=depth, temperature=1.5)["tokens"] for depth in (3, 2)}
    assert NextScaleSampler._sample._cache_size() == before + 2
    np.testing.assert_array_equal(recipe.sample(params, key, labels, temperature=1.5)["tokens"], made[3])
    shallow = config.at(2).recipe()
    np.testing.assert_array_equal(shallow.sample(params, key, labels, temperature=1.5)["tokens"], made[2])
    assert np.any(shallow.sample(params, key, labels[::-1], depth=0, cfg=3.0, top_k=5)["tokens"] != made[2])
    assert NextScaleSampler._sample._cache_size() == before + 2
    with pytest.raises(ValueError, match=r"depth=1 is not in the supernet, which has 0, 2, 3 \(0 is all\)"):
        recipe.sample(params, key, labels, depth=1)


def test_bad_input():
    for edit, message in (
        ("depths=2,9", r"depths=\(2, 9\): expected increasing numbers, from 2 to depth - 1 = 3"),
        ("subnet=1", "subnet=1 is not in the supernet"),
        ("bridge=3", "bridge=3: expected 1 to 2 of 3 scales"),
        ("model.scan_layers=true", "scan_layers=True"),
    ):
        with pytest.raises(ValueError, match=message):
            VARIANT.get_config("smoke").override([edit])
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, demo"):
        VARIANT.get_config("large")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        VARIANT.claim("huge")


@pytest.mark.parametrize("variant", VARIANT.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = VARIANT.get_config(variant)
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    names = [stage.name for stage in recipe.stages]
    assert names[:3] == ["tokenizer", "generator", "supernet"]


def test_published_sizes():
    """VAR-d30 with subnets of 16, 8, 4 and 2 blocks after six of ten scales: keys of 91 of 680 tokens are of all blocks."""
    config = VARIANT.get_config("paper").config
    generator = config.build_generator()
    assert (generator.depth, generator.width, generator.depths, generator.bridge) == (30, 1920, (2, 4, 8, 16), 6)
    assert config.supernet_train.steps == 30 * 1252 and config.supernet_train.optim.lr == 1e-6
    late, early = (jax.eval_shape(lambda s=s: config.at(s).build_generator().init_cache(2).k).shape for s in (0, 16))
    assert late == (30, 2, 680, 30, 64) and early == (30, 2, 91, 30, 64)


def test_cache_bytes_by_depth(config):
    """The peak is at the last scale, where a subnet has its own blocks' keys only."""
    sizes = {subnet: cache_bytes(config.at(subnet).build_generator(), 4) for subnet in (0, 2)}
    position = 2 * 2 * 16 * 4  # keys and values, two rows, width, float32
    assert sizes[0] == (3 * 21 * position,) * 3
    assert sizes[2] == (3 * 5 * position, 3 * 5 * position, 2 * 21 * position)


@pytest.mark.slow  # a whole system, trained or measured
def test_the_claim_compares_depths(config, monkeypatch):
    """VAR has the updates of both stages; the fixed ratio goes on from the same full network; a row for each system and depth."""
    calls = []

    def train_all(system, seed, given, log):
        calls.append((system, seed, set(given)))
        stages = {name: {} for name in ("tokenizer", "generator", "classifier")}
        return system.recipe(), stages | ({"supernet": {}} if isinstance(system, SupernetConfig) else {}), {}

    def measure(recipe, params, depth, seed, samples):
        return {"class accuracy": 0.1 * (depth + seed)}

    def sampling_costs(recipe, params):
        return {"sampling GFLOP/image": getattr(recipe.sample, "keywords", {}).get("depth", "all")}

    monkeypatch.setattr(supernet, "train_all", train_all)
    monkeypatch.setattr(supernet, "sampling_costs", sampling_costs)
    monkeypatch.setattr(supernet, "_measure", measure)
    monkeypatch.setattr(claims, "seconds_an_image", lambda systems, batch: [1.0 / batch] * len(systems))
    claim = supernet.compare_depths(config, seeds=2, samples=10, log=lambda line: None)
    (var, _, first), (ours, _, second), (fixed, _, third), (_, seed, later), *_ = calls
    assert (first, second, third) == (set(), {"tokenizer", "classifier"}, {"tokenizer", "classifier", "generator"})
    assert seed == 1 and later == {"tokenizer", "classifier"} and len(calls) == 6
    assert ours == config and dataclasses.replace(fixed, share=config.share) == config
    assert fixed.share.at(0.0) == fixed.share.at(1.0) == 0.5
    assert var.model_train.steps == config.model_train.steps + config.supernet_train.steps
    table = [(row["system"], row["late depth"], row["class accuracy"]) for row in claim.rows]
    full, two = "0.35 (0.1)", "0.25 (0.1)"
    want = [("S047 VAR", 3, full)]
    assert table == want + [(name, d, q) for name in ("S090 VARiant", "fixed ratio 0.5") for d, q in ((3, full), (2, two))]
    assert [row["sampling GFLOP/image"] for row in claim.rows] == ["all", 3, 2, 3, 2]
    assert {row["model calls"] for row in claim.rows} == {3} and {row["ms/image, batch 64"] for row in claim.rows} == {15.625}
    costs = [row["cache MB an image"] for row in claim.rows]
    assert costs[0] == costs[1] == costs[3] > costs[2] == costs[4]


@pytest.mark.slow
def test_smoke_trains_and_samples(tmp_path):
    """All stages after one another, then every depth: compiling them takes most of a minute."""
    recipe = VARIANT.get_config("smoke")
    assert isinstance(recipe.config, SupernetConfig)
    results = train(recipe, tmp_path, run=recipe.config.run, log=lambda line: None)
    params = {name: result.params for name, result in results.items()}
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), params["generator"], params["supernet"])
    assert max(jax.tree.leaves(changed)) > 0
    for depth in (4, 3, 2):
        out = recipe.sample(params, jax.random.key(0), np.array([1, 2], np.int32), depth=depth)
        assert out["images"].shape == (2, 8, 8, 1) and np.isfinite(out["images"]).all()
