"""RDM as a recipe: the database and the loss by hand, other databases after training, variants, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import rdm
from jaxgen import config as config_lib
from jaxgen.data import DataConfig, digits, pixels
from jaxgen.generators.retrieval_llama import neighbours
from jaxgen.recipes.retrieval import images_of
from jaxgen.retrieval import build_index

SHAPE = ("tokenizer.ch=4", "tokenizer.groups=2", "tokenizer.z_channels=4", "model_train.class_drop=0", "retrieval.limit=40")
CONFIG = config_lib.override(rdm.build("smoke"), SHAPE)
SOURCE = digits("train")


def first_images(classes=()):
    """All that are in the database."""
    return map(np.concatenate, zip(*images_of(CONFIG.data, classes, 40)))


@pytest.fixture(scope="module")
def frozen(randomize):
    abstract = jax.eval_shape(CONFIG.build_tokenizer().init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    frozen = {"tokenizer": {"tokenizer": jax.device_put(randomize(abstract))}}
    abstract, _ = jax.eval_shape(CONFIG.recipe().stage("encoder").init, jax.random.key(0), {})
    return frozen | {"encoder": {"encoder": jax.device_put(randomize(abstract["encoder"], seed=2))}}


@pytest.fixture(scope="module")
def params(frozen, randomize):
    return frozen | {"generator": {"generator": jax.device_put(randomize(CONFIG.build_generator().param_shapes(), seed=1))}}


@pytest.fixture(scope="module")
def described(frozen):
    """Unit vectors of images, by the encoder alone."""
    encode = jax.jit(CONFIG.features.build(1).apply)

    def run(images):
        features = np.asarray(encode(frozen["encoder"]["encoder"], pixels(images)))[:, 1:].mean(1)
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    return run


@pytest.mark.numeric
def test_stage(frozen, params, described):
    """An image's neighbours are the entries most like it, itself aside."""
    stage = CONFIG.recipe().stage("generator")
    assert stage.needs == ("tokenizer", "encoder")
    index = stage.fill(frozen)
    _, shapes = jax.eval_shape(stage.init, jax.random.key(0), frozen)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), index) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    images, labels = first_images()
    assert index.count == 40 and images.shape == (40, 8, 8, 1)
    np.testing.assert_array_equal(np.asarray(index.labels)[:40], labels)
    np.testing.assert_allclose(np.asarray(index.features)[:40], described(images), atol=1e-5)

    batch = {"image": jnp.asarray(images[:4]), "label": jnp.asarray(labels[:4])}
    value, (metrics, kept) = jax.jit(stage.loss)(params["generator"], index, batch, jax.random.key(0), 0, frozen)
    assert kept.features.shape == index.features.shape
    order = np.argsort(-(described(images[:4]) @ described(images).T), axis=1)
    np.testing.assert_array_equal(order[:, 0], np.arange(4))
    context = neighbours(index, described(images[:4]), 4, below=CONFIG.retrieval.below)
    np.testing.assert_allclose(context.features, described(images)[order[:, 1:5]], atol=1e-5)

    @jax.jit
    def by_hand():
        tokens = CONFIG.build_tokenizer().apply(frozen["tokenizer"]["tokenizer"], pixels(batch["image"]), method="encode")
        return tokens, CONFIG.build_generator().apply(params["generator"]["generator"], context, tokens)

    tokens, logits = (np.asarray(x) for x in by_hand())
    probs = np.exp(np.float64(logits))
    nll = -np.log(np.take_along_axis(probs / probs.sum(-1, keepdims=True), tokens[..., None], -1)).mean()
    assert value == pytest.approx(nll, rel=1e-4) and metrics["nll"] == pytest.approx(nll, rel=1e-4)


