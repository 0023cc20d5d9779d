"""S086 TTS-VAR on the library's own generator: rewards, sampler, configuration, claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tts_var, var
from jaxgen import config as config_lib
from jaxgen.data import World, WorldConfig
from jaxgen.data.world_oracle import class_score
from jaxgen.decoding import Known, SearchPlan, Settings, gumbel
from jaxgen.generators import SearchedSampler
from jaxgen.nn.classifier import Classifier
from jaxgen.recipes import searched_claims
from jaxgen.recipes.next_scale import NextScaleConfig, param_shapes
from jaxgen.recipes.searched import ClassFeatures, LogProbability, OracleScore, SearchConfig, SearchedConfig

PLAN = SearchPlan(widths=(4, 2, 2), cluster=(1,))
DRAWN = SearchPlan(widths=(4, 2, 2), resample=(1,), strength=1.0)
LABELS = np.array([0, 2, 1], np.int32)
KEY = jax.random.key(3)
SETTINGS = Settings(cfg=1.0, temperature=1.2)


@pytest.fixture(scope="module")
def judges(randomize):
    """A reward and features of a classifier of the tiny model's images."""
    module = Classifier(num_classes=4, width=8, levels=1)
    variables = jax.tree.map(jnp.asarray, randomize(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 6, 6, 3)))))
    return {"reward": LogProbability(variables, module), "features": ClassFeatures(variables, module)}


@pytest.mark.numeric
@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("plan", [PLAN, DRAWN])
def test_what_goes_on_takes_its_cache_along(tiny, judges, plan):
    """The last scale's tokens are those of a full forward pass over the winner's own earlier tokens, with the winner's noise."""
    sampler = SearchedSampler(generator=tiny.generator, tokenizer=tiny.tokenizer, plan=plan)
    found = sampler(tiny.params, KEY, LABELS, SETTINGS, **judges)
    tokens = np.asarray(found.tokens)

    @jax.jit
    def read(tokens):
        features = tiny.tokenizer.apply(tiny.params["tokenizer"], tokens, method="inputs")
        both = jnp.concatenate([LABELS, jnp.full(3, 3)])
        logits = tiny.generator.apply(tiny.params["generator"], both, jnp.concatenate([features, features]))
        conditional, unconditional = jnp.split(logits, 2)
        image = tiny.tokenizer.apply(tiny.params["tokenizer"], tokens, method="decode")
        guided = (1 + SETTINGS.cfg) * conditional - SETTINGS.cfg * unconditional  # VAR's ramp at the last scale
        noise = gumbel(KEY, jnp.arange(12), jnp.arange(5, 14), 16)
        return image, guided[:, 5:] / SETTINGS.temperature, noise, judges["reward"](image, jnp.asarray(LABELS))

    image, logits, noise, score = read(tokens)
    np.testing.assert_allclose(found.images, image, atol=1e-5)
    np.testing.assert_allclose(found.score, score, atol=1e-4)
    best = np.asarray(found.scores[-1]).argmax(axis=1)
    rows = np.arange(3) * 4 + best
    np.testing.assert_array_equal((np.asarray(logits) + np.asarray(noise)[rows]).argmax(-1), tokens[:, 5:])
    assert found.scores[-1].shape == (3, 2) and len(found.scores) == 1 + len(plan.resample)
    np.testing.assert_array_equal(found.score, np.asarray(found.scores[-1]).max(axis=1))


