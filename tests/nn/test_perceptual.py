import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.interop import files
from jaxgen.nn.perceptual import NO_PERCEPTUAL, VGG16Features, load_perceptual, lpips

WIDTHS = (4, 6, 5, 8, 7)
# torchvision's vgg16.features: "M" pools, every convolution is followed by a ReLU that takes an index of its own.
PLAN = (0, 0, "M", 1, 1, "M", 2, 2, 2, "M", 3, 3, 3, "M", 4, 4, 4, "M")


def vgg_state(seed: int = 0, widths=WIDTHS) -> dict[str, np.ndarray]:
    rng, state, index, channels = np.random.default_rng(seed), {}, 0, 3
    for item in PLAN:
        if item == "M":
            index += 1
            continue
        scale = (2 / (9 * channels)) ** 0.5
        state[f"features.{index}.weight"] = rng.normal(size=(widths[item], channels, 3, 3)).astype(np.float32) * scale
        state[f"features.{index}.bias"] = rng.normal(size=widths[item]).astype(np.float32) * 0.1
        channels, index = widths[item], index + 2
    return state | {"classifier.0.weight": np.zeros((2, 2), np.float32), "classifier.6.bias": np.zeros(2, np.float32)}


def lin_state(seed: int = 1, widths=WIDTHS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"lin{i}.model.1.weight": rng.random((1, w, 1, 1)).astype(np.float32) for i, w in enumerate(widths)}


@pytest.fixture
def weights(tmp_path):
    files.write_safetensors(tmp_path / "vgg.safetensors", vgg_state())
    files.write_safetensors(tmp_path / "lin.safetensors", lin_state())
    return tmp_path / "vgg.safetensors", tmp_path / "lin.safetensors"


def images(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, size=(2, 32, 32, channels)).astype(np.float32)


def reference_taps(state, x):
    """Channel-first float64 VGG, one shifted sum per position of the window; x is [b, 3, H, W]."""
    taps, index = [], 0
    for item in PLAN:
        if item == "M":
            taps.append(x)
            b, c, h, w = x.shape
            x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, c, h // 2, 2, w // 2, 2).max(axis=(3, 5))
            index += 1
            continue
        weight, bias = (state[f"features.{index}.{k}"].astype(np.float64) for k in ("weight", "bias"))
        padded, (h, w) = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), x.shape[2:]
        windows = (
            np.einsum("oc,bchw->bohw", weight[:, :, dy, dx], padded[:, :, dy : dy + h, dx : dx + w])
            for dy in range(3)
            for dx in range(3)
        )
        x = np.maximum(sum(windows) + bias[:, None, None], 0)
        index += 2
    return taps


def reference_distance(state, lin, a, b):
    """LPIPS in float64, pixel by pixel as its paper writes it."""
    mean, std = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    taps_a, taps_b = (reference_taps(state, ((x.astype(np.float64) - mean) / std).transpose(0, 3, 1, 2)) for x in (a, b))
    total = np.zeros(len(a))
    for i, (fa, fb) in enumerate(zip(taps_a, taps_b)):
        w = np.ones(fa.shape[1]) if lin is None else lin[f"lin{i}.model.1.weight"].astype(np.float64).ravel()
        for n, y, x in np.ndindex(fa.shape[0], *fa.shape[2:]):
            u, v = fa[n, :, y, x], fb[n, :, y, x]
            difference = u / (np.linalg.norm(u) + 1e-10) - v / (np.linalg.norm(v) + 1e-10)
            total[n] += w @ difference**2 / (fa.shape[2] * fa.shape[3])
    return total


