"""Oracles: numpy and scipy on everything at once."""

import numpy as np
import pytest
from scipy import linalg

from jaxgen.metrics import FeatureStats, ImageStats, Reference, image_scores, npz_images, precision_recall, read_reference
from jaxgen.metrics.image_stats import npz_count
from jaxgen.metrics.score import ScoreStats, softmax

N, KEEP, SPLIT = 60, 25, 32


def observed(n, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    widths = {"pool": 6, "spatial": 4, "logits": 5}
    return {name: (rng.normal(size=(n, d)) * 2 + shift).astype(np.float32) for name, d in widths.items()}


def empty():
    return ImageStats.empty(6, 4, 5, keep=KEEP, split=SPLIT)


def part(everything, index):
    return {name: x[index] for name, x in everything.items()}


@pytest.fixture(scope="module")
def images():
    return observed(N, seed=0)


def assert_whole(stats, images):
    """`stats` are those of all images."""
    assert len(stats) == N and stats.seen(N).all()
    for name, got in (("pool", stats.pool), ("spatial", stats.spatial)):
        x = images[name].astype(np.float64)
        np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(got.cov, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    score = ScoreStats.empty(5, SPLIT).update(softmax(images["logits"]), np.arange(N))
    assert stats.score.score() == pytest.approx(score.score(), rel=1e-12)
    np.testing.assert_array_equal(stats.kept(), images["pool"][:KEEP])


def test_batches_of_two_hosts_equal_the_whole(images):
    order = np.random.default_rng(1).permutation(N)
    hosts = [empty(), empty()]
    for number, index in enumerate(np.split(order, [10, 25, 40])):
        hosts[number % 2] = hosts[number % 2].update(part(images, index), index)
    assert hosts[0].seen(N).sum() + hosts[1].seen(N).sum() == N
    assert_whole(hosts[1].merge(hosts[0]), images)


def test_an_interrupted_run_goes_on_from_its_folder(images, tmp_path):
    stats, batches = empty(), np.split(np.arange(N), 6)
    for index in batches[:3]:
        stats = stats.update(part(images, index), index)
        stats.save(tmp_path / "a")
    ahead = stats.update(part(images, batches[3]), batches[3])
    # Killed between the features and the state: what the state does not know comes again.
    lost = observed(10, seed=9)
    stats.update(lost, batches[3]).save(tmp_path / "b")
    (tmp_path / "b" / "features_000002.npz").replace(tmp_path / "a" / "features_000003.npz")
    again = ImageStats.load(tmp_path / "a")
    assert again.seen(N).sum() == 30 and not (tmp_path / "a" / "features_000003.npz").exists()
    for index in batches[3:]:
        again = again.update(part(images, index), index)
        again.save(tmp_path / "a")
    assert_whole(ImageStats.load(tmp_path / "a"), images)
    assert not list((tmp_path / "a").glob("*.tmp"))
    assert ahead.seen(N).sum() == 40


def test_features_of_a_run_without_a_state_are_not_taken_for_new_ones(images, tmp_path):
    index = np.arange(10)
    empty().update(observed(10, seed=9), index).save(tmp_path)
    (tmp_path / "stats.npz").unlink()
    empty().update(part(images, index), index).save(tmp_path)
    np.testing.assert_array_equal(ImageStats.load(tmp_path).kept(), images["pool"][:10])


def test_scores_against_numpy_and_scipy(images):
    real = observed(40, seed=5, shift=0.7)
    reference = empty().update(real, np.arange(40)).reference()
    got = image_scores(empty().update(images, np.arange(N)), reference)
    for name, key in (("pool", "fid"), ("spatial", "sfid")):
        x, y = images[name].astype(float), real[name].astype(float)
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        want = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
        assert got[key] == pytest.approx(want, rel=1e-8), key
    assert (got["precision"], got["recall"]) == precision_recall(real["pool"][:KEEP], images["pool"][:KEEP])
    assert got["images"] == N and got["inception_score_std"] > 0
    other = image_scores(empty().update(images, np.arange(N)), reference, k=1)
    assert other["precision"] < got["precision"]
    bare = image_scores(empty().update(images, np.arange(N)), Reference(pool=reference.pool))
    assert set(bare) == {"images", "inception_score", "inception_score_std", "fid"} and bare["fid"] == got["fid"]


def test_published_statistics(images, tmp_path):
    x = {name: images[name].astype(np.float64) for name in ("pool", "spatial")}
    moments = {
        "mu": x["pool"].mean(0),
        "sigma": np.cov(x["pool"], rowvar=False),
        "mu_s": x["spatial"].mean(0),
        "sigma_s": np.cov(x["spatial"], rowvar=False),
    }
    pictures = np.random.default_rng(3).integers(0, 256, (7, 4, 5, 3)).astype(np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=pictures, **moments)
    np.savez(tmp_path / "fid.npz", mu=moments["mu"], sigma=moments["sigma"])
    stats = empty().update(images, np.arange(N))
    for name in ("adm.npz", "fid.npz"):
        reference = read_reference(tmp_path / name)
        got = image_scores(stats, reference)
        assert got["fid"] == pytest.approx(0, abs=1e-6) and ("sfid" in got) == (name == "adm.npz")
        assert reference.features is None
    parts = list(npz_images(tmp_path / "adm.npz", 3))
    assert [len(p) for p in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(parts), pictures)
    assert [npz_count(tmp_path / name) for name in ("adm.npz", "fid.npz")] == [7, 0]


def test_references_survive_a_file(images, tmp_path):
    stats = empty().update(images, np.arange(N))
    stats.reference().save(tmp_path / "real.npz")
    again = read_reference(tmp_path / "real.npz")
    assert again.pool.count == N
    np.testing.assert_allclose(again.pool.scatter, stats.pool.scatter, rtol=1e-12)
    np.testing.assert_array_equal(again.features, images["pool"][:KEEP])
    other = empty().update(observed(N, seed=4), np.arange(N))
    assert image_scores(other, again) == pytest.approx(image_scores(other, stats.reference()), rel=1e-9)


def test_what_does_not_fit_is_named(images, tmp_path):
    stats = empty().update(part(images, np.arange(10)), np.arange(10))
    with pytest.raises(ValueError, match="3 images are counted twice, such as number 7"):
        stats.update(part(images, np.arange(5)), np.arange(7, 12))
    with pytest.raises(ValueError, match="keep 25 and 0 features"):
        stats.merge(ImageStats.empty(6, 4, 5, split=SPLIT))
    with pytest.raises(ValueError, match="keep=-1"):
        ImageStats.empty(6, 4, 5, keep=-1)
    with pytest.raises(ValueError, match="missing.*not a readable npz file"):
        ImageStats.load(tmp_path / "missing")
    np.savez(tmp_path / "stats.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="not statistics of images"):
        ImageStats.load(tmp_path)
    with pytest.raises(ValueError, match=r"stats.npz: no statistics \(arrays mu and sigma\)"):
        read_reference(tmp_path / "stats.npz")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"odd.npz: a mean of shape \(3,\)"):
        read_reference(tmp_path / "odd.npz")
    with pytest.raises(ValueError, match="odd.npz: cannot read images"):
        next(npz_images(tmp_path / "odd.npz", 2))
    with pytest.raises(ValueError, match="count=1"):
        FeatureStats.from_moments(np.zeros(2), np.eye(2), count=1)
    with pytest.raises(ValueError, match="mu is float64"):
        next(npz_images(tmp_path / "odd.npz", 2, name="mu"))
