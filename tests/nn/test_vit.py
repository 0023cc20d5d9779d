"""The plain transformer: who sees whom, scanned against unrolled, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.vit import ViT

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


def test_masks_scan_and_dropout(randomize):
    module = ViT(depth=2, heads=2, scan_layers=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    variables = jax.tree.map(jnp.asarray, randomize(jax.eval_shape(module.init, jax.random.key(0), x)))
    seen = jnp.array([[[True, False, True, True, False]], [[True, True, True, True, True]]])
    want = jax.jit(module.apply)(variables, x, seen)
    # What is not seen by others changes only itself.
    changed = jax.jit(module.apply)(variables, x.at[:, 1, 0].add(1.0), seen)
    moved = np.abs(np.asarray(changed - want)).max(-1)
    assert (moved[0, [0, 2, 3, 4]] == 0).all() and (moved[0, 1] > 1e-3) and (moved[1] > 1e-4).all()
    inner = dict(variables["params"])
    stacked = inner.pop("blocks")
    inner |= {f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(2)}
    unrolled = jax.jit(module.clone(scan_layers=False).apply)({"params": inner}, x, seen)
    np.testing.assert_allclose(unrolled, want, atol=1e-5)
    drops = jax.jit(module.clone(dropout=0.5).apply, static_argnames="train")
    np.testing.assert_allclose(drops(variables, x, seen), want, atol=1e-6)
    rngs = {"dropout": jax.random.key(1)}
    assert np.abs(np.asarray(drops(variables, x, seen, train=True, rngs=rngs) - want)).max() > 0.1
