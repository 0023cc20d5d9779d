"""How claims are measured: who trains what, on whose tokens, judged by whom. Training and measuring themselves are stubs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as config_lib
from jaxgen.recipes import claims
from jaxgen.recipes.next_scale import NextScaleConfig
from jaxgen.train import load_params

BASE = config_lib.override(
    NextScaleConfig(),
    ["classifier.steps=5", "model.num_classes=3", "tokenizer.patch_nums=1,2", "tokenizer.phis=1", "data.image_size=32"],
)


@pytest.fixture
def trained(monkeypatch):
    """Stubs `train`: a stage learns (number of the training, seed); one of 0 steps has to find its weights in the directory."""
    calls = []

    def train(recipe, workdir, *, run, log):
        results = {}
        call = {"seed": run.seed, "depth": recipe.config.model.depth, "trained": []}
        for stage in recipe.stages:
            if stage.steps:
                weights = np.full((4, recipe.config.model.depth), 100.0 * run.seed + len(calls), np.float32)
                params = {stage.name: {"w": weights}}
                call["trained"].append(stage.name)
            else:
                params, _ = load_params(workdir, stage.name)
            metrics = {"nll": 2.0 * recipe.config.model.depth**-0.5, "nll_last_step": 1.0}
            results[stage.name] = types.SimpleNamespace(params=params, metrics=metrics)
        calls.append(call)
        return results

    monkeypatch.setattr(claims, "train", train)
    return calls


@pytest.fixture
def judged(monkeypatch):
    """Stubs `evaluate_images` and the clock."""
    calls = []

    def evaluate(recipe, params, key, *, num, batch_size, settings):
        value = float(np.mean(params["generator"]["generator"]["w"]))
        calls.append({name: float(np.mean(params[name][name]["w"])) for name in params} | {"num": num, "settings": settings})
        generation = {"class_accuracy": value, "frechet": 2 * value, "class_accuracy_real": 0.97, "frechet_real": 0.5}
        return {"reconstruction": {"psnr": 20.0}, "generation": generation}, None

    monkeypatch.setattr(claims, "evaluate_images", evaluate)
    monkeypatch.setattr(claims, "seconds_an_image", lambda systems, batch: [1.0 / batch] * len(systems))
    monkeypatch.setattr(claims, "costs", lambda recipe, params: {"GFLOP": 3.0})
    return calls


def test_systems_share_a_judge_and_seeds_share_a_tokenizer(trained, judged):
    systems = {"A": BASE, "B": config_lib.override(BASE, ["tokenizer.patch_nums=2", "model.depth=3"])}
    claim = claims.compare_generators(systems, seeds=2, samples=30, log=lambda line: None)
    assert [call["trained"] for call in trained] == [
        ["tokenizer", "generator", "classifier"],
        ["generator"],
        ["tokenizer", "generator"],
        ["generator"],
    ]
    assert [(call["seed"], call["depth"]) for call in trained] == [(0, 16), (1, 16), (0, 3), (1, 3)]
    assert [call["tokenizer"] for call in judged] == [0, 0, 2, 2]
    assert [call["classifier"] for call in judged] == [0, 0, 0, 0]
    assert [call["generator"] for call in judged] == [0, 101, 2, 103]
    assert all(call["num"] == 30 and call["settings"] == {"cfg": 0.0, "top_k": 0, "top_p": 0.0} for call in judged)

    a, b = claim.rows
    assert (a["system"], b["system"]) == ("A", "B") and (a["model calls"], a["tokens"]) == (2, 5)
    assert (b["model calls"], b["tokens"]) == (1, 4)
    assert a["class accuracy"] == "50.5 (1e+02)" and b["Frechet"] == "105 (2e+02)" and a["PSNR of tokens"] == "20 (0)"
    assert a["parameters M"] == pytest.approx(4 * 16 / 1e6, abs=1e-3)
    assert (a["ms/image, batch 1"], a["ms/image, batch 64"]) == (1000.0, 15.625)
    assert (a["real class accuracy"], a["Frechet, real test images"]) == (0.97, 0.5)
    assert claim.notes == "2 seeds; mean (spread). Model calls an image: 2 against 1."
    assert a["GFLOP"] == 3.0


def test_equal_tokenizers_are_trained_once_and_own_columns_come_last(trained, judged):
    systems = {"A": BASE, "B": config_lib.override(BASE, ["model.depth=3"])}
    given = dict(seeds=1, samples=30, log=lambda line: None, title="T")
    claim = claims.compare_generators(systems, columns=lambda recipe, params: {"own": sorted(params), "GFLOP": 4.0}, **given)
    assert [call["trained"] for call in trained] == [["tokenizer", "generator", "classifier"], ["generator"]]
    assert claim.title == "T" and all(row["GFLOP"] == 4.0 for row in claim.rows)
    assert claim.rows[1]["own"] == ["classifier", "generator", "tokenizer"]


def test_columns_of_every_seed_have_a_spread(trained, judged):
    each = {"each": lambda recipe, params, seed: {"own": float(np.mean(params["generator"]["generator"]["w"])) + seed}}
    claim = claims.compare_generators({"A": BASE}, seeds=2, samples=30, log=lambda line: None, **each)
    assert claim.rows[0]["own"] == "51 (1e+02)" and [call["generator"] for call in judged] == [0, 101]


def test_costs_of_sampling_and_of_an_update(quick_compiles):
    """Against the matrices' sizes: an update takes some three times a forward pass of the generator, and the frozen tokenizer."""
    config = config_lib.override(
        NextScaleConfig(),
        [
            *("data.path=digits", "data.channels=1", "tokenizer.patch_nums=1,2", "tokenizer.ch=8", "tokenizer.ch_mult=1,2,2"),
            *("tokenizer.groups=4", "tokenizer.res_blocks=1", "tokenizer.vocab=8", "tokenizer.width=4", "tokenizer.phis=1"),
            *("model.depth=2", "model.width=16", "model.heads=2", "model_train.batch_size=4", "tokenizer.attention=false"),
            *("tokenizer_train.adversarial_weight=0", "tokenizer_train.perceptual_weight=0"),
        ],
    ).resolve()
    recipe = config.recipe()
    tokenizer = jax.eval_shape(recipe.stage("tokenizer").init, jax.random.key(0), {})[0]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), {"tokenizer": tokenizer})
    shapes = jax.eval_shape(recipe.stage("generator").init, jax.random.key(0), zeros)[0]
    params = zeros | {"generator": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)}
    small = claims.costs(recipe, params, batch=2)
    large = claims.sampling_costs(recipe, params, batch=8) | claims.update_costs(recipe, params, stage="generator", batch=8)
    assert set(small) >= {"sampling GFLOP/image", "update GFLOP/image", "sampling temporary MB, batch 2"}
    assert small["sampling GFLOP/image"] == large["sampling GFLOP/image"] > 0
    assert large["update temporary MB, batch 8"] > small["update temporary MB, batch 2"]