def test_features_match_float64_reference(weights):
    params = load_perceptual(weights[0])
    x = images(0)[:, :, :24]  # not square
    taps = VGG16Features(WIDTHS).apply({"params": params["vgg"]}, x)
    want = reference_taps(vgg_state(), x.astype(np.float64).transpose(0, 3, 1, 2))
    assert [t.shape[1:] for t in taps] == [(32, 24, 4), (16, 12, 6), (8, 6, 5), (4, 3, 8), (2, 1, 7)]
    for got, ref in zip(taps, want):
        np.testing.assert_allclose(got, ref.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_lin", [False, True])
def test_distance_matches_float64_reference(weights, with_lin):
    params = load_perceptual(weights[0], weights[1] if with_lin else None)
    a, b = images(0), images(1)
    want = reference_distance(vgg_state(), lin_state() if with_lin else None, a, b)
    np.testing.assert_allclose(lpips(params, a, b), want, rtol=2e-5)
    np.testing.assert_array_equal(lpips(params, a, a), 0.0)
    # A pair's distance does not depend on the rest of the batch.
    np.testing.assert_allclose(lpips(params, a[1:], b[1:]), want[1:], rtol=2e-5)


def test_distance_as_torch_computes_it(weights):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's convolutions")
    state, lin, (a, b) = vgg_state(), lin_state(), (images(0), images(1))
    x = torch.tensor(np.concatenate([a, b])).permute(0, 3, 1, 2)
    x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    total, index, slices = torch.zeros(2), 0, 0
    for item in PLAN:
        if item == "M":
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[:2] - unit[2:]).square()
            weight = torch.tensor(lin[f"lin{slices}.model.1.weight"])
            total += torch.nn.functional.conv2d(difference, weight).mean((1, 2, 3))
            x, index, slices = torch.nn.functional.max_pool2d(x, 2), index + 1, slices + 1
        else:
            kernel, bias = (torch.tensor(state[f"features.{index}.{k}"]) for k in ("weight", "bias"))
            x, index = torch.relu(torch.nn.functional.conv2d(x, kernel, bias, padding=1)), index + 2
    np.testing.assert_allclose(lpips(load_perceptual(*weights), a, b), total.numpy(), rtol=1e-5)


def test_grey_images_and_precision(weights):
    params = load_perceptual(*weights)
    a, b = images(0, 1), images(1, 1)
    exact = lpips(params, np.repeat(a, 3, -1), np.repeat(b, 3, -1))
    np.testing.assert_allclose(lpips(params, a, b), exact, rtol=1e-6)
    half = lpips(params, a, b, dtype=jnp.bfloat16)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.05 * exact.max()


def test_gradients_are_finite_where_features_vanish(weights):
    params = load_perceptual(*weights)
    dead = jax.tree.map(np.zeros_like, params["vgg"])
    a, b = images(0), images(1)
    gradient = jax.jit(jax.grad(lambda a, vgg: lpips(params | {"vgg": vgg}, a, b).sum()))
    np.testing.assert_array_equal(gradient(a, dead), 0.0)
    alive = gradient(a, params["vgg"])
    assert np.isfinite(alive).all() and np.abs(alive).max() > 0
    direction = np.random.default_rng(2).normal(size=a.shape)
    step = 1e-6
    slope = reference_distance(vgg_state(), lin_state(), a + step * direction, b).sum()
    slope -= reference_distance(vgg_state(), lin_state(), a - step * direction, b).sum()
    np.testing.assert_allclose((alive * direction).sum(), slope / (2 * step), rtol=1e-3)


def test_bad_input(weights, tmp_path):
    params = load_perceptual(*weights)
    with pytest.raises(ValueError, match="8x8 are too small"):
        lpips(params, images(0)[:, :8, :8], images(1)[:, :8, :8])
    with pytest.raises(ValueError, match="equal shapes"):
        lpips(params, images(0), images(1)[:1])
    with pytest.raises(ValueError, match="equal shapes"):
        lpips(params, images(0, 2), images(1, 2))
    with pytest.raises(ValueError, match="5 slices"):
        VGG16Features((4, 4)).init(jax.random.key(0), images(0))

    def write(state):
        files.write_safetensors(tmp_path / "bad.safetensors", state)
        return tmp_path / "bad.safetensors"

    deeper = vgg_state() | {"features.30.weight": np.zeros((7, 7, 3, 3), np.float32)}
    with pytest.raises(ValueError, match="bad.safetensors: not the weights of a VGG16 .*features.30.weight"):
        load_perceptual(write(deeper))
    with pytest.raises(ValueError, match="bad.safetensors: not the weights of a VGG16 .*features.0.bias"):
        load_perceptual(write(lin_state()))
    with pytest.raises(ValueError, match=r"VGG16 .*conv2_1/kernel \(features.5.weight\) has .*, expected"):
        load_perceptual(write(vgg_state() | {"features.5.weight": np.zeros((6, 9, 3, 3), np.float32)}))
    with pytest.raises(ValueError, match=r"bad.safetensors: not LPIPS weights .*has \(9,\), expected \(4,\)"):
        load_perceptual(weights[0], write(lin_state(widths=(9, *WIDTHS[1:]))))
    with pytest.raises(ValueError, match="none.pth: no such file"):
        load_perceptual(tmp_path / "none.pth")


def test_the_message_says_what_to_do():
    assert "no perceptual network" in NO_PERCEPTUAL and "vgg16" in NO_PERCEPTUAL and "\n" not in NO_PERCEPTUAL


def test_published_sizes():
    """torchvision's vgg16 has 14,714,688 parameters in its convolutions."""
    shapes = jax.eval_shape(VGG16Features().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 14_714_688
