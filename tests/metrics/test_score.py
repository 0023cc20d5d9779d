"""Oracles: the formula of Salimans et al. 2016 over whole splits, in numpy."""

import numpy as np
import pytest

from jaxgen.metrics.score import ScoreStats, inception_score, softmax


def formula(probs, split):
    scores = []
    for start in range(0, len(probs), split):
        part = probs[start : start + split]
        kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(kl.sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.fixture(scope="module")
def probs():
    return softmax(3 * np.random.default_rng(0).normal(size=(103, 7)))


def test_softmax_of_large_logits():
    np.testing.assert_allclose(softmax([[1000.0, 1000 + np.log(3)]]), [[0.25, 0.75]])


@pytest.mark.parametrize("split", [20, 40, 103, 500])
def test_batches_in_any_order_equal_the_whole(probs, split):
    order = np.random.default_rng(1).permutation(103)
    stats = ScoreStats.empty(7, split)
    for part in np.split(order, [5, 5, 60]):
        stats = stats.update(probs[part], part)
    np.testing.assert_allclose(stats.score(), formula(probs, split), rtol=1e-12)


def test_hosts_partial_results_are_joined(probs):
    parts = [ScoreStats.empty(7, 30).update(probs[i::3], np.arange(103)[i::3]) for i in range(3)]
    joined = parts[2].merge(parts[0]).merge(parts[1])
    np.testing.assert_allclose(joined.score(), formula(probs, 30), rtol=1e-12)
    assert joined.count.tolist() == [30, 30, 30, 13]
    # A host that has seen only the last split leaves the others empty, and they do not count.
    last = ScoreStats.empty(7, 30).update(probs[90:], np.arange(90, 103))
    assert last.score() == pytest.approx(formula(probs[90:], 30))


def test_one_split_is_the_plain_score(probs):
    assert inception_score(probs) == pytest.approx(formula(probs, 103)[0], rel=1e-12)


def test_what_does_not_fit_is_named(probs):
    stats = ScoreStats.empty(7, 30)
    with pytest.raises(ValueError, match="no samples"):
        stats.score()
    with pytest.raises(ValueError, match="7 classes in splits of 30 and over 7 in splits of 20"):
        stats.merge(ScoreStats.empty(7, 20))
    with pytest.raises(ValueError, match="sum to 1"):
        stats.update(2 * probs, np.arange(103))
    with pytest.raises(ValueError, match="expected 103 numbers"):
        stats.update(probs, np.arange(102))
    with pytest.raises(ValueError, match="split=0"):
        ScoreStats.empty(7, 0)