@pytest.mark.numeric
@pytest.mark.usefixtures("quick_compiles")
def test_one_candidate_is_plain_sampling_and_more_are_better(tiny, judges):
    one = SearchedSampler(generator=tiny.generator, tokenizer=tiny.tokenizer, plan=SearchPlan.best_of(1, 3))
    found = one(tiny.params, KEY, LABELS, SETTINGS, **judges)
    images, tokens = tiny.sampler(tiny.params, KEY, LABELS, SETTINGS)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.images, images, atol=1e-5)
    many = dataclasses.replace(one, plan=SearchPlan.best_of(6, 3))
    tokens = jnp.asarray(tokens)
    best = many(tiny.params, KEY, LABELS, SETTINGS, Known(tokens, jnp.zeros((3, 14), bool)), **judges)
    # The first image's first candidate has the noise of the plain sample.
    assert best.scores[-1][0, 0] == pytest.approx(float(found.score[0]), abs=1e-4) and best.score[0] > found.score[0]
    np.testing.assert_array_equal(best.score, np.asarray(best.scores[-1]).max(axis=1))
    # Known tokens are those of the image, whatever its candidates.
    known = Known(tokens, jnp.arange(14)[None] < jnp.array([[5], [1], [14]]))
    kept = many(tiny.params, KEY, LABELS, SETTINGS, known, **judges).tokens
    np.testing.assert_array_equal(np.asarray(kept)[known.keep], np.asarray(tokens)[known.keep])


@pytest.mark.numeric
@pytest.mark.usefixtures("quick_compiles")
def test_one_trace_for_labels_settings_and_weights(tiny, judges):
    sampler = SearchedSampler(generator=tiny.generator, tokenizer=tiny.tokenizer, plan=PLAN)
    first = sampler(tiny.params, KEY, LABELS, SETTINGS, **judges)
    before = SearchedSampler._search._cache_size()
    equal = SearchedSampler(generator=tiny.generator.clone(), tokenizer=tiny.tokenizer.clone(), plan=dataclasses.replace(PLAN))
    double = {name: dataclasses.replace(j, variables=jax.tree.map(lambda x: 2 * x, j.variables)) for name, j in judges.items()}
    other = equal(tiny.params, jax.random.key(1), LABELS[::-1].copy(), Settings(cfg=2.0, temperature=0.5, top_k=3), **double)
    assert SearchedSampler._search._cache_size() == before
    assert np.any(other.tokens != first.tokens)


@pytest.mark.usefixtures("quick_compiles")
def test_rewards_that_are_none(tiny):
    sampler = SearchedSampler(generator=tiny.generator, tokenizer=tiny.tokenizer, plan=SearchPlan.best_of(1, 3))

    def of_class_one(images, labels):
        return jnp.where(labels == 1, jnp.nan, 0.0)

    with pytest.raises(ValueError, match="reward: NaN for image 2 after scale 2"):
        sampler(tiny.params, KEY, LABELS, reward=of_class_one)
    with pytest.raises(ValueError, match=r"reward: .* for 3 images, expected floats of shape \(3,\)"):
        sampler(tiny.params, KEY, LABELS, reward=lambda images, labels: images[..., 0])
    with pytest.raises(ValueError, match=r"widths=\(2, 2\): expected one for each of 3 scales"):
        dataclasses.replace(sampler, plan=SearchPlan.best_of(2, 2))
    with pytest.raises(ValueError, match="label 5 is out of range"):
        sampler(tiny.params, KEY, np.array([5]), reward=of_class_one)


def test_rewards(judges):
    images = np.random.default_rng(0).uniform(-1, 1, (5, 6, 6, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 0])
    reward = judges["reward"]
    logits = np.asarray(reward.module.apply(reward.variables, images), np.float64)
    want = logits[np.arange(5), labels] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(reward(images, labels), want, atol=1e-5)
    assert judges["features"](images).shape == (5, 8)

    world = World(WorldConfig(height=24, width=24))
    pictures = np.stack([world[i]["image"] for i in range(6)]) / 127.5 - 1
    asked = np.array([world[i]["label"] for i in range(6)])
    asked[3:] = (asked[3:] + 7) % 30
    score = jax.jit(OracleScore())(pictures.astype(np.float32), asked)
    np.testing.assert_allclose(score, class_score(pictures, asked), atol=1e-3)
    assert score[:3].min() > 0.9 and score[3:].max() < 0.8


