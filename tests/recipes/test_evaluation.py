import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data import DataConfig, digits
from jaxgen.metrics import FeatureStats, frechet_distance
from jaxgen.nn.classifier import Classifier
from jaxgen.recipes.evaluation import (
    evaluate_images,
    held_out,
    measure_reconstruction,
    measure_samples,
    real_features,
    sample_many,
)

DATA = DataConfig(path="digits", channels=1)


def test_held_out_images_come_in_one_order_up_to_a_limit():
    def read(batch_size, limit, split="test"):
        found = list(held_out(DATA, batch_size=batch_size, limit=limit, split=split))
        assert all(len(batch["label"]) == len(batch["image"]) for batch in found)
        return [len(batch["label"]) for batch in found], np.concatenate([batch["image"] for batch in found])

    sizes, images = read(64, 100)
    assert sizes == [64, 36]
    for batch_size, limit, expected in ((50, 100, [50, 50]), (100, 100, [100]), (64, 64, [64])):
        sizes, again = read(batch_size, limit)
        assert sizes == expected
        np.testing.assert_array_equal(again, images[:limit])
    sizes, everything = read(128, 10_000)
    assert sizes == [128, 128, 43] and len(everything) == len(digits("test"))
    assert {x.tobytes() for x in everything} == {x.tobytes() for x in digits("test").images}
    assert len(read(500, 1400, "train")[1]) == 1400


class Halving:
    """A tokenizer whose token says whether a pixel in the middle is bright, and whose images are then all of one gray."""

    vocab = 8

    def apply(self, variables, x, method):
        if method == "encode":
            return jnp.where(x[:, 3, 4] > variables, 3, 5).astype(jnp.int32)
        return jnp.broadcast_to(jnp.where(x[:, :, None, None] == 3, 0.5, -0.5), (len(x), 8, 8, 1))


def test_reconstruction_against_numpy():
    images = np.concatenate([b["image"] for b in held_out(DATA, batch_size=299, limit=299)]).astype(np.float64) / 127.5 - 1
    gray = np.where(images[:, 3, 4, 0] > 0.2, 0.5, -0.5)
    error = ((images - gray[:, None, None, None]) ** 2).mean(axis=(1, 2, 3))
    share = (gray > 0).mean()
    assert 0 < share < 1
    perplexity = np.exp(-share * np.log(share) - (1 - share) * np.log(1 - share))
    for batch_size in (128, 299):
        found = measure_reconstruction(Halving(), jnp.float32(0.2), DATA, batch_size=batch_size)
        assert found["images"] == 299 and found["codebook_use"] == 2 / 8
        assert found["psnr"] == pytest.approx((10 * np.log10(4 / error)).mean(), abs=1e-4)
        assert found["codebook_perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert -1 <= found["ssim"] <= 1
    assert measure_reconstruction(Halving(), jnp.float32(0.2), DATA, limit=10)["images"] == 10


class Thumbnails:
    """A network that reads four and two mean colours, and as logits the first three of them."""

    def apply(self, variables, images, method):
        assert method == "observe" and images.dtype == jnp.uint8
        quarters = images.astype(jnp.float32).reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4) * variables
        return {"pool": quarters, "spatial": quarters[:, :2], "logits": quarters[:, :3] / 100}


def test_reconstruction_in_the_eyes_of_a_network():
    images = next(held_out(DATA, batch_size=299, limit=299))["image"]
    output = np.where(images[:, 3, 4] > 153, np.uint8(191), np.uint8(64))[:, None, None].repeat(8, 1).repeat(8, 2)
    sides = [np.asarray(Thumbnails().apply(2.0, jnp.asarray(x), "observe")["pool"]) for x in (images, output)]
    found = measure_reconstruction(Halving(), jnp.float32(0.2), DATA, batch_size=128, inception=(Thumbnails(), 2.0))
    assert found["rfid"] == pytest.approx(frechet_distance(*map(FeatureStats.of, sides)), rel=1e-5)
    assert found["rsfid"] == pytest.approx(frechet_distance(*(FeatureStats.of(x[:, :2]) for x in sides)), rel=1e-5)
    assert found["rfid"] > found["rsfid"] > 100 and "lpips" not in found


