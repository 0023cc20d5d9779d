"""Which positions are shown, and the loss against its formula in float64."""

import jax
import numpy as np
import pytest

from jaxgen.objectives.glancing import feature_distillation, glance

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("block, shift", [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_runs_from_the_start_of_blocks(block, shift):
    wrong = np.random.default_rng(0).uniform(size=(64, 48)) < 0.6
    shown = np.asarray(glance(jax.random.key(0), wrong, 0.5, block=block, shift=shift))
    budget = np.floor(0.5 * wrong.sum(1))
    # At most the share, and less by no more than a run that did not fit.
    assert (shown.sum(1) <= budget).all() and (shown.sum(1) > budget - block + 1).all()
    assert not shown[:, :block].any()
    place = (np.arange(48) + shift) % block
    assert not shown[:, place == block - 1].any()
    for offset in range(1, block):
        later = np.flatnonzero(place == offset)
        assert (shown[:, later] <= shown[:, later - 1])[:, later > block].all()  # runs, from the front
    assert len(np.unique(shown, axis=0)) > 1


def test_nothing_to_show():
    wrong = np.ones((2, 12), bool)
    assert not glance(jax.random.key(0), wrong, 0.9, block=1).any()
    assert not glance(jax.random.key(0), wrong, 0.0, block=3).any()
    assert not glance(jax.random.key(0), ~wrong, 0.9, block=3).any()
    # Every place, however much is wrong, that may be shown.
    np.testing.assert_array_equal(glance(jax.random.key(0), wrong, 9.0, block=2)[0], [0, 0] + [1, 0] * 5)


def test_the_loss():
    rng = np.random.default_rng(1)
    f, g = rng.standard_normal((2, 2, 3, 4)) * 2
    p, q = rng.standard_normal((2, 2, 3, 5))
    labels, weights = rng.integers(0, 5, (2, 3)), np.array([[1.0, 1, 0], [0, 1, 0]])
    loss, metrics = feature_distillation(f, g, p, q, weights, labels=labels, distil=0.3, soft=0.9)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    want, regression = 0.0, 0.0
    for i, j in ((0, 0), (0, 1), (1, 1)):
        part = np.mean([0.5 * x * x if abs(x) < 1 else abs(x) - 0.5 for x in f[i, j] - g[i, j]])
        log_p, log_q = log_softmax(p[i, j]), log_softmax(q[i, j])
        want += part + 0.3 * (0.9 * np.sum(np.exp(log_p) * (log_p - log_q)) - 0.1 * log_q[labels[i, j]])
        regression += part
    np.testing.assert_allclose(loss, want / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["regression"], regression / 3, rtol=1e-5)
    same = (p.argmax(-1) == q.argmax(-1)) * weights
    np.testing.assert_allclose(metrics["agreement"], same.sum() / 3, rtol=1e-6)
    perfect, _ = feature_distillation(f, f, p, p, weights)
    np.testing.assert_allclose(perfect, 0, atol=1e-6)
    with pytest.raises(ValueError, match="soft=0.5: without labels"):
        feature_distillation(f, g, p, q, weights, soft=0.5)
