"""configs/cspd.py: published sizes, a few images learnt by heart, the claim's table."""

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
from jaxgen.recipes import claims, masked_latent_claims
from jaxgen.recipes.masked_latent import LATENT_RULES, LatentModelConfig, LatentTokenizerConfig, SpeculationConfig
from jaxgen.tokenizers.latents import LatentTokenizer
from jaxgen.train.mesh import AXES, shardings

CSPD = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / "cspd.py"))


def size(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", CSPD.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    recipe = CSPD.get_config(variant)
    assert [stage.name for stage in recipe.stages if stage.name != "tokenizer"][:2] == ["generator", "draft"]
    assert config_lib.from_json(config_lib.to_json(recipe.config)) == recipe.config
    with pytest.raises(ValueError, match="variant 'huge' is not one of smoke, small, paper"):
        CSPD.get_config("huge")


def test_published_sizes():
    """943 M and 208 M parameters (Li et al.'s released models), 256 tokens of 16 numbers; placed over the mesh's axes."""
    recipe = CSPD.get_config("paper")
    config = recipe.config
    tokenizer = config.build_tokenizer()
    assert (tokenizer.length, tokenizer.token_channels) == (256, 16)
    shapes = {}
    for name in ("tokenizer", "generator", "draft"):
        frozen = {key: shapes[key] for key in recipe.stage(name).needs}
        shapes[name] = jax.eval_shape(recipe.stage(name).init, jax.random.key(0), frozen)[0]
    assert size(shapes["generator"]) / 1e6 == pytest.approx(943, abs=1)
    assert size(shapes["draft"]) / 1e6 == pytest.approx(208, abs=1)
    placed = shardings(AbstractMesh((1, 4, 2, 1), AXES, axis_types=(AxisType.Auto,) * 4), shapes["generator"], LATENT_RULES)
    split = jax.tree.leaves(jax.tree.map(lambda leaf, s: math.prod(leaf.shape) * any(s.spec), shapes["generator"], placed))
    assert sum(split) > 0.95 * size(shapes["generator"])
    images = jax.eval_shape(lambda p: recipe.sample(p, jax.random.key(0), jnp.zeros((2,), jnp.int32)), shapes)["images"]
    assert images.shape == (2, 256, 256, 3)


@pytest.mark.parametrize("features", [0, 3])
def test_latents_are_cut_in_rows_and_joined_again(features):
    sizes = dict(ch=8, ch_mult=(1, 2), res_blocks=1, groups=4) if features else {}
    module = LatentTokenizer(image_size=8, channels=1, patch=2, features=features, shift=-0.2, scale=1.7, **sizes)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)), jnp.float32)
    variables = jax.jit(module.init)(jax.random.key(0), images, jax.random.key(0)) if features else {}
    tokens = jax.jit(lambda v, x: module.apply(v, x, method="encode"))(variables, images)
    assert tokens.shape == (2, module.length, module.token_channels) == (2, *((4, 12) if features else (16, 4)))
    if not features:
        block = images[:, 2:4, 4:6, 0].reshape(2, 4)  # second row, third column
        np.testing.assert_allclose(tokens[:, 6], (block + 0.2) * 1.7, rtol=1e-5)
        np.testing.assert_allclose(module.apply({}, tokens, method="decode"), images, atol=1e-6)
        return
    # The mean, cut and put together again, is decoded as it is; training adds noise to it.

    @jax.jit
    def run(variables):
        bound = module.bind(variables)
        mean, log_variance = bound.moments(images)
        want = jnp.clip(bound.decoder(bound.from_features(mean)), -1, 1)
        return mean, log_variance, want, bound.decode(tokens), *bound(images, jax.random.key(1))

    mean, log_variance, want, decoded, output, kl = run(variables)
    np.testing.assert_allclose(decoded, want, atol=1e-4)
    assert np.abs(np.asarray(jnp.clip(output, -1, 1) - want)).max() > 1e-3
    terms = 0.5 * (np.square(mean) + np.exp(log_variance) - 1 - np.asarray(log_variance))
    np.testing.assert_allclose(kl, terms.reshape(2, -1).sum(1), rtol=1e-4)


