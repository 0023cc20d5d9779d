"""The recipe of S165: budgets, heads told apart once, sampling with either cache, and what the claim measures."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.decoding import HeadPlan, Settings
from jaxgen.generators import HeadAware
from jaxgen.recipes import claims, head_aware_claims
from jaxgen.recipes.head_aware import BudgetConfig, forced_logits
from jaxgen.recipes.next_scale import param_shapes
from jaxgen.recipes.next_scale_costs import cache_bytes

pytestmark = pytest.mark.numeric

HACK = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "hack.py"))
EDITS = ["model.num_classes=10", "model.scan_layers=false", "cache.samples=2"]
LABELS = np.array([1, 7], np.int32)


@pytest.fixture(scope="module")
def config():
    """Scales of 1, 2 and 4: all but the last have 5 positions, of which half are 2."""
    return HACK.get_config("smoke").override(EDITS).config


@pytest.fixture(scope="module")
def params(config, randomize):
    shapes = param_shapes(config.build_sampler())
    made = {name: jax.device_put(randomize(shapes[name], seed=i)) for i, name in enumerate(("tokenizer", "generator"))}
    # Attention that differs from position to position.
    for i in range(config.model.depth):
        made["generator"]["params"]["transformer"][f"blocks_{i}"]["ada"]["dense"]["bias"] *= 4
    return {name: {name: variables} for name, variables in made.items()}


@pytest.fixture(scope="module")
def recipe(config):
    return config.recipe()


@pytest.mark.parametrize("variant", HACK.VARIANTS)
def test_every_variant_is_vars_with_budgets(variant):
    config = HACK.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    assert 0 < config.cache.keep < 1
    contextual, spatial = config.budgets()
    budget, most = config.positions()
    assert 1 <= contextual <= most and 1 <= spatial <= most
    assert abs((contextual + spatial) / 2 - budget) <= 0.5
    assert config.budgets(1.0) == (most, most)


def test_published_size():
    """VAR-d30 with half of its cache; nothing is made."""
    config = HACK.get_config("paper").config
    generator = config.build_generator()
    assert (generator.depth, generator.width, generator.order.length) == (30, 1920, 680)
    assert config.positions() == (212, 424)
    heads = HeadAware(generator, HeadPlan(((True, False) * 15,) * 30, *config.budgets()))
    # The largest cache between scales is that before the last one; it is made of keys and values of bfloat16.
    cache = jax.eval_shape(lambda: heads.init_cache(2))
    assert heads.plan.kept(generator.order)[-1] == 30 * 30 * 212
    assert cache.new_k.shape == (30, 2, 1, 30, 64) and cache.k.dtype == jnp.bfloat16


def test_unknown_variants_and_budgets():
    with pytest.raises(ValueError, match="variant 'd16' is not one of smoke, demo, small, paper"):
        HACK.get_config("d16")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        HACK.claim("huge")
    for edit, message in (
        ("cache.keep=0", r"cache.keep=0.0: expected a share of the cache in \(0, 1\]"),
        ("cache.keep=1.5", "cache.keep=1.5"),
        ("cache.keep=0.05", "budget=0: expected 1..5"),
        ("cache.contextual_share=2", "cache.contextual_share=2.0"),
        ("cache.contextual_ratio=0", "cache.contextual_ratio=0.0: must be > 0"),
        ("cache.samples=0", "cache.samples=0"),
        ("cache.queries=0", "cache.queries=0"),
    ):
        with pytest.raises(ValueError, match=message):
            HACK.get_config("smoke").override([edit])


def test_the_plan_follows_the_attention(config, params):
    variance = config.variance(params)
    assert variance.shape == (2, 2) and (variance > 0).all() and np.ptp(variance) > 0
    plan = config.plan(params)
    assert plan.kinds.sum() == 2 and variance[plan.kinds].min() >= variance[~plan.kinds].max()
    assert (plan.contextual, plan.spatial) == config.budgets() and plan.queries == config.cache.queries
    fewer = dataclasses.replace(config, cache=BudgetConfig(contextual_share=0.25, keep=1.0, samples=2))
    plan = fewer.plan(params)
    assert plan.kinds.sum() == 3 and plan.contextual == 5


def test_sampling_with_either_cache(config, recipe, params):
    """The heads are told apart once; with the full cache it is VAR's sampler."""
    full = recipe.sample(params, jax.random.key(0), LABELS, compressed=False, cfg=1.0)
    made = recipe.sample(params, jax.random.key(0), LABELS, cfg=1.0)
    assert made["images"].shape == full["images"].shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(made["tokens"][:, :5], full["tokens"][:, :5])
    plan = recipe.sample._plan(params)
    assert plan is recipe.sample._plan(params) and plan == config.plan(params)
    images, tokens = config.build_sampler()(
        {name: params[name][name] for name in params}, jax.random.key(0), LABELS, Settings(cfg=1.0)
    )
    np.testing.assert_array_equal(full["tokens"], tokens)


def test_new_labels_and_settings_compile_nothing(config, recipe, params):
    sampler = config.planned_sampler(recipe.sample._plan(params))
    recipe.sample(params, jax.random.key(0), LABELS, cfg=1.0)
    before = sampler._sample._cache_size()
    recipe.sample(params, jax.random.key(1), LABELS[::-1], cfg=3.0, temperature=0.5, top_k=4)
    assert sampler._sample._cache_size() == before


def test_sampling_can_be_traced_once_the_heads_are_known(config, recipe, params):
    def draw(params):
        return recipe.sample(params, jax.random.key(0), LABELS, cfg=1.0)["tokens"]

    recipe.sample(params, jax.random.key(0), LABELS, cfg=1.0)
    assert jax.eval_shape(draw, params).shape == (2, 21)
    with pytest.raises(ValueError, match="params are traced"):
        jax.eval_shape(lambda p: config.recipe().sample(p, jax.random.key(0), LABELS)["tokens"], params)


