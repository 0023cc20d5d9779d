"""SemAIM as a recipe: losses by hand, what orders the patches, published sizes, completions, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import semaim
from jaxgen import config as config_lib
from jaxgen.data import digits, pixels
from jaxgen.recipes.features import feature_stage
from jaxgen.recipes.semantic_patches import pretraining_stage

SOURCE = digits("train")
BATCH = {"image": jnp.asarray(SOURCE.images[:4]), "label": jnp.asarray(SOURCE.labels[:4])}


@pytest.fixture(scope="module")
def params(randomize):
    config = semaim.build("smoke")
    encoder = feature_stage(config.features, config.features_train, config.data)
    abstract, _ = jax.eval_shape(encoder.init, jax.random.key(0), {})
    params = {"encoder": jax.device_put(randomize(abstract))}
    abstract, _ = jax.eval_shape(pretraining_stage(config).init, jax.random.key(0), params)
    return params | {"generator": jax.device_put(randomize(abstract, seed=1))}


@pytest.mark.numeric
def test_features_are_predicted(params):
    """In raster order, where the model can be asked by hand."""
    config = config_lib.override(semaim.build("smoke"), ["model_train.order=raster"])
    stage, images = config.recipe().stage("generator"), pixels(BATCH["image"])
    value, (metrics, _) = jax.jit(stage.loss)(params["generator"], (), BATCH, jax.random.key(0), 0, params)

    @jax.jit
    def by_hand():
        patches = config.build_tokenizer().encode(images)
        raster = jnp.tile(jnp.arange(16), (4, 1))
        told = config.features.build(1).apply(params["encoder"]["encoder"], images)
        return patches, told, *config.build_generator().apply(params["generator"]["generator"], patches, raster)

    patches, told, predicted, seen = (np.float64(x) for x in by_hand())
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (predicted, told[:, 1:])]
    assert metrics["prediction"] == pytest.approx(np.square(unit[0] - unit[1]).sum(-1).mean(), rel=1e-4)
    assert metrics["pixels"] == pytest.approx(np.square(seen - patches).mean(), rel=1e-4)
    assert value == pytest.approx(float(metrics["prediction"] + metrics["pixels"]), rel=1e-5)
    np.testing.assert_allclose(config.judge({"encoder": params["encoder"]["encoder"]}, images), told, atol=1e-5)


@pytest.mark.numeric
def test_pixels_are_predicted(randomize):
    """Of blurred images, each patch standardised; the model's own features say the order, and nothing else is needed."""
    edits = ["model_train.order=raster", "model_train.target=pixels", "model_train.blur=0.8"]
    config = config_lib.override(semaim.build("smoke"), edits)
    recipe, images = config.recipe(), pixels(BATCH["image"])
    stage = recipe.stages[0]
    assert [s.name for s in recipe.stages] == ["generator"] and not stage.needs
    abstract, _ = jax.eval_shape(stage.init, jax.random.key(0), {})
    params = jax.device_put(randomize(abstract))
    _, (metrics, _) = jax.jit(stage.loss)(params, (), BATCH, jax.random.key(0), 0, {})

    @jax.jit
    def by_hand():
        patches = config.build_tokenizer().encode(images)
        model = config.build_generator()
        own = model.apply(params["generator"], patches, method="encode")
        return own, model.apply(params["generator"], patches, jnp.tile(jnp.arange(16), (4, 1)))[0]

    own, predicted = (np.float64(x) for x in by_hand())
    taps = np.exp(-0.5 * (np.arange(-4, 5) / 0.8) ** 2)  # the window of 8 sigma and what is odd next to it
    taps /= taps.sum()
    padded = np.pad(np.float64(images)[..., 0], ((0, 0), (4, 4), (4, 4)))
    rows = sum(t * padded[:, i : i + 8] for i, t in enumerate(taps))
    blurred = sum(t * rows[:, :, i : i + 8] for i, t in enumerate(taps))
    target = blurred.reshape(4, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(4, 16, 4)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    assert metrics["prediction"] == pytest.approx(np.square(predicted - target).mean(), rel=1e-3)
    np.testing.assert_allclose(config.judge({"generator": params["generator"]}, images), own, atol=1e-5)


@pytest.mark.numeric
def test_completions_keep_what_is_known(params):
    config = semaim.build("smoke")
    labels = np.array([3, 3, 7, 0])
    made = config.recipe().sample(params, jax.random.key(0), labels, known=0.5)
    images, originals, orders = (np.asarray(made[name]) for name in ("images", "originals", "orders"))
    test = digits("test")
    for original, label in zip(originals, labels):
        assert label in test.labels[(np.asarray(pixels(test.images)) == original).all(axis=(1, 2, 3))]
    assert (originals[0] != originals[1]).any()
    tokens = config.judge({"encoder": params["encoder"]["encoder"]}, originals)
    whole, patches = np.asarray(tokens)[:, 0], np.asarray(tokens)[:, 1:]
    cosine = np.einsum("bd,bnd->bn", whole, patches) / np.linalg.norm(patches, axis=-1)
    np.testing.assert_array_equal(orders[:, 0], cosine.argmax(1))
    kept = np.argsort(orders, axis=1).reshape(4, 4, 4).repeat(2, 1).repeat(2, 2) < 8
    np.testing.assert_allclose(images[kept], originals[kept], atol=1e-6)
    assert (np.abs(images - originals)[~kept] > 1e-3).any()
    for bad, message in (
        (dict(known=1.5), r"known=1.5: expected a share in \[0, 1\]"),
        (dict(cfg=1.5), "cfg=1.5: what is predicted is a mean"),
        (dict(top_p=0.9), "top_p=0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            config.recipe().sample(params, jax.random.key(0), labels, **bad)
    with pytest.raises(ValueError, match="label 11: no held-out image of data.path=digits"):
        config.recipe().sample(params, jax.random.key(0), np.array([11]))


@pytest.mark.parametrize("variant", semaim.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    """The published one has the layers of ViT-B twice, once to read and once to ask."""
    config = semaim.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    shapes = config.build_generator().param_shapes()["params"]
    if variant == "paper":
        d, block = 768, 12 * 768**2 + 12 * 768  # a ViT's: matrices, biases of all but keys, norms
        extra = d * d + d + d + 2 * d + (4 * d * d + 4 * d) + (4 * d * d + d) + (d * d + d)  # embedding, whole, norm, both heads
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 24 * block + extra
        encoder = config.recipe().stage("encoder")
        assert encoder.steps == 0 and set(jax.eval_shape(encoder.init, jax.random.key(0), {})[0]) == {"encoder"}


@pytest.mark.parametrize(
    "edit, message",
    [
        ("model.patch=4", "image_size=8: expected features.grid=4 patches of model.patch=4 pixels"),
        ("model_train.order=spiral", "model_train.order='spiral': expected one of semantic, similarity, raster, random"),
        ("model_train.target=tokens", "model_train.target='tokens': expected one of features, pixels"),
        ("features.heads=3", "features.heads=3 does not divide features.width=16"),
        ("features_train.temperature=0", "features_train.temperature=0.0: expected a positive number"),
        ("features_train.masked=1.5", "features_train.masked=1.5"),
        ("model.depth=0", "model.depth=0"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(semaim.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'huge' is not one of smoke, small, paper"):
        semaim.get_config("huge")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        semaim.claim("huge")
    with pytest.raises(ValueError, match="image_size=8: the images of data.path=digits are 10x10"):
        config_lib.override(semaim.build("smoke"), ["data.image_size=10"]).resolve()
    with pytest.raises(ValueError, match="features.imagenet=True: expected images of 3 channels, not 1"):
        config_lib.override(semaim.build("smoke"), ["features.imagenet=True"]).features.build(1)


@pytest.mark.slow  # it trains an encoder and two models
def test_the_claim_at_its_smallest():
    (claim,) = semaim.claim("smoke", seeds=1, log=lambda line: None)
    names = [(row["system"], row["target"]) for row in claim.rows]
    kinds = ("S140 SemAIM, semantic order", "raster order")
    assert names[:4] == [(name, target) for target in ("features", "pixels") for name in kinds]
    assert all(0 <= row["probe of the whole"] <= 1 for row in claim.rows)
