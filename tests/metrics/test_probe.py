"""What a linear classifier can read from features, and what it cannot."""

import numpy as np
import pytest

from jaxgen.metrics.probe import linear_probe

pytestmark = pytest.mark.numeric
RNG = np.random.default_rng(0)


def rings(n):
    """Two classes that no line parts, and the feature that does."""
    radius, angle = np.where(np.arange(n) % 2, 1.0, 3.0), RNG.uniform(0, 2 * np.pi, n)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)
    return x, (np.arange(n) % 2).astype(np.int32)


def test_linear_features_are_read_and_others_are_not():
    (x, y), (u, v) = rings(400), rings(400)
    assert linear_probe((x, y), (u, v)) < 0.62
    squared = [np.square(z).sum(1, keepdims=True) for z in (x, u)]
    assert linear_probe((squared[0], y), (squared[1], v)) == 1.0
    # Scales and shifts of features do not matter, constants do no harm.
    scaled = [np.concatenate([1e-3 * z + 50, np.ones_like(z)], axis=1) for z in squared]
    assert linear_probe((scaled[0], y), (scaled[1], v)) == 1.0
    # Weights that are punished enough name the likelier class alone.
    y[::10] = 1
    assert linear_probe((squared[0], y), (squared[1], v), decay=1e4) == 0.5


def test_bad_input():
    x, y = rings(6)
    with pytest.raises(ValueError, match=r"train: features \(6, 2\) and classes \(5,\) do not fit"):
        linear_probe((x, y[:5]), (x, y))
    with pytest.raises(ValueError, match=r"test: features \(6, 1\)"):
        linear_probe((x, y), (x[:, :1], y))
    with pytest.raises(ValueError, match=r"train: features \(0, 2\)"):
        linear_probe((x[:0], y[:0]), (x, y))