def test_forced_logits_are_those_of_training(config, params):
    sampler, variables = config.build_sampler(), {name: params[name][name] for name in params}
    tokens = np.random.default_rng(0).integers(0, 16, (2, 21))

    @jax.jit
    def training(variables):
        features = sampler.tokenizer.apply(variables["tokenizer"], tokens, method="inputs")
        return sampler.generator.apply(variables["generator"], LABELS, features)

    want = training(variables)
    np.testing.assert_allclose(forced_logits(sampler, variables, LABELS, tokens), want, atol=2e-5)
    less = forced_logits(config.planned_sampler(config.plan(params)), variables, LABELS, tokens)
    np.testing.assert_allclose(less[:, :5], want[:, :5], atol=2e-5)
    assert np.abs(less - want)[:, 5:].max() > 1e-4


def test_cache_columns(config, params):
    """Bytes counted from the plan are those of the arrays: two rows of guidance, float32 keys and values of size 8."""
    plan = config.plan(params)
    full, sampler = config.build_sampler(), config.planned_sampler(plan)
    position = 2 * 2 * 8 * 4 * 2 * 2 / 1e3  # of all layers and heads
    assert head_aware_claims.cache_columns(full) == {"kept KB": round(5 * position, 2), "peak KB": round(21 * position, 2)}
    contextual, spatial = config.budgets()
    kept = (contextual + spatial) / 2
    assert head_aware_claims.cache_columns(sampler) == {
        "kept KB": round(kept * position, 2),
        "peak KB": round((kept + 16) * position, 2),
    }
    assert max(cache_bytes(sampler.generator, 4)) < max(cache_bytes(full.generator, 4))


def test_nearness(config, recipe, params):
    """A sampler is as near as can be to itself; another is as near as its laws say, by float64 arithmetic."""
    full, variables = config.build_sampler(), {name: params[name][name] for name in params}
    same = head_aware_claims.nearness(full, full, variables, jax.random.key(0), images=2)
    assert same["same tokens"] == 1 and same["PSNR to full, dB"] == 100 and same["millinats"] == pytest.approx(0, abs=1e-3)
    sampler = config.planned_sampler(recipe.sample._plan(params))
    other = head_aware_claims.nearness(full, sampler, variables, jax.random.key(0), images=2)
    labels, settings = np.arange(2, dtype=np.int32), Settings(cfg=0.0)
    _, tokens = full(variables, jax.random.key(0), labels, settings)
    _, others = sampler(variables, jax.random.key(0), labels, settings)
    p, q = (np.exp(np.float64(forced_logits(s, variables, labels, tokens))) for s in (full, sampler))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    assert other["same tokens"] == pytest.approx((np.asarray(tokens) == np.asarray(others)).mean())
    assert other["millinats"] == pytest.approx(1e3 * (p * np.log(p / q)).sum(-1).mean(), rel=1e-2) and other["millinats"] > 0.01


def test_the_claim_compares_caches_of_one_generator(config, params, monkeypatch):
    """What is measured of what; quality and seconds are measured elsewhere."""
    trained = []

    def train_all(config, seed, given, log):
        trained.append((seed, sorted(given)))
        return config.recipe(), params | {"classifier": {}}, {}

    def evaluate(recipe, params, key, **kwargs):
        return {"generation": {"class_accuracy": 0.5, "frechet": 1.0}}, None

    def sampling_costs(recipe, params):
        return {"sampling GFLOP/image": cache_columns(recipe.sample.args[0])["kept KB"], "sampling temporary MB, batch 16": 2.5}

    cache_columns = head_aware_claims.cache_columns
    monkeypatch.setattr(head_aware_claims, "sampling_costs", sampling_costs)
    monkeypatch.setattr(head_aware_claims, "train_all", train_all)
    monkeypatch.setattr(head_aware_claims, "evaluate_images", evaluate)
    monkeypatch.setattr(claims, "seconds_an_image", lambda systems, batch: [1e-3] * len(systems))
    monkeypatch.setattr(head_aware_claims, "nearness", lambda full, sampler, *args: {"same": float(sampler == full)})
    claim = head_aware_claims.compare_budgets(config, keeps=(0.4, 0.2), seeds=2, samples=10, log=lambda line: None)
    assert trained == [(0, []), (1, ["classifier", "tokenizer"])]
    assert [(row["system"], row["share kept"]) for row in claim.rows] == [
        ("S047 VAR, full cache", 1.0),
        ("S165 HACK", 0.4),
        ("all heads contextual", 0.4),
        ("all heads structural", 0.4),
        ("S165 HACK", 0.2),
        ("all heads contextual", 0.2),
        ("all heads structural", 0.2),
    ]
    assert [row["same"] for row in claim.rows] == ["1 (0)"] + ["0 (0)"] * 6
    kept = [row["kept KB"] for row in claim.rows]
    assert kept[0] > kept[1] == kept[2] == kept[3] > kept[4] == kept[5] == kept[6]
    assert [row["sampling GFLOP/image"] for row in claim.rows] == kept  # each row's own sampler is counted
    same = {"model calls": 3, "class accuracy": "0.5 (0)", "Frechet": "1 (0)", "sampling temporary MB, batch 16": 2.5}
    same |= {"ms/image, batch 1": 1.0, "ms/image, batch 64": 1.0}
    assert all(row.items() >= same.items() for row in claim.rows)
    assert "40%: 3 and 1 positions; 20%: 1 and 1 positions" in claim.notes
    with pytest.raises(ValueError, match="seeds=0"):
        head_aware_claims.compare_budgets(config, keeps=(0.5,), seeds=0, samples=10, log=print)
