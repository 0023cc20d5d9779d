"""GPTQ against its definition: after each rounding, the weights that are still free solve least squares exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.adapters import gptq
from kernels_pallas.int4 import group_scales, nearest, pack_values, unpack_int4

pytestmark = pytest.mark.numeric


def correlated(rows, k, seed):
    """Inputs whose channels share a few causes, as activations do."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(rows, max(2, k // 8)))
    return causes @ rng.normal(size=(causes.shape[1], k)) + 0.3 * rng.normal(size=(rows, k))


def by_definition(w, hessian, group, damp):
    """float64: row i is rounded; rows after i minimise the error in the outputs, given all rows rounded so far."""
    k, n = w.shape
    hessian = hessian + damp * np.diagonal(hessian).mean() * np.eye(k)
    q, scales, done = np.zeros((k, n)), np.zeros((k // group, n)), np.zeros((k, n))
    for i in range(k):
        free = w[i:].copy()
        if i:
            free -= np.linalg.solve(hessian[i:, i:], hessian[i:, :i] @ (done[:i] - w[:i]))
        if i % group == 0:
            scales[i // group] = np.abs(free[:group]).max(axis=0) / 7
        q[i] = np.clip(np.round(free[0] / scales[i // group]), -8, 7)
        done[i] = q[i] * scales[i // group]
    return q, scales


@pytest.mark.parametrize("k, n, group", [(16, 5, 8), (24, 3, 24), (32, 4, 8)])
def test_it_is_optimal_brain_quantisation_in_order(k, n, group):
    rng = np.random.default_rng(k)
    w, x = rng.normal(size=(k, n)), correlated(200, k, k)
    want, want_scales = by_definition(w, x.T @ x, group, 0.01)
    q, scales = gptq(jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), group, clip="max", scale_dtype=jnp.float32)
    np.testing.assert_array_equal(q, want)
    np.testing.assert_allclose(scales, want_scales, rtol=1e-3)
    plain = nearest(jnp.asarray(w, jnp.float32), group_scales(jnp.asarray(w, jnp.float32), group, clip="max"))
    assert (np.asarray(plain) != want).mean() > 0.05


@pytest.mark.parametrize("clip", ["max", "mse"])
def test_outputs_change_less_than_by_rounding_to_nearest(clip):
    """On new inputs of the same kind, not those of the Hessian."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(128, 32)).astype(np.float32)
    seen, new = np.split(correlated(1024, 128, 1).astype(np.float32), 2)
    q, scales = gptq(jnp.asarray(w), jnp.asarray(seen.T @ seen), 32, clip=clip)
    plain = group_scales(jnp.asarray(w), 32, clip=clip, dtype=jnp.bfloat16)

    def error(q, scales):
        rounded = np.asarray(q, np.float64) * np.repeat(np.asarray(scales, np.float64), 32, axis=0)
        return np.square(new @ (rounded - w)).mean(), np.square(rounded - w).mean()

    ours, nearest_ = error(q, scales), error(nearest(jnp.asarray(w), plain), plain)
    assert ours[0] < 0.5 * nearest_[0] and ours[1] > nearest_[1]
    np.testing.assert_array_equal(unpack_int4(pack_values(q, scales)), q)


def test_without_correlation_it_rounds_to_nearest():
    w = jax.random.normal(jax.random.key(0), (32, 6))
    q, scales = gptq(w, 3.0 * jnp.eye(32), 16, clip="mse")
    np.testing.assert_array_equal(scales, group_scales(w, 16, clip="mse", dtype=jnp.bfloat16))
    np.testing.assert_array_equal(q, nearest(w, scales))


def test_inputs_that_were_never_seen_have_no_weight():
    x = correlated(64, 16, 2)
    x[:, 3] = 0
    q, scales = gptq(jnp.ones((16, 2)), jnp.asarray(x.T @ x, jnp.float32), 8)
    assert not q[3].any() and np.isfinite(np.asarray(scales, np.float32)).all()


def test_the_hessians_factor_is_free_and_damping_is_not():
    x = correlated(64, 16, 3)
    w, hessian = jax.random.normal(jax.random.key(1), (16, 8)), jnp.asarray(x.T @ x, jnp.float32)
    once = gptq(w, hessian, 8)
    jax.tree.map(np.testing.assert_array_equal, once, gptq(w, 2 * hessian, 8))
    assert (gptq(w, hessian, 8, damp=100.0)[0] != once[0]).any()


def test_a_stack_is_its_layers():
    x = np.stack([correlated(64, 16, seed) for seed in (4, 5)])
    w = jax.random.normal(jax.random.key(2), (2, 16, 3))
    hessians = jnp.asarray(np.einsum("lbi,lbj->lij", x, x), jnp.float32)
    both = gptq(w, hessians, 8)
    for i in range(2):
        jax.tree.map(lambda stack, one, i=i: np.testing.assert_array_equal(stack[i], one), both, gptq(w[i], hessians[i], 8))


def test_bad_input():
    with pytest.raises(ValueError, match=r"w \(16, 3\) and hessian \(3, 3\) must be"):
        gptq(jnp.ones((16, 3)), jnp.eye(3))
    with pytest.raises(ValueError, match="group=32 does not divide the 16 rows"):
        gptq(jnp.ones((16, 3)), jnp.eye(16), 32)
    with pytest.raises(ValueError, match="clip='best'"):
        gptq(jnp.ones((16, 3)), jnp.eye(16), 8, clip="best")