class Painter:
    """A recipe whose image i shows its label, its place and the call's noise."""

    shows = "images"

    def __init__(self):
        self.batches, self.settings = [], []

    def sample(self, params, key, labels, **settings):
        self.batches.append(np.asarray(labels))
        self.settings.append(settings)
        noise = jax.random.uniform(key, (len(labels),))
        place = jnp.arange(len(labels)) / 100
        pixels = [jnp.asarray(labels) / 10, place, noise, jnp.full_like(noise, params)]
        return {"images": jnp.stack(pixels, axis=1).reshape(-1, 2, 2, 1)}


def test_padding_changes_nothing_and_keeps_the_shape():
    labels = np.array([3, 1, 4, 1, 5, 9, 2])
    painter = Painter()
    images = sample_many(painter, 0.25, jax.random.key(0), labels, batch_size=3, cfg=2.0)
    assert images.shape == (7, 2, 2, 1) and [len(batch) for batch in painter.batches] == [3, 3, 3]
    assert painter.settings == [{"cfg": 2.0}] * 3
    np.testing.assert_allclose(images[:, 0, 0, 0], labels / 10, rtol=1e-6)
    np.testing.assert_allclose(images[:, 0, 1, 0] * 100, [0, 1, 2, 0, 1, 2, 0], rtol=1e-6)
    np.testing.assert_array_equal(images[:, 1, 1, 0], 0.25)
    assert len(set(images[:, 1, 0, 0].tolist())) == 7  # every batch has noise of its own
    longer = sample_many(Painter(), 0.25, jax.random.key(0), np.append(labels, [6, 5]), batch_size=3)
    np.testing.assert_array_equal(longer[:7], images)
    for n, batch_size in ((7, 0), (0, 3)):
        with pytest.raises(ValueError, match=f"{n} labels in batches of {batch_size}"):
            sample_many(Painter(), 0.25, jax.random.key(0), labels[:n], batch_size=batch_size)


@pytest.fixture(scope="module")
def judge(randomize):
    classifier = Classifier(num_classes=10, width=8)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return classifier, jax.tree.map(jnp.asarray, randomize(shapes))


def test_samples_that_are_real_images_are_as_good_as_real(judge):
    """The samples are the test images themselves: every measure of them is that of real images."""
    test = next(held_out(DATA, batch_size=299, limit=299))
    images = test["image"].astype(np.float32) / 127.5 - 1
    found = measure_samples(*judge, images, test["label"], DATA, batch_size=299, limit=598)
    assert found["samples"] == 299 and found["class_accuracy"] == found["class_accuracy_real"]
    assert found["class_accuracy_ratio"] == 1
    assert found["frechet"] == pytest.approx(found["frechet_real"], rel=1e-3) and found["frechet"] > 0
    assert found["precision"] > 0.5 and found["recall"] > 0.3
    features, logits, labels = real_features(*judge, DATA, split="test", batch_size=299, limit=299)
    np.testing.assert_array_equal(labels, test["label"])
    assert found["class_accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert features.shape[0] == 299 and features.ndim == 2
    noise = np.random.default_rng(0).uniform(-1, 1, images.shape).astype(np.float32)
    worse = measure_samples(*judge, noise, test["label"], DATA, batch_size=299, limit=598)
    assert worse["frechet"] > 5 * found["frechet"] and worse["precision"] < found["precision"]


@pytest.fixture
def halves():
    """A recipe of the two classes above, without a classifier."""
    config = types.SimpleNamespace(num_classes=3, build_tokenizer=Halving, data=DATA)

    def sample(params, key, labels, **settings):
        return {"images": jnp.broadcast_to(labels[:, None, None, None], (len(labels), 8, 8, 1)).astype(jnp.float32)}

    return types.SimpleNamespace(config=config, sample=sample, shows="images")


def test_everything_at_once(halves):
    params = {"tokenizer": {"tokenizer": jnp.float32(0.2)}}
    settings = {"cfg": 2.0}
    found, images = evaluate_images(halves, params, jax.random.key(0), num=8, batch_size=5, settings=settings)
    assert images[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2]  # evenly, sorted
    assert found["reconstruction"]["images"] == 299
    assert found["generation"] == {"settings": settings, "note": "not judged: the recipe has no classifier (classifier.steps=0)"}
    with pytest.raises(ValueError, match="num=2: at least one sample for each of the 3 classes"):
        evaluate_images(halves, params, jax.random.key(0), num=2, batch_size=5, settings=settings)