@pytest.fixture(scope="module")
def learnt():
    """Four digits learnt by heart: the recipe, and parameters before and after."""
    edits = ["model.width=32", "model.head_width=32", "model_train.repeats=8", "classifier.steps=0", "speculation.drafts=0"]
    base = CSPD.get_config("smoke").override([*edits, "speculation.steps=16", "speculation.chain_steps=12"]).config
    config = dataclasses.replace(base, num_classes=4)
    source, recipe = digits("train"), config.recipe()
    first = [np.flatnonzero(source.labels == label)[0] for label in range(4)]
    batch = {"image": jnp.tile(jnp.asarray(source.images[first]), (8, 1, 1, 1)), "label": jnp.tile(jnp.arange(4), 8)}
    stage, optimizer = recipe.stage("generator"), optax.adam(optax.cosine_decay_schedule(8e-3, 250))
    start, _ = stage.init(jax.random.key(0), {})

    @jax.jit
    def train(params):
        def update(i, carry):
            params, state, _ = carry
            key = jax.random.fold_in(jax.random.key(1), i)
            value, grads = jax.value_and_grad(lambda p: stage.loss(p, (), batch, key, i, {})[0])(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        return jax.lax.fori_loop(0, 250, update, (params, optimizer.init(params), 0.0))

    params, _, loss = train(start)
    return recipe, {"generator": start}, {"generator": params}, float(loss), pixels(batch["image"][:4])


@pytest.mark.slow
def test_a_few_images_are_learnt_and_drawn_by_class(learnt):
    recipe, before, after, loss, images = learnt
    labels = np.arange(32) % 4

    def shares(params):
        """How many samples lie nearest to the image of their class."""
        drawn = recipe.sample(params, jax.random.key(2), labels)["images"]
        distance = jnp.square(drawn[:, None] - images[None]).sum((2, 3, 4))
        return float((distance.argmin(1) == labels).mean()), float(jnp.sqrt(distance.min(1) / 64).mean())

    assert shares(before)[0] < 0.6
    share, error = shares(after)
    assert share > 0.9 and error < 0.35, (share, error, loss)


def test_sampling_refuses_truncation(learnt):
    recipe, _, params, *_ = learnt
    for option, value in (("top_k", 5), ("top_p", 0.9)):
        with pytest.raises(ValueError, match=f"{option}={value}: continuous tokens"):
            recipe.sample(params, jax.random.key(2), np.arange(2), **{option: value})
    images = recipe.sample(params, jax.random.key(2), np.arange(2), top_p=recipe.top_p)["images"]
    assert np.isfinite(images).all()


@pytest.mark.parametrize("name", ["cspd", "ecar", "flowar", "himar", "xar", "var", "nar", "jpeg_lm"])
def test_scripts_truncate_discrete_tokens_alone(name):
    recipe = cli.load_config_file(str(Path(__file__).parents[2] / "configs" / f"{name}.py")).get_config("smoke")
    assert recipe.top_p == (0.96 if hasattr(recipe.config.build_tokenizer(), "vocab") else 0)


@pytest.mark.slow
def test_training_dropout_and_dropped_labels_matter(learnt):
    recipe, _, params, _, images = learnt
    batch = {"image": np.asarray((images + 1) * 127.5, np.uint8), "label": np.arange(4)}

    def loss(edits, key=0):
        stage = recipe.override(edits).stage("generator")
        return float(stage.loss(params["generator"], (), batch, jax.random.key(key), 0, {})[0])

    plain = loss(["model_train.class_drop=0.0"])
    others = [["model_train.class_drop=1.0"], ["model.dropout=0.5"], ["model_train.least_masked=1.0"], ["model_train.repeats=1"]]
    for edits in others:
        assert abs(loss(["model_train.class_drop=0.0", *edits]) - plain) > 1e-5  # all else is equal to the bit


def test_bad_configurations():
    config = CSPD.get_config("smoke").config
    with pytest.raises(ValueError, match="tokenizer.image_size=16: the images of data.path=digits are 8x8"):
        dataclasses.replace(config, tokenizer=LatentTokenizerConfig(image_size=16)).resolve()
    with pytest.raises(ValueError, match="num_classes=3: digits has 10 classes"):
        dataclasses.replace(config, num_classes=3).resolve()
    assert config.resolve().num_classes == 10
    for make, match in (
        (lambda: SpeculationConfig(prefill=2.0), "speculation.prefill=2.0"),
        (lambda: LatentModelConfig(dtype="float8"), "model.dtype='float8'"),
        (lambda: LatentTokenizerConfig(scale=0.0), "tokenizer.scale=0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


@pytest.mark.slow
def test_the_claim(monkeypatch):
    """The table of the smoke budget, nothing trained: who is compared, and what the columns count."""

    def untrained(config, seed, given, log):
        recipe = config.recipe()
        params = {stage.name: jax.jit(stage.init)(jax.random.key(seed), {})[0] for stage in recipe.stages}
        return recipe, params, {}

    monkeypatch.setattr(claims, "train_all", untrained)
    monkeypatch.setattr(masked_latent_claims, "_seconds", lambda *args: 0.5)
    (claim,) = CSPD.claim("smoke", seeds=1, log=lambda line: None)
    target, draft, ours, tempered, fewer = claim.rows
    assert [row["sampler"] for row in claim.rows[:4]] == ["target alone", "draft alone", "2 drafts", "2 drafts, temperature 42"]
    assert target["calls"] == draft["calls"] == target["states"] == 6 and math.isnan(target["accepted"])
    # Both start from the same chain, whatever their features: a draft without training is a perfect one.
    assert ours["accepted"] == tempered["accepted"] == 1 and ours["calls"] == 1 + 2
    assert ours["states"] == 1 + 2 * 3 and ours["paths a checked token"] == 0
    assert fewer["calls"] == 3 and fewer["sampler"] == "target alone, 3 steps"
    assert all(0 <= row["class accuracy"] <= 1 and row["Frechet"] > 0 for row in claim.rows)
    with pytest.raises(ValueError, match="budget 'huge'"):
        CSPD.claim("huge")
    with pytest.raises(ValueError, match="seeds=0"):
        CSPD.claim("smoke", seeds=0, log=print)
