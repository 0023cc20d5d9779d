import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn import AdaLNHead, Modulation, SharedModulation, layer_norm

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, size=(2, 5, 8)).astype(np.float32)
COND = RNG.normal(size=(2, 8)).astype(np.float32)


def silu(x):
    return x / (1 + np.exp(-x))


def norm(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def test_layer_norm():
    np.testing.assert_allclose(layer_norm(X), norm(X), atol=2e-6)
    np.testing.assert_allclose(layer_norm(X * 1e-3), norm(X * 1e-3), atol=2e-5)  # where epsilon matters
    assert layer_norm(jnp.asarray(X, jnp.bfloat16)).dtype == jnp.float32
    # Far from zero E x^2 - (E x)^2 has no digits left.
    np.testing.assert_allclose(layer_norm(np.float32(4096) + X), norm(np.float32(4096) + X), atol=2e-3)


def test_modulation_is_six_projections_of_the_condition(randomize):
    module = Modulation(4)
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), COND))
    dense = params["params"]["dense"]
    want = np.stack([silu(COND.astype(np.float64)) @ dense["kernel"][:, i] + dense["bias"][i] for i in range(6)], axis=1)
    np.testing.assert_allclose(jax.jit(module.apply)(params, COND), want, atol=2e-6)


def test_initial_gates_and_the_rest_have_their_own_scale():
    cond = np.ones((1, 64), np.float32)
    init = nn.initializers.normal(1.0)
    module = Modulation(256, kernel_init=init, gate_init=1e-3, rest_init=0.5)
    dense = jax.jit(module.init)(jax.random.key(0), cond)["params"]["dense"]
    np.testing.assert_allclose(dense["kernel"].std(axis=(0, 2)), [1e-3] * 2 + [0.5] * 4, rtol=0.05)
    assert not np.any(dense["bias"])
    shared = np.zeros((1, 6, 4096), np.float32)
    module = SharedModulation(gate_init=1e-3, rest_init=0.5)
    offset = jax.jit(module.init)(jax.random.key(0), shared)["params"]["offset"]
    np.testing.assert_allclose(offset.std(axis=1) * 64, [1e-3] * 2 + [0.5] * 4, rtol=0.05)


def test_shared_modulation_adds_the_block_s_offset(randomize):
    shared = RNG.normal(size=(2, 6, 4)).astype(np.float32)
    params = randomize(jax.eval_shape(SharedModulation().init, jax.random.key(0), shared))
    want = shared + params["params"]["offset"][None]
    np.testing.assert_allclose(SharedModulation().apply(params, shared), want, atol=1e-6)


def test_head(randomize):
    module = AdaLNHead(11)
    params = randomize(jax.eval_shape(module.init, jax.random.key(0), X, COND))
    p = jax.tree.map(np.float64, params["params"])
    scale, shift = (silu(COND.astype(np.float64)) @ p["ada"]["kernel"][:, i] + p["ada"]["bias"][i] for i in range(2))
    want = (norm(X) * (1 + scale[:, None]) + shift[:, None]) @ p["head"]["kernel"] + p["head"]["bias"]
    apply = jax.jit(module.apply)
    np.testing.assert_allclose(apply(params, X, COND), want, atol=5e-6)
    assert apply(params, jnp.asarray(X, jnp.bfloat16), COND).dtype == jnp.float32


def test_head_init_scales_the_classifier():
    module = AdaLNHead(11, kernel_init=nn.initializers.ones_init(), rest_init=0.5, head_init=0.02)
    params = jax.jit(module.init)(jax.random.key(0), X, COND)["params"]
    np.testing.assert_allclose(params["head"]["kernel"], np.full((8, 11), 0.02), rtol=1e-6)
    np.testing.assert_allclose(params["ada"]["kernel"], np.full((8, 2, 8), 0.5), rtol=1e-6)


def test_a_condition_for_each_position(randomize):
    module = AdaLNHead(11)
    params, apply = randomize(jax.eval_shape(module.init, jax.random.key(0), X, COND)), jax.jit(module.apply)
    conds = RNG.normal(size=X.shape).astype(np.float32)
    got = apply(params, X, conds)
    for i in range(X.shape[1]):
        np.testing.assert_allclose(got[:, i], apply(params, X, conds[:, i])[:, i], atol=5e-6)
