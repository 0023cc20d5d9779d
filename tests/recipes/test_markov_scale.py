"""The scale-Markov recipe: what an update takes, with which weights; S085's configuration and claim."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.data import pixels
from jaxgen.orders import scales
from jaxgen.recipes import claims, markov_scale_claims
from jaxgen.recipes.markov_scale import MarkovConfig, token_weights
from jaxgen.recipes.next_scale import generator_stage, param_shapes, plain
from jaxgen.train import train

MVAR = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "mvar.py"))
CONFIG = MVAR.get_config("smoke").override(["classifier.steps=0", "model_train.class_drop=0.0"]).config
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def grads_of(params, batch):
    """(loss, metrics, gradients) of an update."""

    def run(config, steps):
        stage = generator_stage(config)

        @jax.jit
        def one(step):
            frozen = {"tokenizer": params["tokenizer"]}
            value = jax.value_and_grad(lambda p: stage.loss(p, (), batch, KEY, step, frozen), has_aux=True)
            return value(params["generator"])

        return [jax.device_get(one(step)) for step in steps]

    return run


def with_markov(**fields):
    return dataclasses.replace(CONFIG, markov=dataclasses.replace(CONFIG.markov, **fields))


@pytest.mark.numeric
def test_groups_take_turns_and_add_up(params, batch, grads_of):
    """Two updates of the first two scales, one of the third, and so on; the groups' losses and gradients sum to the whole's."""
    assert CONFIG.groups() == ((0, 2), (2, 3)) and with_markov(packed=0).groups() == ((0, 3),)
    a, b, c, d = grads_of(CONFIG, range(4))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(np.testing.assert_array_equal, a, d)
    (whole,) = grads_of(with_markov(packed=0), [0])
    assert a[0][0] + c[0][0] == pytest.approx(whole[0][0], rel=1e-5)
    jax.tree.map(lambda x, y, z: np.testing.assert_allclose(x + y, z, atol=2e-5), a[1], c[1], whole[1])

    tokenizer, generator = CONFIG.build_tokenizer(), CONFIG.build_generator()

    @jax.jit
    def by_hand():
        variables = params["tokenizer"]["tokenizer"]
        tokens = tokenizer.apply(variables, pixels(batch["image"]), method="encode")
        inputs = tokenizer.apply(variables, tokens, method="inputs")
        return tokens, generator.apply(params["generator"]["generator"], batch["label"], inputs)

    tokens, logits = jax.device_get(by_hand())
    log_p = np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    assert a[0][0] == pytest.approx(nll[:, :5].sum() / 21 / 8, rel=1e-4)
    assert c[0][0] == pytest.approx(nll[:, 5:].sum() / 21 / 8, rel=1e-4)
    for (_, (metrics, _)), start, last, stop in ((a[0], 0, 1, 5), (c[0], 5, 5, 21)):
        assert metrics["nll"] == pytest.approx(nll[:, start:stop].mean(), rel=1e-4)
        assert metrics["nll_last_step"] == pytest.approx(nll[:, last:stop].mean(), rel=1e-4)


def test_turns():
    """k updates of the packed scales, then one of each other."""
    config = dataclasses.replace(with_markov(packed=1, turns=3), model_train=CONFIG.model_train)
    seen = []

    def predict(inputs, *, scales):
        seen.append((scales, inputs.shape[1]))
        return jnp.zeros((1, {(0, 1): 1, (1, 2): 4, (2, 3): 16}[scales], 16))

    args = (jnp.zeros((1, 21), jnp.int32), jnp.zeros((1, 20, 4)))
    loss = jax.jit(lambda step: config.objective(predict, *args, step)[0])
    losses = [float(loss(step)) for step in range(6)]
    np.testing.assert_allclose(losses, np.array([1, 1, 1, 4, 16, 1]) / 21 * math.log(16), rtol=1e-5)
    assert set(seen) == {((0, 1), 0), ((1, 2), 4), ((2, 3), 16)}


def test_weights_of_scales():
    """By hand, for sides 1, 2 and 4: ratios 1/4, 1/2 and 1 with mean 7/12 and standard deviation sqrt(7/48)."""
    order = scales((1, 2, 4))
    np.testing.assert_allclose(token_weights(order, "tokens"), np.full(21, 1 / 21), rtol=1e-6)
    z = [(r - 7 / 12) / math.sqrt(7 / 48) for r in (1, 1 / 2, 1 / 4)]  # of the scales in reverse
    raw = [math.exp(-x * x / 2) for x in z]
    want = [w / sum(raw) / n for w, n in zip(raw, (1, 4, 16)) for _ in range(n)]
    np.testing.assert_allclose(token_weights(order, "normal"), want, rtol=1e-5)
    assert token_weights(scales((3,)), "normal").sum() == pytest.approx(1)


def test_weights_and_smoothing_change_the_loss():
    base, normal = with_markov(packed=0), with_markov(packed=0, weights="normal")
    smooth = dataclasses.replace(base, model_train=dataclasses.replace(base.model_train, label_smoothing=0.3))
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((1, 21, 16)), jnp.float32)
    args = (lambda inputs, scales: logits, jnp.zeros((1, 21), jnp.int32), jnp.zeros((1, 20, 4)), 0)
    log_p = np.asarray(jax.nn.log_softmax(logits))[0]
    nll = -log_p[:, 0]
    want = (nll.mean(), (nll * token_weights(scales((1, 2, 4)), "normal")).sum(), 0.7 * nll.mean() - 0.3 * log_p.mean())
    got = [float(config.objective(*args)[0]) for config in (base, normal, smooth)]
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_variants():
    for variant in MVAR.VARIANTS:
        config = MVAR.get_config(variant).config
        assert config_lib.from_json(config_lib.to_json(config)) == config
        shapes, width = config.build_generator().param_shapes(config.tokenizer.width), config.tokenizer.width
        assert jax.tree.structure(shapes) == jax.tree.structure(plain(config).build_generator().param_shapes(width))
    with pytest.raises(ValueError, match="variant 'd17' is not one of smoke, demo, small, paper"):
        MVAR.get_config("d17")


def test_the_published_model():
    """The authors' command for d16, and the defaults of their arguments."""
    config = MVAR.get_config("paper").config
    shapes = param_shapes(config.build_sampler())["generator"]
    assert round(sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) / 1e6) == 310
    generator, train_, updates = config.build_generator(), config.model_train, math.ceil(1_281_167 / 448)
    assert (generator.window, generator.since, config.groups()) == (7, 8, ((0, 8), (8, 9), (9, 10)))
    assert (train_.batch_size, train_.steps, train_.optim.warmup_steps) == (448, 300 * updates, 6 * updates)
    assert train_.optim.lr == pytest.approx(1e-4 * 448 / 256) and config.markov.turns == 8
    assert config.data.flip and config.data.mid_scale == 1.0
    assert generator.order.ends[7] == 255  # tokens of the packed scales (appendix B)
    seen = generator.mask.dense().sum(axis=1)
    assert set(seen[255:]) == {49} and seen[155] == 100


