"""The text encoder: padding says nothing, order and every byte count, and strides join neighbours."""

import jax
import numpy as np
import pytest

from jaxgen.nn import TextEncoder

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

TEXT = np.frombuffer(b"abcdef\0\0ab\0\0\0\0\0\0", np.uint8).reshape(2, 8)


def encoder(stride):
    model = TextEncoder(length=8, features=6, width=8, depth=1, heads=2, stride=stride)
    params = jax.jit(model.init)(jax.random.key(0), TEXT)
    return model, params, lambda text: jax.tree.map(np.asarray, jax.jit(model.apply)(params, text))


@pytest.mark.parametrize("stride", [1, 4])
def test_features_of_each_stride(stride):
    model, _, encode = encoder(stride)
    found = encode(TEXT)
    assert found.features.shape == (2, 8 // stride, 6) == (2, model.positions, 6)
    np.testing.assert_array_equal(found.mask, TEXT.reshape(2, -1, stride).any(-1))
    assert not found.features[~found.mask].any() and found.features[found.mask].any(-1).all()
    # Each byte matters to all features of its caption, and to no other caption's.
    for i in range(6):
        text = TEXT.copy()
        text[0, i] += 1
        changed = np.abs(encode(text).features - found.features).max(-1) > 1e-6
        np.testing.assert_array_equal(changed[0], found.mask[0])
        assert not changed[1].any()
    swapped = encode(TEXT[:, [1, 0, *range(2, 8)]]).features
    assert np.abs(swapped - found.features).max(-1)[found.mask].min() > 1e-6


def test_captions_of_longer_batches_are_the_same():
    """What a caption is padded to changes nothing."""
    model, params, encode = encoder(2)
    short = model.clone(length=6)
    few = {"params": params["params"] | {"position": params["params"]["position"][:6]}}
    want = jax.jit(short.apply)(few, TEXT[:, :6])
    np.testing.assert_allclose(encode(TEXT).features[:, :3], want.features, atol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="length=8, stride=3: expected a positive multiple"):
        TextEncoder(length=8, features=6, width=8, stride=3)
    with pytest.raises(ValueError, match=r"captions \(2, 5\): expected bytes \[b, 8\]"):
        encoder(1)[2](TEXT[:, :5])
