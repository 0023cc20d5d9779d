"""The 4-bit system: its stage against the adapters that it is made of, its sampler against float weights, its claims."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import adapters, cli
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.decoding import Settings
from jaxgen.generators import NextScaleSampler, box_mask
from jaxgen.recipes import claims, quantised_claims
from jaxgen.recipes.next_scale import NextScaleConfig, generator_stage
from jaxgen.recipes.quantised import Int4Config, int4_stage, packed_generator
from jaxgen.train import load_params, save_params, train

MARLIN = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "marlin.py"))
CONFIG = MARLIN.get_config("smoke").override(["classifier.steps=0", "model_train.class_drop=0.0"]).config
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def batch():
    source = digits("train")
    return {"image": jnp.asarray(source.images[:16]), "label": jnp.asarray(source.labels[:16])}


@pytest.fixture(scope="module")
def rounded(params):
    """Parameters of the stage before it has seen data: the nearest values."""
    return jax.jit(CONFIG.recipe().stage("int4").init)(KEY, params)


def unrolled(config=CONFIG):
    module = config.build_generator().clone(scan_layers=False)
    shapes = [jax.ShapeDtypeStruct((1, 20, config.tokenizer.width), jnp.float32)]
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    return module, adapters.linear_layers(module, module.param_shapes(config.tokenizer.width), labels, *shapes)


def in_blocks(path):
    return path.startswith("transformer/")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.numeric
def test_the_first_parameters_are_the_nearest_values(params, rounded):
    _, layers = unrolled()
    variables = adapters.unstack_layers(params["generator"]["generator"])
    want = adapters.quantise(variables, layers, where=in_blocks)
    values, state = rounded
    assert set(values["int4"]) == set(filter(in_blocks, layers))
    same(packed_generator(params["generator"]["generator"], values["int4"]), want)
    assert {path: h.shape for path, h in state["hessians"].items()} == {p: (layers[p].k,) * 2 for p in values["int4"]}
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(values))


@pytest.mark.numeric
def test_the_last_update_solves_for_the_rest(params, batch, rounded):
    """Two batches through the stage against Hessians collected by hand from one batch of both."""
    stage = CONFIG.recipe().stage("int4")
    assert stage.steps == 2 and stage.needs == ("tokenizer", "generator")
    update = jax.jit(lambda state, batch, step: stage.loss({}, state, batch, KEY, step, params))
    values, state = rounded
    for step in range(2):
        part = jax.tree.map(lambda x, step=step: x[8 * step : 8 * step + 8], batch)
        loss, (metrics, state) = update(state, part, step)
        now, state = stage.after_update(values, state, KEY, step)
        assert step or all(map(np.array_equal, jax.tree.leaves(now), jax.tree.leaves(values)))
    module, layers = unrolled()
    variables = adapters.unstack_layers(params["generator"]["generator"])
    tokenizer, theirs = CONFIG.build_tokenizer(), params["tokenizer"]["tokenizer"]

    @jax.jit
    def by_hand(variables, images, labels):
        tokens = tokenizer.apply(theirs, images, method="encode")
        features = tokenizer.apply(theirs, tokens, method="inputs")
        return adapters.with_hessians(module, module.apply, layers)(variables, labels, features)[1]

    hessians = by_hand(variables, pixels(batch["image"]), batch["label"])
    for path, found in state["hessians"].items():
        np.testing.assert_allclose(found, hessians[path], rtol=1e-3, atol=1e-3 * np.abs(hessians[path]).max())
    want = adapters.quantise(variables, layers, where=in_blocks, method="gptq", hessians=state["hessians"])
    same(packed_generator(params["generator"]["generator"], now["int4"]), want)
    changed = [np.mean(np.asarray(now["int4"][p]["values"] != values["int4"][p]["values"])) for p in now["int4"]]
    assert min(changed) > 0.01 and metrics["nll"] == loss


@pytest.mark.numeric
def test_it_is_evaluated_with_its_own_weights(params, batch, rounded):
    stage = CONFIG.recipe().stage("int4")
    got = jax.jit(lambda values: stage.eval_loss(values, (), batch, KEY, params))(rounded[0])
    _, layers = unrolled()
    floats = adapters.dequantise(packed_generator(params["generator"]["generator"], rounded[0]["int4"]), layers)
    plain = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, scan_layers=False))
    frozen = {"tokenizer": params["tokenizer"]}
    base = jax.jit(lambda v: generator_stage(plain).eval_loss({"generator": v}, (), batch, KEY, frozen))
    for want, close in ((base(floats), True), (base(adapters.unstack_layers(params["generator"]["generator"])), False)):
        assert np.isclose(got["loss"], want["loss"], rtol=1e-5) == close
        assert got.keys() == want.keys()


def test_rounding_to_nearest_needs_no_data(params, batch):
    stage = int4_stage(dataclasses.replace(CONFIG, int4=Int4Config(method="rtn", steps=1)))
    values, state = jax.jit(stage.init)(KEY, params)
    assert state == () and stage.after_update is None
    loss, (metrics, state) = stage.loss(values, state, batch, KEY, 0, params)
    assert loss == 0 and metrics == {} and state == ()


@pytest.mark.numeric
def test_samples_are_those_of_the_rounded_weights(params, rounded):
    recipe = CONFIG.recipe()
    labels, key, settings = np.array([1, 10, 3], np.int32), jax.random.key(1), dict(cfg=2.0, top_p=0.9)
    before = NextScaleSampler._sample._cache_size()
    made = recipe.sample(params | {"int4": rounded[0]}, key, labels, **settings)
    again = recipe.sample(params | {"int4": jax.tree.map(jnp.copy, rounded[0])}, key, labels, **settings)
    assert NextScaleSampler._sample._cache_size() == before + 1
    same(made, again)
    module, layers = unrolled()
    floats = adapters.dequantise(packed_generator(params["generator"]["generator"], rounded[0]["int4"]), layers)
    plain = NextScaleSampler(generator=module, tokenizer=CONFIG.build_tokenizer())
    variables = {"generator": floats, "tokenizer": params["tokenizer"]["tokenizer"]}
    images, tokens = plain(variables, key, labels, Settings(**settings))
    np.testing.assert_array_equal(made["tokens"], tokens)
    np.testing.assert_allclose(made["images"], images, atol=1e-4)


def test_new_weights_are_packed_and_old_ones_are_not_packed_again(params, rounded, monkeypatch):
    from jaxgen.recipes import quantised

    calls = []
    monkeypatch.setattr(quantised, "packed_generator", lambda *args: calls.append(args) or len(calls))
    sampler = CONFIG.build_sampler()
    monkeypatch.setitem(sampler.__dict__, "_sampler", lambda packed, *args: packed["generator"])
    first = {"generator": params["generator"]["generator"], "tokenizer": {}, "int4": rounded[0]["int4"]}
    assert sampler(first, KEY, [0]) == sampler(dict(first), KEY, [0]) == 1
    assert sampler(first | {"int4": dict(first["int4"])}, KEY, [0]) == 2
    assert sampler == CONFIG.build_sampler() and hash(sampler) == hash(CONFIG.build_sampler())


def test_weights_that_do_not_fit(params, rounded):
    recipe, labels = CONFIG.recipe(), np.array([1])
    with pytest.raises(ValueError, match="no 4-bit weights: the stage 'int4' is missing, there are generator, tokenizer"):
        recipe.sample(params, KEY, labels)
    values = rounded[0]["int4"]
    path = next(iter(values))
    for wrong, words in (
        ({"transformer/blocks_9/mlp/fc1": values[path]}, "there is no layer transformer/blocks_9/mlp/fc1: blocks_9"),
        ({path: jax.tree.map(lambda x: x[:, :3], values[path])}, rf"int4: {path} is \[16, 3\] and the generator's kernel"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.sample(params | {"int4": {"int4": wrong}}, KEY, labels)
    image = pixels(digits("test")[0]["image"])
    with pytest.raises(ValueError, match="smaller than a token"):
        recipe.sample(params | {"int4": rounded[0]}, KEY, labels, image=image, keep=box_mask((0.4, 0.4, 0.45, 0.45)))


def test_trained_saved_and_sampled(params, tmp_path):
    """Given a tokenizer and a generator, the stage runs in the loop, and what it saved is what samples."""
    for name, weights in params.items():
        save_params(tmp_path, name, weights)
    recipe = CONFIG.recipe().override(["tokenizer_train.steps=0", "model_train.steps=0"])
    results = train(recipe, tmp_path, run=recipe.config.run, log=lambda line: None)
    assert results["int4"].step == 2 and results["int4"].metrics["loss"] == results["int4"].metrics["nll"]
    loaded, _ = load_params(tmp_path, "int4")
    same(loaded, jax.device_get(results["int4"].params))
    opened, weights = cli.open_workdir(tmp_path)
    assert opened.config == recipe.config
    got, want = (recipe.sample(w, KEY, np.array([0, 4])) for w in (weights, {n: r.params for n, r in results.items()}))
    same(got, want)


@pytest.mark.parametrize("variant", MARLIN.VARIANTS)
def test_every_variant_is_vars_with_one_more_stage(variant):
    recipe = MARLIN.get_config(variant)
    base = MARLIN.var.get_config(MARLIN.VARIANTS[variant])
    assert [stage.name for stage in recipe.stages] == [*(stage.name for stage in base.stages), "int4"]
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    for field in dataclasses.fields(NextScaleConfig):
        assert getattr(recipe.config, field.name) == getattr(base.config, field.name)
    assert recipe.stages[-1].steps > 0 and recipe.config.int4.group_size == 128


def test_the_published_size_fits_the_kernels():
    """Every layer of a block of d30 is packed in words that both kernels take."""
    from kernels_pallas import target
    from kernels_pallas.int4 import Problem, hopper, pack_int4, tpu

    config = MARLIN.get_config("paper").config
    assert config.model.depth == 30 and config.model.dtype == "bfloat16"
    for k, n in ((1920, 5760), (1920, 1920), (1920, 7680), (7680, 1920)):
        for kind, backend in (("v5e", tpu), ("h100", hopper)):
            with target(kind) as device:
                w = jax.eval_shape(lambda w: pack_int4(w, 128), jax.ShapeDtypeStruct((k, n), jnp.float32))
                problem = Problem(16, k, n, 128, w.tile, w.layout, "bfloat16", "bfloat16")
                assert backend.refuses(problem, device) is None


@pytest.mark.parametrize(
    "edit, words",
    [
        ("int4.method=awq", "int4.method='awq': expected one of rtn, gptq"),
        ("int4.clip=best", "int4.clip='best': expected one of max, mse"),
        ("int4.group_size=4", "int4.group_size=4: expected at least 8"),
        ("int4.damp=-1.0", "int4.damp=-1.0: expected at least 0"),
    ],
)
def test_fields_are_checked(edit, words):
    with pytest.raises(ValueError, match=words):
        MARLIN.get_config("smoke").override([edit])


def test_the_head_is_rounded_on_request_and_groups_are_not_too_small(params):
    edits = ["int4.head=true", "int4.method=rtn"]
    with pytest.raises(ValueError, match="int4.group_size=128: a scale of word_embed would have 4 of 4 inputs"):
        jax.eval_shape(CONFIG.recipe().override(edits).stage("int4").init, KEY, params)
    unknown = "variant 'huge' is not one of smoke, demo, small, paper"
    with pytest.raises(ValueError, match=unknown):
        MARLIN.get_config("huge")


def test_options_reach_the_rounding(params):
    def values(*edits):
        stage = CONFIG.recipe().override(["int4.method=rtn", *edits]).stage("int4")
        return jax.jit(stage.init)(KEY, params)[0]["int4"]["transformer/blocks_0/mlp/fc2"]

    usual = values()
    assert values("int4.group_size=16")["scales"].shape[0] == 4 * usual["scales"].shape[0]
    assert (values("int4.clip=max")["values"] != usual["values"]).any()


@pytest.mark.slow  # a whole system, trained or measured
def test_precisions_are_compared(params, rounded, monkeypatch):
    """Training, judging and timing are stubs; bytes, likelihood and agreement are measured."""
    seen = types.SimpleNamespace(given=[], judged=[])

    def trained(config, seed, given, log):
        seen.given.append(sorted(given))
        recipe = config.recipe()
        return recipe, params | {"int4": rounded[0], "classifier": {"classifier": {}}}, {}

    def judged(recipe, weights, key, *, num, batch_size, settings):
        seen.judged.append((type(recipe.config).__name__, "int4" in weights, num, settings["cfg"]))
        return {"generation": {"class_accuracy": 0.5, "frechet": 2.0}}, None

    monkeypatch.setattr(claims, "train_all", trained)
    monkeypatch.setattr(claims, "seconds_an_image", lambda systems, batch: [1.0 / batch] * len(systems))
    monkeypatch.setattr(quantised_claims, "evaluate_images", judged)
    claim = quantised_claims.compare_precisions(CONFIG, seeds=2, samples=30, batches=(1, 4), log=lambda line: None)
    assert seen.given == [[], ["classifier", "tokenizer"]]
    one = [("NextScaleConfig", False, 30, 0.0), ("QuantisedConfig", True, 30, 0.0), ("QuantisedConfig", True, 30, 0.0)]
    assert seen.judged == one * 2
    half, nearest, gptq = claim.rows
    assert [row["weights"] for row in claim.rows] == ["bfloat16", "4 bits, groups of 128, nearest", "4 bits, groups of 128, GPTQ"]
    assert half["bits a weight"] == 16 and nearest["bits a weight"] == gptq["bits a weight"] < 12
    numbers = [float(row["agreement"].split()[0]) for row in claim.rows]
    assert 1 > numbers[0] > numbers[1] == numbers[2] > 0.5
    assert len({row["test nll"] for row in claim.rows}) == 2 and half["ms/image, batch 4"] == 250.0
    ratio = half["MB a model call"] / gptq["MB a model call"]
    assert f"reads {ratio:.2f} times fewer bytes" in claim.notes and "by 'xla'" in claim.notes
    with pytest.raises(ValueError, match="seeds=0"):
        quantised_claims.compare_precisions(CONFIG, seeds=0, samples=1, batches=(1,), log=print)


def test_a_layer_alone():
    claim = quantised_claims.layer_speed(size=256, rows=(1, 8), log=lambda line: None, repeats=2)
    one, eight = claim.rows
    assert [row["rows"] for row in claim.rows] == [1, 8]
    weights, packed = 256 * 256 * 2, 256 * 256 // 2 + 2 * 256 * 2
    assert one["bytes ratio"] == round((weights + 1024) / (packed + 1024), 2) > eight["bytes ratio"]
    assert all(row["speedup"] == pytest.approx(row["bf16 ms"] / row["int4 ms"], rel=0.1) for row in claim.rows)
    assert "Measured on cpu by 'xla'" in claim.notes and "This is a CPU" in claim.notes


def test_the_claim_is_of_the_demo(monkeypatch):
    seen = {}
    monkeypatch.setattr(quantised_claims, "compare_precisions", lambda config, **kw: seen.update(config=config, **kw) or "one")
    monkeypatch.setattr(quantised_claims, "layer_speed", lambda **kw: seen.update(layer=kw) or "two")
    assert MARLIN.claim("small", seeds=2, edits=["int4.group_size=64"]) == ["one", "two"]
    assert seen["config"] == MARLIN.get_config("demo").override(["int4.group_size=64"]).config
    assert seen["seeds"] == 2 and seen["batches"] == (1, 8, 32) and seen["layer"]["size"] == 8192
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        MARLIN.claim("huge")
