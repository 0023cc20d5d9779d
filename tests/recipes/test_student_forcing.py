"""S008: the refinement's loss by hand, on VAR and on FlexVAR; whose weights are sampled; what is refused."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sar
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.recipe import modules
from jaxgen.recipes import claims, student_forcing_claims
from jaxgen.recipes.student_forcing import RefineConfig

SIZES = ("tokenizer.ch=4", "tokenizer.groups=2", "model.width=16", "model.depth=1")
TINY = (*SIZES, "model_train.class_drop=0", "refine.weight=0.5")


def build(randomize, variant, *edits):
    config = config_lib.override(sar.build(variant), [*TINY, *edits])
    recipe, params = config.recipe(), {}
    for stage in ("tokenizer", "generator"):
        shapes, _ = jax.eval_shape(recipe.stage(stage).init, jax.random.key(0), params)
        params[stage] = jax.device_put(randomize(shapes, seed=len(stage)))
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:4]), "label": jnp.asarray(source.labels[:4])}
    return types.SimpleNamespace(config=config, recipe=recipe, params=params, batch=batch, images=pixels(batch["image"]))


@pytest.fixture(scope="module")
def var(randomize):
    return build(randomize, "smoke")


@functools.cache
def compiled(config, **changes):
    """The loss of the stage."""
    refine = dataclasses.replace(config.refine, **changes)
    return jax.jit(dataclasses.replace(config, refine=refine).recipe().stage("refine").loss)


def loss(system, key=0, **changes):
    run = compiled(system.config, **changes)
    value, (metrics, _) = run(system.params["generator"], (), system.batch, jax.random.key(key), 0, system.params)
    return float(value), {name: float(x) for name, x in metrics.items()}


def mean_nll(logits, tokens):
    log_p = np.float64(jax.nn.log_softmax(logits))
    return -np.take_along_axis(log_p, np.asarray(tokens)[..., None], -1).mean()


def test_the_loss_on_var_by_hand(var):
    """The truth up to a scale, the model's choice for it, and what the next scale then makes of that."""
    tokenizer, generator = var.config.build_tokenizer(), var.config.build_generator()
    order = tokenizer.order
    read = jax.jit(lambda p, *args, method: tokenizer.apply(p, *args, method=method), static_argnames="method")
    run = jax.jit(generator.apply)
    frozen, variables = var.params["tokenizer"]["tokenizer"], var.params["generator"]["generator"]
    tokens = read(frozen, var.images, method="encode")
    logits = run(variables, var.batch["label"], read(frozen, tokens, method="inputs"))
    made = np.asarray(logits).argmax(-1)
    parts = []
    for scale in range(order.steps - 1):
        start, end = order.span(scale)
        mixed = np.array(tokens)
        mixed[:, start:end] = made[:, start:end]  # later tokens are not read by the next scale
        following = order.span(scale + 1)
        parts.append(np.asarray(read(frozen, jnp.asarray(mixed), method="inputs"))[:, following[0] - 1 : following[1] - 1])
    student = run(variables, var.batch["label"], np.concatenate(parts, axis=1))
    value, metrics = loss(var)
    assert metrics["nll"] == pytest.approx(mean_nll(logits, tokens), rel=1e-4)
    assert metrics["student"] == pytest.approx(mean_nll(student[:, 1:], made[:, 1:]), rel=1e-4)
    assert value == pytest.approx(metrics["nll"] + 0.5 * metrics["student"], rel=1e-5)
    # Without weight there is no second pass, and what is left is the pretraining's loss.
    plain, metrics = loss(var, weight=0.0)
    assert set(metrics) == {"nll"} and plain == pytest.approx(mean_nll(logits, tokens), rel=1e-4)


def test_drawn_predictions_depend_on_every_setting(var):
    base = loss(var, draw=True, key=1)[1]["student"]
    others = [loss(var, draw=True, key=1, **change)[1]["student"] for change in (dict(cfg=4.0), dict(top_k=2), dict(top_p=0.3))]
    others += [loss(var, key=1)[1]["student"], loss(var, draw=True, key=2)[1]["student"]]
    assert len({round(x, 4) for x in [base, *others]}) == 6
    greedy = loss(var, draw=True, top_k=1, key=1)[1]["student"]
    assert greedy == pytest.approx(others[3], rel=1e-5)