@pytest.mark.numeric
@pytest.mark.usefixtures("quick_compiles")
def test_the_recipe_samples_with_the_parameters_of_its_stages(randomize):
    config = config_lib.override(tts_var.get_config("smoke").config, ["model.depth=1", "model.scan_layers=false"])
    recipe = config.recipe()
    params = {name: {name: randomize(tree)} for name, tree in param_shapes(config.build_sampler()).items()}
    module = Classifier(config.num_classes, config.classifier.width)
    params["classifier"] = {"classifier": randomize(jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1))))}
    params = jax.tree.map(jnp.asarray, params)
    labels = np.arange(4)
    made = recipe.sample(params, KEY, labels, cfg=0.0)
    assert made["images"].shape == (4, 8, 8, 1) and made["tokens"].shape == (4, 30)
    reward = config.judges(params)["reward"]
    np.testing.assert_allclose(made["scores"], reward(made["images"], labels), atol=1e-4)
    best = recipe.sample(params, KEY, labels, cfg=0.0, plan=SearchPlan.best_of(2, 4))
    assert np.any(made["tokens"] != best["tokens"])
    twice = recipe.sample(params, KEY, labels, cfg=0.0, plan=SearchPlan.best_of(1, 4), times=2)
    np.testing.assert_array_equal(best["tokens"], twice["tokens"])
    with pytest.raises(ValueError, match="times=0: expected at least 1"):
        recipe.sample(params, KEY, labels, times=0)


def test_bad_configurations():
    smoke = tts_var.get_config("smoke").config

    def edited(*edits):
        return config_lib.override(smoke, edits)

    assert edited("search.strength=3").search.plan().strength == 3
    with pytest.raises(ValueError, match=r"widths=\(2, 4, 4, 4\) must not grow"):
        edited("search.widths=2,4,4,4")
    with pytest.raises(ValueError, match=r"search.widths=\(4, 2, 1, 1\): expected one for each of patch_nums=\(1, 2, 4\)"):
        edited("tokenizer.patch_nums=1,2,4")
    with pytest.raises(ValueError, match="search.reward='beauty': expected one of classifier, oracle"):
        SearchConfig(widths=(1,), reward="beauty")
    with pytest.raises(ValueError, match="search.reward='oracle' judges colours of data.path=world, not data.path=digits"):
        edited("search.reward=oracle")
    with pytest.raises(ValueError, match="classifier.steps=0: the search needs the recipe's classifier"):
        edited("classifier.steps=0")
    with pytest.raises(ValueError, match="search.strength=-1.0: expected at least 0"):
        edited("search.strength=-1")
    with pytest.raises(ValueError, match="model.num_classes=31: the oracle knows 30"):
        config_lib.override(tts_var.get_config("world").config, ["model.num_classes=31"]).resolve()
    with pytest.raises(ValueError, match="variant 'large' is not one of smoke, demo, world, small, paper"):
        tts_var.get_config("large")


@pytest.mark.parametrize("variant", tts_var.VARIANTS)
def test_variants(variant):
    config = tts_var.get_config(variant).config
    assert isinstance(config, SearchedConfig) and config_lib.from_json(config_lib.to_json(config)) == config
    sampler = config.build_sampler()
    assert len(sampler.plan.widths) == sampler.generator.order.steps
    if variant == "paper":
        base = var.get_config("d30").config
        assert config.model == base.model and config.tokenizer == base.tokenizer
        assert param_shapes(sampler) == param_shapes(base.build_sampler())
    if variant == "world":
        assert config.resolve() == config and config.search.reward == "oracle"


def test_the_claim_compares_at_equal_compute(monkeypatch):
    seen = []
    monkeypatch.setattr(tts_var, "compare_searches", lambda config, plans, **kwargs: seen.append((config, plans, kwargs)))
    tts_var.claim("small", seeds=2, edits=["search.strength=7", "data.seed=4"])
    assert [(config.data.path, config.data.seed) for config, _, _ in seen] == [("digits", 4), ("world", 0)]
    for config, plans, kwargs in seen:
        assert kwargs["seeds"] == 2 and config.search.strength == 7
        order = config.build_generator().order
        for n in (1, 2, 4, 8):
            search, rival = plans[f"TTS-VAR, n = {n}"], searched_claims.equal_compute(plans[f"TTS-VAR, n = {n}"], order)
            assert search.widths[-1] == n and plans[f"best of {n}"].widths == (n,) * 4
            assert plans[f"best of {rival.widths[0]}"] == rival
            assert abs(rival.tokens(order) / search.tokens(order) - 1) < 0.15
        costs = [plan.tokens(order) for plan in plans.values()]
        assert costs == sorted(costs)
    plain = seen[0][0]
    demo = var.get_config("demo").config
    same = [f.name for f in dataclasses.fields(NextScaleConfig) if f.name != "data"]
    assert all(getattr(plain, name) == getattr(demo, name) for name in same)
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        tts_var.claim("huge")


