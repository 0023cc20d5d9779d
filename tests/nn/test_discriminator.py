import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.discriminator import PatchDiscriminator

KEY = jax.random.key(0)


def images(side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(side).uniform(-1, 1, size=(2, side, side, channels)).astype(np.float32)


def reference(params, x, layers):
    """Float64 loops over output positions; x is [b, h, w, c]."""

    def conv(x, layer, stride):
        kernel, bias = np.float64(layer["kernel"]), np.float64(layer.get("bias", 0))
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        h, w = ((n - 4) // stride + 1 for n in x.shape[1:3])
        out = np.zeros((len(x), h, w, kernel.shape[-1]))
        for i, j in np.ndindex(h, w):
            window = x[:, i * stride : i * stride + 4, j * stride : j * stride + 4]
            out[:, i, j] = np.tensordot(window, kernel, 3) + bias
        return out

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    x = leaky(conv(np.float64(x), params["conv0"], 2))
    for n in range(1, layers + 1):
        x = conv(x, params[f"conv{n}"], 2 if n < layers else 1)
        groups = x.reshape(*x.shape[:3], -1, 16)
        mean, var = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
        x = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        x = leaky(x * np.float64(params[f"norm{n}"]["scale"]) + np.float64(params[f"norm{n}"]["bias"]))
    return conv(x, params["out"], 1)[..., 0]


@pytest.mark.parametrize("side, layers", [(8, 1), (19, 2), (24, 3)])
def test_matches_float64_reference(side, layers):
    net = PatchDiscriminator(width=8, layers=layers)
    params = net.init(KEY, images(side))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.3, params)
    got = net.apply({"params": params}, images(side))
    assert got.shape == (2, side // 2**layers - 2, side // 2**layers - 2)
    np.testing.assert_allclose(got, reference(params, images(side), layers), rtol=1e-4, atol=1e-4)


def test_published_shapes():
    """Isola et al. 2017: 256 pixels become 30x30 patches; channels double up to eightfold."""
    net = PatchDiscriminator(width=8)
    shapes = jax.eval_shape(net.init, KEY, jnp.zeros((1, 256, 256, 3)))["params"]
    assert jax.eval_shape(net.init_with_output, KEY, jnp.zeros((1, 256, 256, 3)))[0].shape == (1, 30, 30)
    assert [shapes[f"conv{n}"]["kernel"].shape[-1] for n in range(4)] == [8, 16, 32, 64]
    deep = jax.eval_shape(PatchDiscriminator(width=8, layers=5).init, KEY, jnp.zeros((1, 256, 256, 3)))["params"]
    assert deep["conv5"]["kernel"].shape == (4, 4, 64, 64)


def test_an_image_is_judged_alone():
    """What batch norm would break: the logits of an image change with its neighbours."""
    net = PatchDiscriminator(width=8, layers=2)
    x = images(16)
    params = net.init(KEY, x)
    np.testing.assert_allclose(net.apply(params, x)[1:], net.apply(params, x[1:]), atol=1e-6)


def test_learns_to_tell_two_kinds_apart():
    net = PatchDiscriminator(width=8, layers=1)
    stripes = np.tile(np.array([1.0, -1.0], np.float32), (4, 8, 4))[..., None]
    real, fake = stripes, stripes.transpose(0, 2, 1, 3)
    params = net.init(KEY, real)

    @jax.jit
    def step(params):
        def loss(p):
            return jnp.mean(jax.nn.softplus(-net.apply(p, real))) + jnp.mean(jax.nn.softplus(net.apply(p, fake)))

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    for _ in range(60):
        params, value = step(params)
    assert value < 0.1
    assert net.apply(params, real).min() > 0 > net.apply(params, fake).max()


def test_precision():
    x = images(16)
    params = PatchDiscriminator(width=8, layers=2).init(KEY, x)
    exact = PatchDiscriminator(width=8, layers=2).apply(params, x)
    half = PatchDiscriminator(width=8, layers=2, dtype=jnp.bfloat16).apply(params, x)
    assert half.dtype == jnp.float32 and 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    "side, fields, message",
    [
        (8, {"layers": 2}, "layers=2: images of 8x8 take 1 to 1"),
        (64, {"layers": 5}, "layers=5: images of 64x64 take 1 to 4"),
        (64, {"layers": 0}, "layers=0"),
        (64, {"width": 12}, "width=12: expected a positive multiple of 8"),
        (64, {"width": 0}, "width=0"),
    ],
)
def test_bad_fields(side, fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(PatchDiscriminator(**({"width": 8} | fields)).init, KEY, jnp.zeros((1, side, side, 3)))
