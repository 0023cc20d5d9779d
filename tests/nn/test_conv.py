import jax
import numpy as np
import pytest

from jaxgen.nn.conv import AttentionBlock, Downsample, ResBlock, Upsample

pytestmark = pytest.mark.numeric

X = np.random.default_rng(0).normal(size=(2, 4, 6, 8)).astype(np.float32)


def conv(x, p, stride=1, pad=((1, 1), (1, 1))):
    """A cross-correlation, a window at a time."""
    kernel = np.asarray(p["kernel"], np.float64)
    kh, kw = kernel.shape[:2]
    x = np.pad(x, ((0, 0), *pad, (0, 0)))
    h, w = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    out = np.zeros((x.shape[0], h, w, kernel.shape[-1]))
    for i, j in np.ndindex(h, w):
        window = x[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
        out[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    return out + np.asarray(p["bias"], np.float64)


def group_norm(x, p, groups=4):
    parts = x.reshape(*x.shape[:3], groups, -1)
    mean, var = parts.mean((1, 2, 4), keepdims=True), parts.var((1, 2, 4), keepdims=True)
    return ((parts - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def make(module, randomize, x=X):
    variables = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
    return np.asarray(jax.jit(module.apply)(variables, x)), variables["params"]


@pytest.mark.parametrize("channels", [8, 12])
def test_res_block(randomize, channels):
    got, p = make(ResBlock(channels, groups=4), randomize)
    x = X.astype(np.float64)
    h = conv(silu(group_norm(x, p["norm1"])), p["conv1"])
    h = conv(silu(group_norm(h, p["norm2"])), p["conv2"])
    shortcut = conv(x, p["shortcut"], pad=((0, 0), (0, 0))) if channels != 8 else x
    assert ("shortcut" in p) == (channels != 8)
    np.testing.assert_allclose(got, shortcut + h, atol=1e-5)


def test_res_block_dropout_is_for_training(randomize):
    module = ResBlock(8, groups=4, dropout=0.5)
    variables = randomize(jax.eval_shape(module.init, jax.random.key(0), X))
    apply = jax.jit(module.apply, static_argnums=2)
    plain = apply(variables, X)
    np.testing.assert_array_equal(plain, jax.jit(ResBlock(8, groups=4).apply)(variables, X))
    dropped = apply(variables, X, True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(dropped - plain).max() > 1e-2


def test_group_norm_keeps_its_digits_far_from_zero(randomize):
    x = X + 1000
    got, p = make(ResBlock(8, groups=4), randomize, x)
    y = x.astype(np.float64)
    h = conv(silu(group_norm(y, p["norm1"])), p["conv1"])
    want = y + conv(silu(group_norm(h, p["norm2"])), p["conv2"])
    np.testing.assert_allclose(got, want, atol=5e-3)


def test_attention_block_is_single_headed_with_a_residual(randomize):
    got, p = make(AttentionBlock(groups=4), randomize)
    x = X.astype(np.float64)
    normed = group_norm(x, p["norm"]).reshape(2, 24, 8)
    q, k, v = np.split(normed @ p["qkv"]["kernel"] + p["qkv"]["bias"], 3, axis=-1)
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(8)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ v
    want = x + (out @ p["proj"]["kernel"] + p["proj"]["bias"]).reshape(x.shape)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_downsample_pads_bottom_and_right(randomize):
    got, p = make(Downsample(), randomize)
    assert got.shape == (2, 2, 3, 8)
    want = conv(X.astype(np.float64), p["conv"], stride=2, pad=((0, 1), (0, 1)))
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_upsample_repeats_pixels(randomize):
    got, p = make(Upsample(), randomize)
    large = np.zeros((2, 8, 12, 8))
    for i, j in np.ndindex(8, 12):
        large[:, i, j] = X[:, i // 2, j // 2]
    np.testing.assert_allclose(got, conv(large, p["conv"]), atol=5e-6)