def test_what_the_claims_table_holds(monkeypatch):
    """Each plan is judged by a classifier of another seed than the one that guides; training and sampling are stubs."""
    config, judged = tts_var.get_config("smoke").config, []

    def sample(params, key, labels, *, plan, **settings):
        work = jnp.zeros((len(labels), 1000)) @ jnp.zeros((1000, 50 * plan.widths[0]))  # 10^5 operations a candidate
        value = plan.widths[0] / 10 + params["generator"]["generator"] / 100 + work.sum()
        return {"images": jnp.full((len(labels), 8, 8, 1), value)}

    recipe = dataclasses.replace(config.recipe(), sample=sample)

    def trained(config, seed, log):
        return recipe, {name: {name: jnp.float32(seed)} for name in ("tokenizer", "generator", "classifier")}

    def train_all(config, seed, given, log):
        assert set(given) == {"tokenizer", "generator"}
        return recipe, {**given, "classifier": {"classifier": jnp.float32(seed)}}, {}

    def measure(module, judge, images, labels, data, limit):
        judged.append((float(judge), len(images), np.bincount(labels).tolist()))
        return {"class_accuracy": 0.5, "frechet": float(images.mean()), "recall": 1.0}

    for name, stub in (("trained", trained), ("train_all", train_all), ("measure_samples", measure)):
        monkeypatch.setattr(searched_claims, name, stub)
    reward = {"reward": lambda images, labels: images.mean(axis=(1, 2, 3))}
    monkeypatch.setattr(SearchedConfig, "judges", lambda self, params: reward)
    plans = {"one": SearchPlan.best_of(1, 4), "search": config.search.plan()}
    table = searched_claims.compare_searches(config, plans, title="t", seeds=2, samples=20, log=lambda line: None, batch=8)
    assert judged == [(1000.0, 20, [2] * 10)] * 2 + [(1001.0, 20, [2] * 10)] * 2
    one, search = table.rows
    assert (one["search"], one["candidates"], one["tokens an image"]) == ("one", "1 1 1 1", 30)
    assert (search["candidates"], search["tokens an image"]) == ("4 2 1 1", 4 + 16 + 18 + 16)
    assert one["reward"] == one["Frechet"] == "0.105 (0.01)" and search["reward"] == "0.405 (0.01)"
    assert (one["sampling GFLOP/image"], search["sampling GFLOP/image"]) == pytest.approx((1e-4, 4e-4))
    assert all(row["model calls"] == 4 and row["ms/image"] > 0 for row in table.rows)
    assert all(row["sampling temporary MB, batch 16"] >= 0 for row in table.rows)
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        searched_claims.compare_searches(config, plans, title="t", seeds=0, samples=20, log=print)


@pytest.mark.slow  # trains two systems of three stages, and compiles a sampler for each of ten plans
def test_the_claim_at_smoke_size():
    for table in tts_var.claim("smoke", seeds=1, log=lambda line: None):
        rewards = {row["search"]: row["reward"] for row in table.rows}
        assert rewards["best of 2"] > rewards["best of 1"]
        assert all(row["tokens an image"] % 30 == 0 or "TTS" in row["search"] for row in table.rows)


@pytest.mark.slow  # trains three stages and a second judge, and searches with every plan
def test_the_claim_runs_at_smoke_size():
    reduced, *others = tts_var.claim("smoke", seeds=1, log=lambda line: None)
    for table in (reduced, *others):
        assert table.rows and all(np.isfinite(float(str(row["ms/image"]).split()[0])) for row in table.rows)