@pytest.mark.numeric
def test_databases_are_swapped_after_training(params, described, tmp_path, monkeypatch):
    recipe, key, built = CONFIG.recipe(), jax.random.key(0), []
    original = type(CONFIG).build_database
    monkeypatch.setattr(type(CONFIG), "build_database", lambda *a: built.append(a[2:]) or original(*a))
    images, labels = first_images()
    asked = np.array([labels[0], labels[1]])
    made = recipe.sample(params, key, asked)
    assert made["images"].shape == (2, 8, 8, 1) and made["tokens"].shape == (2, 16)
    entries = np.asarray(made["neighbours"])
    np.testing.assert_array_equal(labels[entries[:, 0]], asked)
    np.testing.assert_array_equal(entries, np.argsort(-described(images) @ described(images).T, axis=1)[entries[:, 0], :4])
    recipe.sample(params, key, asked)
    assert built == [("", ())]  # kept for the next call

    some = recipe.sample(params, key, np.array([3, 5]), classes=(3, 5))
    chosen = list(first_images((3, 5)))[1]
    assert set(chosen) == {3, 5} and (chosen[np.asarray(some["neighbours"])[:, 0]] == [3, 5]).all()
    path = str(tmp_path / "inverted.npz")
    np.savez(path, x_train=255 - SOURCE.images, y_train=SOURCE.labels, x_test=SOURCE.images[:4], y_test=SOURCE.labels[:4])
    other = recipe.sample(params, key, asked, database=path)
    assert (np.asarray(other["tokens"]) != np.asarray(made["tokens"])).any()
    index = build_index(described(images[:8]), labels[:8])
    given = recipe.sample(params, key, np.array([-1, -1]), database=index)
    assert np.asarray(given["neighbours"]).max() < 8
    assert built == [("", ()), ("", (3, 5)), (path, ())]

    with pytest.raises(ValueError, match=r"classes=\(11,\): data.path=digits has no image of them, only 0..9"):
        recipe.sample(params, key, asked, classes=(11,))
    with pytest.raises(ValueError, match="no such file or folder"):
        recipe.sample(params, key, asked, database=str(tmp_path / "none.npz"))
    with pytest.raises(ValueError, match="label 3: the database has none of it, only 5"):
        recipe.sample(params, key, np.array([3]), classes=(5,))
    with pytest.raises(ValueError, match="k=4 neighbours of a database of 2 entries"):
        recipe.sample(params, key, np.array([-1]), database=build_index(described(images[:2])))


def test_a_large_database_is_read_in_parts(monkeypatch):
    """Shapes are known without reading an image, and no more than a part of the images is there at a time."""
    config = config_lib.override(CONFIG, ["retrieval.limit=600"])
    read, original = [], type(SOURCE).__getitem__
    monkeypatch.setattr(type(SOURCE), "__getitem__", lambda self, i: read.append(i) or original(self, i))
    recipe, key = config.recipe(), jax.random.key(0)
    frozen = {name: jax.eval_shape(recipe.stage(name).init, key, {})[0] for name in ("tokenizer", "encoder")}
    _, index = jax.eval_shape(recipe.stage("generator").init, key, frozen)
    assert index.features.shape == (1024, config.features.width) and not read
    assert [len(labels) for _, labels in images_of(config.data, (), 600)] == [256, 256, 88] and read


def test_few_images_of_few_classes(frozen):
    config = config_lib.override(CONFIG, ["retrieval.limit=4"])
    with pytest.raises(ValueError, match="retrieval.k=4: the database has 4 images, and an image is no neighbour of its own"):
        jax.eval_shape(config.recipe().stage("generator").init, jax.random.key(0), frozen)
    config = config_lib.override(CONFIG, ["retrieval.trained=2,7"])
    batch = next(iter(config.recipe().stage("generator").data(0, 1)))
    assert set(batch["label"].tolist()) == {2, 7}
    with pytest.raises(ValueError, match=r"classes=\(1,\): the images of data.path=world are drawn"):
        next(images_of(DataConfig(path="world"), (1,), 4))


@pytest.mark.parametrize("variant", rdm.VARIANTS)
def test_every_variant_builds_and_survives_json(variant):
    config = rdm.get_config(variant).config
    assert config_lib.from_json(config_lib.to_json(config)) == config
    blocks = config.build_generator().param_shapes()["params"]["transformer"]
    cross = blocks["blocks" if variant == "paper" else "blocks_0"]["cross"]
    if variant == "paper":
        assert cross["kv"]["kernel"].shape == (18, 768, 2, 12, 64) and config.retrieval.k == 4
        assert len(config.retrieval.trained) == 130


@pytest.mark.parametrize(
    "edit, message",
    [
        ("retrieval.k=0", "retrieval.k=0"),
        ("retrieval.limit=3", "retrieval.k=4: retrieval.limit=3 entries are fewer neighbours"),
        ("features.depth=0", "features.depth=0"),
    ],
)
def test_bad_configurations(edit, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(rdm.build("smoke"), [edit])
    with pytest.raises(ValueError, match="variant 'huge' is not one of smoke, small, paper"):
        rdm.get_config("huge")
    with pytest.raises(ValueError, match="budget 'huge' is not one of smoke, small"):
        rdm.claim("huge")


@pytest.mark.slow  # it trains a tokenizer, an encoder, a classifier and two generators
def test_the_claim_at_its_smallest():
    (claim,) = rdm.claim("smoke", seeds=1, log=lambda line: None)
    assert [row["database"] for row in claim.rows][:4] == ["all classes", "classes 0 to 4", "classes 5 and up", "no neighbours"]
    assert len(claim.rows) == 7 and claim.rows[0]["share of its classes"] == 1.0
