"""Oracles: scipy's matrix square root, closed forms of Gaussians, and loops over pairs of points."""

import numpy as np
import pytest
from scipy import linalg

from jaxgen.metrics import FeatureStats, class_accuracy, frechet_distance, inception_score, precision_recall


def features(n, d, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


def test_stats_in_batches_equal_numpy_on_everything():
    x = features(103, 6, seed=0, shift=1e3)
    stats = FeatureStats.empty(6)
    for start in (0, 1, 40, 90):
        stats = stats.update(x[start : {0: 1, 1: 40, 40: 90, 90: 103}[start]])
    assert stats.count == 103
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.cov, np.cov(x, rowvar=False), rtol=1e-9)


def test_merging_partial_results_equals_one_pass_in_any_order():
    x = features(50, 4, seed=1)
    parts = [FeatureStats.of(p) for p in (x[:7], x[7:7], x[7:30], x[30:])]
    left = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    right = parts[3].merge(parts[2].merge(parts[1])).merge(parts[0])
    for merged in (left, right):
        assert merged.count == 50
        np.testing.assert_allclose(merged.cov, np.cov(x, rowvar=False), rtol=1e-12)
        np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
    assert FeatureStats.empty(3).merge(FeatureStats.empty(3)).count == 0


def test_distance_equals_the_matrix_square_root():
    x, y = features(200, 8, seed=2), features(150, 8, seed=3, shift=0.5)
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    want = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    got = frechet_distance(FeatureStats.of(x), FeatureStats.of(y))
    assert got == pytest.approx(want, rel=1e-9)
    assert frechet_distance(FeatureStats.of(y), FeatureStats.of(x)) == pytest.approx(got, rel=1e-12)


def test_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(4)
    mean, std = rng.normal(size=(2, 5)), rng.uniform(0.1, 3, (2, 5))
    a, b = (FeatureStats(count=11, mean=m, scatter=10 * np.diag(s**2)) for m, s in zip(mean, std))
    assert frechet_distance(a, b) == pytest.approx(np.square(mean[0] - mean[1]).sum() + np.square(std[0] - std[1]).sum())


def test_distance_of_singular_covariances():
    # 5 samples of 40 features: rank 4. Equal sets are at 0, and a shift adds its square.
    x = features(5, 40, seed=5)
    shift = np.linspace(-1, 1, 40)
    assert frechet_distance(FeatureStats.of(x), FeatureStats.of(x)) == pytest.approx(0, abs=1e-10)
    moved = frechet_distance(FeatureStats.of(x), FeatureStats.of(x + shift))
    assert moved == pytest.approx(np.square(shift).sum(), rel=1e-9)
    # Orthogonal supports share nothing: the traces add up.
    y, z = np.zeros((6, 4)), np.zeros((6, 4))
    y[:, 0], z[:, 2] = np.arange(6) - 2.5, 3 * (np.arange(6) - 2.5)
    assert frechet_distance(FeatureStats.of(y), FeatureStats.of(z)) == pytest.approx(3.5 + 9 * 3.5)


def test_stats_and_distance_name_what_is_wrong():
    good = FeatureStats.of(features(9, 3, seed=6))
    with pytest.raises(ValueError, match="count=1"):
        frechet_distance(FeatureStats.of(np.zeros((1, 3))), good)
    with pytest.raises(ValueError, match="widths 3 and 4"):
        frechet_distance(good, FeatureStats.empty(4))
    with pytest.raises(ValueError, match="widths 3 and 2"):
        good.update(np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"expected \[n, d\]"):
        good.update(np.zeros(3))
    with pytest.raises(ValueError, match="1 of 6 values are not finite"):
        good.update(np.array([[0, 1, np.nan], [0, 0, 0]]))


def test_class_accuracy_counts_argmax_hits():
    logits = np.array([[1, 2, 0], [5, 1, 1], [0, 0, 9], [0, 4, 3]])
    assert class_accuracy(logits, np.array([1, 0, 2, 2])) == 0.75
    with pytest.raises(ValueError, match="labels 0..3"):
        class_accuracy(logits, np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"\(4, 3\) and labels of shape \(3,\)"):
        class_accuracy(logits, np.array([0, 1, 2]))


def test_inception_score_of_known_tables():
    assert inception_score(np.full((6, 4), 0.25)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(4), (3, 1))) == pytest.approx(4)
    assert inception_score(np.eye(4)[[0, 0, 0]]) == pytest.approx(1)
    # Mutual information of two equally likely rows (p, 1-p), (1-p, p): log 2 - H(p).
    p = 0.9
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert inception_score(np.array([[p, 1 - p], [1 - p, p]])) == pytest.approx(np.exp(np.log(2) - entropy))
    for bad in ([[0.5, 0.6]], [[1.5, -0.5]], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="probs"):
            inception_score(np.array(bad))


def in_manifold(x, centres, k):
    hits = 0
    for point in x:
        for i, centre in enumerate(centres):
            others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
            if np.linalg.norm(point - centre) <= others[k - 1]:
                hits += 1
                break
    return hits / len(x)


@pytest.mark.parametrize("k,chunk", [(1, 7), (3, 1024), (5, 1)])
def test_precision_recall_equals_loops_over_points(k, chunk):
    rng = np.random.default_rng(7)
    real, fake = rng.normal(size=(30, 2)) + 50, rng.normal(size=(23, 2)) * 0.7 + 50.8
    got = precision_recall(real, fake, k=k, chunk=chunk)
    assert got == pytest.approx((in_manifold(fake, real, k), in_manifold(real, fake, k)))
    assert 0 < got[0] < 1 and 0 < got[1] < 1


def test_precision_recall_of_a_collapsed_set():
    rng = np.random.default_rng(8)
    real = rng.normal(size=(60, 3))
    precision, recall = precision_recall(real, real[:1] + 1e-3 * rng.normal(size=(20, 3)))
    assert precision == 1 and recall < 0.05
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)


def test_precision_recall_names_what_is_wrong():
    x = np.zeros((5, 2))
    with pytest.raises(ValueError, match="5 real and 3 generated.*k=3"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match="k=0"):
        precision_recall(x, x, k=0)
    with pytest.raises(ValueError, match="widths 2 and 1"):
        precision_recall(x, x[:, :1])