def test_gradients_flow_through_both_passes_but_not_the_predictions(var):
    stage = var.recipe.stage("refine")

    @jax.jit
    def grads(params, weight):
        refine = dataclasses.replace(var.config.refine, weight=1.0)
        stage = dataclasses.replace(var.config, refine=refine).recipe().stage("refine")

        def of(params):
            _, (metrics, _) = stage.loss(params, (), var.batch, jax.random.key(0), 0, var.params)
            return metrics["nll"] + weight * metrics["student"]

        return jax.grad(of)(params)

    both, plain = (grads(var.params["generator"], w)["generator"]["params"] for w in (1.0, 0.0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(both))
    assert np.abs(both["head"]["head"]["kernel"] - plain["head"]["head"]["kernel"]).max() > 1e-4
    assert stage.needs == ("tokenizer", "generator")


def test_it_starts_from_the_trained_generator_and_is_what_samples(var):
    stage = var.recipe.stage("refine")
    params, state = stage.init(jax.random.key(0), var.params)
    jax.tree.map(np.testing.assert_array_equal, params["generator"], var.params["generator"]["generator"])
    assert state == () and [s.name for s in var.recipe.stages] == ["tokenizer", "generator", "refine", "classifier"]
    refined = {"generator": jax.tree.map(lambda x: x + 1, params["generator"])}
    assert modules(var.params | {"refine": refined})["generator"] is refined["generator"]
    metrics = jax.jit(stage.eval_loss)(params, (), var.batch, jax.random.key(0), var.params)
    assert metrics["loss"] == pytest.approx(loss(var, weight=0.0)[0], rel=1e-4)


def test_on_flexvar_the_rollout_is_the_predictions_themselves(randomize):
    """Without residuals a scale's input is the prediction for the one before it, whatever came earlier; on drawn lists."""
    flex = build(randomize, "flex_smoke", "tokenizer.z_channels=4", "lists.usual=1", "lists.drop=")
    tokenizer, generator = flex.config.build_tokenizer(), flex.config.build_generator()
    frozen, variables = flex.params["tokenizer"]["tokenizer"], flex.params["generator"]["generator"]

    @jax.jit
    def by_hand():
        tokens = tokenizer.apply(frozen, flex.images, method="encode")
        logits = generator.apply(variables, flex.batch["label"], tokenizer.apply(frozen, tokens, method="inputs"))
        made = logits.argmax(-1)
        inputs = tokenizer.apply(frozen, made, method="inputs")
        return tokens, logits, made, generator.apply(variables, flex.batch["label"], inputs)

    tokens, logits, made, student = by_hand()
    value, metrics = loss(flex)
    assert metrics["nll"] == pytest.approx(mean_nll(logits, tokens), rel=1e-4)
    assert metrics["student"] == pytest.approx(mean_nll(student[:, 1:], made[:, 1:]), rel=1e-4)
    assert value == pytest.approx(metrics["nll"] + 0.5 * metrics["student"], rel=1e-5)


@pytest.mark.parametrize("variant", sar.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = sar.get_config(variant)
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    assert [stage.name for stage in recipe.stages][:3] == ["tokenizer", "generator", "refine"]
    assert recipe.stage("refine").steps < recipe.stage("generator").steps


def test_the_published_refinement():
    config = sar.build("paper")
    updates = -(-1_281_167 // 768)
    assert config.refine.steps == 10 * updates and config.model.depth == 16 and config.refine.weight == 0.01
    assert not config.refine.draw and config.refine.optim.lr == pytest.approx(4.5e-5)
    assert config.refine.optim.lr * config.refine.optim.lr_end == pytest.approx(3e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(weight=-1.0), "refine.weight=-1.0"),
        (dict(cfg=1.0), r"refine.cfg=1.0, .* need refine.draw=true"),
        (dict(top_p=1.5, draw=True), "refine.top_p=1.5"),
        (dict(steps=-1), "refine.steps=-1"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        RefineConfig(**fields)


def test_the_claim_measures_var_and_flexvar(monkeypatch):
    seen = []

    def compare(config, *, title, **kwargs):
        seen.append((config, title, kwargs["seeds"]))
        return title

    monkeypatch.setattr(student_forcing_claims, "compare_refinements", compare)
    assert sar.claim("small", seeds=2, edits=["refine.weight=0.1"], log=print) == ["VAR, refined", "FlexVAR, refined"]
    assert [config.refine.weight for config, _, _ in seen] == [0.1, 0.1] and {seeds for _, _, seeds in seen} == {2}
    with pytest.raises(ValueError, match="budget 'huge'"):
        sar.claim("huge")
    with pytest.raises(ValueError, match="variant 'd17'"):
        sar.get_config("d17")


def test_what_the_claims_table_holds(monkeypatch):
    """One pretrained model a seed, whose weights both ways of training on start from; training and measuring are stubs."""
    config, calls = sar.build("smoke"), []

    def train_all(config, seed, given, log):
        calls.append((seed, config.refine.weight > 0, sorted(given)))
        params = {name: seed for name in ("tokenizer", "generator", "classifier")}
        return config.recipe(), params | {"refine": "refined" if config.refine.weight else "plain"}, {}

    def scores(recipe, params, samples, seed):
        return {"class accuracy": 0.5, "Frechet": {"refined": 2.0, "plain": 4.0}.get(params.get("refine"), 8.0) + seed}

    def seconds(systems, batch):
        return [1.0 / batch] * len(systems)

    def update_costs(recipe, params, *, stage):
        return {"update": (stage, recipe.config.refine.weight > 0)}

    monkeypatch.setattr(claims, "train_all", train_all)
    monkeypatch.setattr(claims, "seconds_an_image", seconds)
    monkeypatch.setattr(claims, "sampling_costs", lambda recipe, params: {"sampling": params.get("refine", "pretrained")})
    monkeypatch.setattr(claims, "update_costs", update_costs)
    monkeypatch.setattr(student_forcing_claims, "_scores", scores)
    claim = student_forcing_claims.compare_refinements(config, title="T", seeds=2, samples=10, log=lambda line: None)
    given = [[], ["classifier", "generator", "tokenizer"], ["classifier", "tokenizer"], ["classifier", "generator", "tokenizer"]]
    assert calls == list(zip((0, 0, 1, 1), (True, False) * 2, given))
    common = {"model calls": 3, "class accuracy": "0.5 (0)", "ms/image, batch 1": 1000.0, "ms/image, batch 64": 15.625}
    assert all(row.items() >= common.items() for row in claim.rows)
    assert [row["Frechet"] for row in claim.rows] == ["8.5 (1)", "4.5 (1)", "2.5 (1)"]
    assert [row["more updates"] for row in claim.rows] == [0, 6, 6]
    assert [row["sampling"] for row in claim.rows] == ["pretrained", "plain", "refined"]
    assert [row.get("update") for row in claim.rows] == [None, ("refine", False), ("refine", True)]
    with pytest.raises(ValueError, match="seeds=0: expected at least 1"):
        student_forcing_claims.compare_refinements(config, title="T", seeds=0, samples=10, log=print)


# Whole runs: that the stages of pretraining and refinement hand their weights on is seen in no smaller one.
@pytest.mark.slow
def test_the_smoke_claim():
    for table in sar.claim("smoke", seeds=1, log=lambda line: None):
        updates = [row["more updates"] for row in table.rows]
        assert updates == [0, 6, 6] and all(np.isfinite(float(row["Frechet"])) for row in table.rows)
        plain, ours = (row["update GFLOP/image"] for row in table.rows[1:])
        assert 1.5 < ours / plain < 2.2  # a second forward and backward pass
