import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives.likelihood import cross_entropy, drop_labels

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, size=(2, 5, 7)).astype(np.float32)
TARGETS = RNG.integers(0, 7, (2, 5))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(smoothing):
    x = LOGITS.astype(np.float64)
    log_probs = x - np.log(np.exp(x).sum(-1, keepdims=True))
    want = np.zeros((2, 5))
    for b, i in np.ndindex(2, 5):
        target = np.full(7, smoothing / 7)
        target[TARGETS[b, i]] += 1 - smoothing
        want[b, i] = -(target * log_probs[b, i]).sum()
    np.testing.assert_allclose(cross_entropy(LOGITS, TARGETS, label_smoothing=smoothing), want, rtol=2e-5)


def test_gradient_is_the_law_minus_the_target():
    grad = jax.grad(lambda x: cross_entropy(x, TARGETS).sum())(LOGITS)
    law = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    np.testing.assert_allclose(grad, law - np.eye(7)[TARGETS], atol=1e-6)


def test_large_and_half_precision_logits():
    huge = np.array([[3e4, 0.0, -3e4]], np.float32)
    np.testing.assert_allclose(cross_entropy(huge, np.array([1])), [3e4])
    half = cross_entropy(jnp.asarray(LOGITS, jnp.bfloat16), TARGETS)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, cross_entropy(LOGITS, TARGETS), atol=0.05)


def test_labels_are_dropped_at_the_rate():
    labels = jnp.arange(10_000) % 10
    dropped = np.asarray(drop_labels(jax.random.key(0), labels, 10, 0.1))
    gone = dropped == 10
    assert abs((gone.sum() - 1000) / np.sqrt(900)) < 4
    np.testing.assert_array_equal(dropped[~gone], np.asarray(labels)[~gone])
    np.testing.assert_array_equal(drop_labels(jax.random.key(0), labels, 10, 0.0), labels)
    assert np.all(drop_labels(jax.random.key(0), labels, 10, 1.0) == 10)
