"""What masked patches hide, and which images are refused; values are compared in tests/interop/test_dinov2.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.feature_vit import FeatureViT

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


def test_masked_patches_are_not_seen(randomize):
    module = FeatureViT(width=8, depth=1, heads=2, patch=2, positions=2, channels=1, mean=(0.5,), std=(2.0,))
    params = jax.device_put(randomize(module.param_shapes()))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 1)).astype(np.float32)
    masked = jnp.zeros((2, 4), bool).at[0, 1].set(True)
    run = jax.jit(module.apply)
    whole = np.asarray(run(params, images, masked))
    assert whole.shape == (2, 5, 8)
    changed = images.copy()
    changed[:, :2, 2:] += 0.5  # the second patch
    moved = np.abs(np.asarray(run(params, changed, masked)) - whole).max(axis=(1, 2))
    assert moved[0] == 0 and moved[1] > 1e-3
    assert np.abs(np.asarray(run(params, images, jnp.zeros((2, 4), bool))) - whole).max(axis=(1, 2))[0] > 1e-3
    # The mean and the deviation of pixels are as good as other pixels.
    plain = module.clone(mean=(0.0,), std=(1.0,))
    np.testing.assert_allclose(jax.jit(plain.apply)(params, (images - 0.5) / 2, masked), whole, atol=1e-5)
    with pytest.raises(ValueError, match="images of 4x5: patches of 2 pixels"):
        module.apply(params, jnp.zeros((1, 4, 5, 1)))
