"""ARRA as a recipe: the loss by hand with any encoder, the model it is compared with, variants, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import arra, llamagen
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.recipes.aligned import aligned_stage, unaligned
from jaxgen.recipes.features import feature_stage
from jaxgen.recipes.image_llama import ImageLlamaConfig

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0", "align.weight=0.7")


@pytest.mark.numeric
def test_stage_with_any_encoder(randomize):
    config = config_lib.override(arra.build("smoke"), SHAPE)
    recipe, tokenizer, generator = config.recipe(), config.build_tokenizer(), config.build_generator()
    base, calls = recipe.stage("generator"), []
    assert [stage.name for stage in recipe.stages] == ["tokenizer", "encoder", "generator", "classifier"]
    assert base.needs == ("tokenizer", "encoder")

    def describe(variables, images):
        calls.append(sorted(variables))
        return images.reshape(len(images), -1)[:, : config.features.width]

    stage = aligned_stage(config, dataclasses.replace(base, needs=("tokenizer",)), describe, needs=())
    abstract = jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    frozen = {"tokenizer": {"tokenizer": jax.device_put(randomize(abstract))}}
    abstract, _ = jax.eval_shape(stage.init, jax.random.key(0), frozen)
    params = jax.device_put(randomize(abstract, seed=1))
    source = digits("train")
    batch = {"image": jnp.asarray(source.images[:4]), "label": jnp.asarray(source.labels[:4])}
    value, (metrics, _) = jax.jit(stage.loss)(params, (), batch, jax.random.key(0), 0, frozen)
    assert calls == [["tokenizer"]]

    @jax.jit
    def by_hand():
        tokens = tokenizer.apply(frozen["tokenizer"]["tokenizer"], pixels(batch["image"]), method="encode")
        return tokens, *generator.apply(params["generator"], batch["label"], tokens, method="aligned")

    tokens, logits, told = (np.asarray(x) for x in by_hand())
    probs = np.exp(np.float64(logits))
    nll = -np.log(np.take_along_axis(probs / probs.sum(-1, keepdims=True), tokens[..., None], -1)).mean()
    wanted = np.asarray(pixels(batch["image"])).reshape(4, 1, -1)[..., : config.features.width]
    lengths = np.linalg.norm(told, axis=-1) * np.linalg.norm(wanted, axis=-1)
    cosine = ((told * wanted).sum(-1) / lengths).mean()
    assert metrics["alignment"] == pytest.approx(cosine, abs=1e-5)
    assert metrics["nll"] == pytest.approx(nll, rel=1e-4)
    assert value == pytest.approx(nll + 0.7 * (1 - cosine), rel=1e-4)


@pytest.mark.numeric
def test_the_encoder_says_what_the_whole_is(randomize):
    config = arra.build("smoke")
    stage = feature_stage(config.features, config.features_train, config.data)
    abstract, _ = jax.eval_shape(stage.init, jax.random.key(0), {})
    variables = {"encoder": jax.device_put(randomize(abstract["encoder"]))}
    images = pixels(digits("test").images[:2])
    got = jax.jit(config.describe)(variables, images)
    want = jax.jit(config.features.build(1).apply)(variables["encoder"], images)
    np.testing.assert_allclose(got, want[:, 0], atol=1e-5)
    assert np.abs(jax.jit(jax.grad(lambda x: config.describe(variables, x).sum()))(images)).max() == 0


def test_the_model_that_it_is_compared_with():
    config = arra.build("small")
    plain = unaligned(config)
    assert type(plain) is ImageLlamaConfig and plain.model == config.model and plain.tokenizer == config.tokenizer
    assert plain == arra.digits("small")


@pytest.mark.parametrize("variant", arra.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = arra.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    shapes = config.build_generator().param_shapes()["params"]
    assert shapes["align_fc2"]["kernel"].shape == (config.features.width,) * 2
    if variant == "paper":
        base = llamagen.build("paper")
        assert config.model == dataclasses.replace(base.model, scan_layers=False) and config.model_train == base.model_train
        encoder = config.features.build(3)
        assert (encoder.patch, encoder.positions, config.features.grid, encoder.width) == (14, 37, 16, 768)


@pytest.mark.parametrize(
    "edit, message",
    [
        ("align.after=3", "align.after=3: the model has model.depth=2 blocks"),
        ("align.after=0", "align.after=0"),
        ("features.registers=-1", "features.registers=-1: expected at least 0"),
        ("align.weight=-1", "align.weight=-1"),
        ("model.scan_layers=true", "model.scan_layers=True: hidden states between blocks"),
        ("tokenizer.patch_nums=2,4", "next-token models take one scale"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(arra.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'huge' is not one of smoke, small, paper"):
        arra.get_config("huge")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        arra.claim("huge")


@pytest.mark.slow  # it trains a tokenizer, an encoder, a classifier and two generators
def test_the_claim_at_its_smallest():
    (claim,) = arra.claim("smoke", seeds=1, log=lambda line: None)
    ours, plain = claim.rows
    assert ours["system"] == "S029 ARRA" and ours["parameters M"] > plain["parameters M"]
    assert ours["model calls"] == plain["model calls"] == 16