def test_one_seed_has_no_spread_and_none_is_an_error(trained, judged):
    claim = claims.compare_generators({"A": BASE}, seeds=1, samples=30, log=lambda line: None)
    assert claim.rows[0]["class accuracy"] == 0.0 and claim.rows[0]["PSNR of tokens"] == 20.0
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        claims.compare_generators({"A": BASE}, seeds=0, samples=30, log=lambda line: None)


def test_a_power_law_through_the_sizes(trained):
    """Losses 2 depth^-1/2 with sizes proportional to depth: the exponent is -1/2."""
    sizes = {f"d{depth}": config_lib.override(BASE, [f"model.depth={depth}"]) for depth in (25, 100, 400, 2500)}
    claim = claims.scaling_law(sizes, log=lambda line: None)
    assert [call["trained"] for call in trained] == [["tokenizer", "generator"], *[["generator"]] * 3]
    assert [row["model"] for row in claim.rows] == list(sizes)
    assert [row["parameters M"] for row in claim.rows] == [0.0001, 0.0004, 0.0016, 0.01]
    assert [row["test nll"] for row in claim.rows] == pytest.approx([0.4, 0.2, 0.1, 0.04])
    assert "a = -0.5000" in claim.notes and "r = -1.0000" in claim.notes


def test_systems_that_sample_alike_trained_weights(trained, judged):
    systems = {"A": BASE, "A, other settings": config_lib.override(BASE, ["model_train.steps=7"])}
    same = {"A, other settings": "A"}
    claims.compare_generators(systems, seeds=2, samples=30, log=lambda line: None, same_weights=same)
    assert len(trained) == 2
    assert [call["generator"] for call in judged] == [0, 101, 0, 101]


def test_a_system_of_two_claims_is_trained_once(trained, judged, tmp_path):
    with claims.reuse(tmp_path):
        for other in ("model.depth=3", "model.depth=4"):
            systems = {"A": BASE, "B": config_lib.override(BASE, [other])}
            claims.compare_generators(systems, seeds=2, samples=30, log=lambda line: None)
    assert [(call["seed"], call["depth"]) for call in trained] == [(0, 16), (1, 16), (0, 3), (1, 3), (0, 4), (1, 4)]
    assert [call["generator"] for call in judged][:2] == [call["generator"] for call in judged][4:6]


def test_tokenizers_and_judges_are_kept(trained, tmp_path):
    """Inside `reuse` they are trained once for a seed, whatever claim asks; the generator is trained each time."""
    with claims.reuse(tmp_path):
        first = claims.train_all(BASE, 0, {}, print)[1]
        again = claims.train_all(config_lib.override(BASE, ["model.depth=3"]), 0, {}, print)[1]
        claims.train_all(BASE, 1, {}, print)
    stages = ["tokenizer", "generator", "classifier"]
    assert [call["trained"] for call in trained] == [stages, ["generator"], stages]
    for stage in ("tokenizer", "classifier"):
        jax.tree.map(np.testing.assert_array_equal, again[stage], first[stage])


def test_seconds_an_image_are_warm_and_per_image(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(claims, "time", types.SimpleNamespace(perf_counter=lambda: clock["now"]))
    waits = iter([50.0, 4.0, 2.0, 8.0])
    seen = []

    def sample(params, key, labels):
        clock["now"] += next(waits)
        seen.append(labels.tolist())
        return {"images": jnp.zeros(3)}

    recipe = types.SimpleNamespace(config=BASE, sample=sample, shows="images")
    assert claims.seconds_an_image([(recipe, {})], 5, repeats=3) == [4.0 / 5]
    assert seen == [[0, 1, 2, 0, 1]] * 4


def test_seconds_of_systems_are_taken_in_turns(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(claims, "time", types.SimpleNamespace(perf_counter=lambda: clock["now"]))
    turns = []

    def system(name, seconds):
        def sample(params, key, labels):
            clock["now"] += seconds
            turns.append(name)
            return {"images": jnp.zeros(3)}

        return types.SimpleNamespace(config=BASE, sample=sample, shows="images"), {}

    assert claims.seconds_an_image([system("A", 2.0), system("B", 6.0)], 2, repeats=2) == [1.0, 3.0]
    assert turns == ["A", "B"] * 3


def test_means_and_their_spread():
    assert claims.mean_and_spread([1.0, 2.0, 4.0]) == "2.333 (3)"
    assert claims.mean_and_spread([2.5]) == 2.5
    assert claims.mean_and_spread([float("inf")] * 3) == float("inf")