def test_bad_configurations():
    for field, value in (("window", 4), ("window", -1), ("since", -1), ("packed", -1), ("turns", 0), ("weights", "log")):
        with pytest.raises(ValueError, match=f"markov.{field}={value!r}".replace("(", r"\(")):
            MarkovConfig(**{field: value})
    for edit, message in (
        ("markov.packed=4", "markov.packed=4: tokenizer.patch_nums=.* has 3 scales"),
        ("markov.since=4", "markov.since=4: tokenizer.patch_nums=.* has 3 scales"),
        ("tokenizer.patch_nums=1,4,4", r"patch_nums \(1, 4, 4\) must increase"),
    ):
        with pytest.raises(ValueError, match=message):
            config_lib.override(CONFIG, [edit])
    with pytest.raises(ValueError, match="images of 8x8 .* take 10x10"):
        config_lib.override(CONFIG, ["tokenizer.patch_nums=1,2,5"]).resolve()


def test_the_claim_compares_equals(monkeypatch):
    seen = {}
    monkeypatch.setattr(claims, "compare_generators", lambda systems, **kwargs: seen.update(systems=systems, **kwargs))
    monkeypatch.setattr(markov_scale_claims, "compare_updates", lambda systems, width, **kwargs: seen.update(updates=systems))
    monkeypatch.setattr(markov_scale_claims, "compare_windows", lambda sides, window, **kwargs: seen.update(window=window))
    assert len(MVAR.claim("small", seeds=2, edits=["model.width=64"], log=print)) == 3
    var, ours, together = seen["systems"].values()
    assert seen["seeds"] == 2 and plain(ours) == plain(together) == var and var.model.width == 64
    assert ours.groups() == ((0, 3), (3, 4)) and together.groups() == ((0, 4),)
    groups = [group for _, group in seen["updates"].values()]
    assert groups == [None, None, (0, 8), (8, 9), (9, 10)] and seen["window"] == 7
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        MVAR.claim("huge")


@pytest.mark.numeric
def test_the_tables():
    config = with_markov()
    systems = {"last": (config.build_generator(), (2, 3))}
    rows = markov_scale_claims.compare_updates(systems, 4, depth=1, repeats=1, log=lambda line: None).rows
    assert [(row["block-sparse"], row["tokens"]) for row in rows] == [("off", 16), ("on", 16)]
    assert all(row["GFLOP"] > 0 and row["MB read and written"] > 0 and row["ms"] > 0 for row in rows)
    row = markov_scale_claims.compare_windows([5], 3, repeats=1, log=lambda line: None, heads=1, head_size=4).rows[0]
    assert (row["positions"], row["pairs, all"], row["pairs, windows"]) == (25, 625, 225)


# The whole system is trained and sampled.
@pytest.mark.slow
def test_training_and_sampling(tmp_path):
    recipe = CONFIG.recipe()
    results = train(recipe, str(tmp_path), run=recipe.config.run, log=print)
    params = {name: result.params for name, result in results.items()}
    images = recipe.sample(params, KEY, np.arange(10), cfg=1.5)["images"]
    assert images.shape == (10, 8, 8, 1) and np.isfinite(images).all()
