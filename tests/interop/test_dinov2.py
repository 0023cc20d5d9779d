"""DINOv2's published layout: features against a forward pass in NumPy by the authors' names, names of transformers, sizes."""

import math

import jax
import numpy as np
import pytest

from jaxgen.interop import dinov2
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.nn.feature_vit import FeatureViT
from jaxgen.recipes.features import FeatureConfig

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

WIDTH, HEADS, DEPTH, PATCH, SIDE = 16, 2, 2, 2, 3
IMAGES = np.random.default_rng(5).uniform(-1, 1, (2, SIDE * PATCH, SIDE * PATCH, 3)).astype(np.float32)
LARGER = np.random.default_rng(6).uniform(-1, 1, (2, 4 * PATCH, 5 * PATCH, 3)).astype(np.float32)


def checkpoint(*, gated=False, scales=True, registers=0, seed=0):
    """A state dict of the authors' names, every number of which matters."""
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0, offset=0.0):
        return (offset + scale * rng.standard_normal(shape)).astype(np.float32)

    def linear(name, inputs, outputs):
        return {f"{name}.weight": draw(outputs, inputs, scale=inputs**-0.5), f"{name}.bias": draw(outputs, scale=0.3)}

    def norm(name):
        return {f"{name}.weight": draw(WIDTH, scale=0.2, offset=1.0), f"{name}.bias": draw(WIDTH, scale=0.3)}

    state = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + SIDE**2, WIDTH), "mask_token": draw(1, WIDTH)}
    state |= {"patch_embed.proj.weight": draw(WIDTH, 3, PATCH, PATCH, scale=0.3), "patch_embed.proj.bias": draw(WIDTH)}
    if registers:
        state["register_tokens"] = draw(1, registers, WIDTH)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state |= linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH) | linear(f"{block}.attn.proj", WIDTH, WIDTH)
        if scales:
            state |= {f"{block}.ls{j}.gamma": draw(WIDTH, scale=0.5) for j in (1, 2)}
        if gated:  # int(4 * 16 * 2 / 3) = 42, in whole eights 48
            state |= linear(f"{block}.mlp.w12", WIDTH, 2 * 48) | linear(f"{block}.mlp.w3", 48, WIDTH)
        else:
            state |= linear(f"{block}.mlp.fc1", WIDTH, 4 * WIDTH) | linear(f"{block}.mlp.fc2", 4 * WIDTH, WIDTH)
    return state | norm("norm")


def forward(state, images, position=None):
    """Tokens in float64, written from the published architecture."""
    p = {name: np.float64(array) for name, array in state.items()}
    position = p["pos_embed"] if position is None else np.float64(position)

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    pixels = (np.float64(images) + 1) / 2  # what the authors' transform gives: standardised by ImageNet's channels
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    b, rows, columns = len(images), images.shape[1] // PATCH, images.shape[2] // PATCH
    cut = pixels.reshape(b, rows, PATCH, columns, PATCH, 3).transpose(0, 1, 3, 5, 2, 4).reshape(b, rows * columns, -1)
    x = cut @ p["patch_embed.proj.weight"].reshape(WIDTH, -1).T + p["patch_embed.proj.bias"]
    x = np.concatenate([np.broadcast_to(p["cls_token"], (b, 1, WIDTH)), x], axis=1) + position
    registers = np.repeat(p.get("register_tokens", np.zeros((1, 0, WIDTH))), b, axis=0)
    x = np.concatenate([x[:, :1], registers, x[:, 1:]], axis=1)
    erf = np.vectorize(math.erf)
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(b, -1, 3, HEADS, WIDTH // HEADS).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS))
        h = (scores / scores.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(b, -1, WIDTH)
        x = x + p.get(f"{block}.ls1.gamma", 1.0) * linear(h, f"{block}.attn.proj")
        h = norm(x, f"{block}.norm2")
        if f"{block}.mlp.w3.weight" in p:
            gate, value = np.split(linear(h, f"{block}.mlp.w12"), 2, axis=-1)
            h = linear(gate / (1 + np.exp(-gate)) * value, f"{block}.mlp.w3")
        else:
            h = linear(h, f"{block}.mlp.fc1")
            h = linear(h * 0.5 * (1 + erf(h / np.sqrt(2))), f"{block}.mlp.fc2")
        x = x + p.get(f"{block}.ls2.gamma", 1.0) * h
    x = norm(x, "norm")
    return np.concatenate([x[:, :1], x[:, 1 + registers.shape[1] :]], axis=1)


def written(tmp_path, state, name="model.safetensors"):
    write_safetensors(str(tmp_path / name), state)
    return str(tmp_path / name)


def check(model, state, images, position=None):
    whole, patches = model.features(images)
    want = forward(state, images, position)
    np.testing.assert_allclose(whole, want[:, 0], atol=2e-5)
    np.testing.assert_allclose(patches, want[:, 1:], atol=2e-5)


@pytest.mark.parametrize("gated, registers", [(False, 0), (True, 0), (False, 4)], ids=["gelu", "swiglu", "registers"])
def test_features_and_round_trip(gated, registers, tmp_path):
    state = checkpoint(gated=gated, registers=registers)
    model = dinov2.load(encoder=written(tmp_path, state), num_heads=HEADS, scan_layers=gated)
    sizes = dict(width=WIDTH, depth=DEPTH, heads=HEADS, patch=PATCH, grid=SIDE, registers=registers)
    sizes = FeatureConfig(**sizes, gated_mlp=gated, imagenet=True)
    assert model.encoder.clone(scan_layers=False) == sizes.build(3)  # what a recipe's stage would make
    check(model, state, IMAGES)
    saved = str(tmp_path / "saved.safetensors")
    model.save(encoder=saved)
    for name, array in state.items():  # keys' biases have no effect, and are not kept
        if name.endswith("qkv.bias"):
            array[WIDTH : 2 * WIDTH] = 0
    again = read_state_dict(saved)
    assert set(again) == set(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    model_again = dinov2.load(encoder=saved, num_heads=HEADS, scan_layers=gated)
    jax.tree.map(np.testing.assert_array_equal, model_again.params, model.params)


def test_positions_of_other_sizes(tmp_path):
    """Resampled as the published code does, which enlarges by a little more than the sizes say."""
    torch = pytest.importorskip("torch", reason="resamples with PyTorch's interpolate")
    state = checkpoint()
    model = dinov2.load(encoder=written(tmp_path, state), num_heads=HEADS)
    grid = torch.from_numpy(state["pos_embed"][:, 1:].reshape(1, SIDE, SIDE, WIDTH)).permute(0, 3, 1, 2)
    factors = tuple((n + 0.1) / SIDE for n in (4, 5))
    grid = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic").permute(0, 2, 3, 1)
    assert grid.shape == (1, 4, 5, WIDTH)
    check(model, state, LARGER, np.concatenate([state["pos_embed"][:, :1], grid.reshape(1, -1, WIDTH).numpy()], axis=1))


@pytest.mark.parametrize("sides", [(4, 5), (2, 1)], ids=["enlarged", "reduced"])
def test_positions_of_other_sizes_with_registers(sides, tmp_path):
    """PyTorch's antialiased bicubic to a size: Keys' kernel with a = -0.5, over pixels of the smaller grid, and normalised."""

    def matrix(n):
        scale = SIDE / n
        x = np.abs(np.arange(SIDE) + 0.5 - scale * (np.arange(n)[:, None] + 0.5)) / max(scale, 1)
        far = -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
        weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, far, 0))
        return weights / weights.sum(1, keepdims=True)

    state = checkpoint(registers=4)
    model = dinov2.load(encoder=written(tmp_path, state), num_heads=HEADS)
    images = np.random.default_rng(7).uniform(-1, 1, (2, sides[0] * PATCH, sides[1] * PATCH, 3)).astype(np.float32)
    grid = np.einsum("Hh,Ww,hwd->HWd", *map(matrix, sides), state["pos_embed"][0, 1:].reshape(SIDE, SIDE, WIDTH))
    check(model, state, images, np.concatenate([state["pos_embed"][:, :1], grid.reshape(1, -1, WIDTH)], axis=1))


def test_names_of_transformers_and_of_dino(tmp_path):
    state = checkpoint(gated=True, registers=4)
    layer, theirs = "encoder.layer", {}
    for name, array in state.items():
        parts = name.split(".")
        if name in ("cls_token", "mask_token", "register_tokens"):
            theirs[f"dinov2_with_registers.embeddings.{name}"] = array
        elif name == "pos_embed":
            theirs["embeddings.position_embeddings"] = array
        elif parts[0] == "patch_embed":
            theirs[f"embeddings.patch_embeddings.projection.{parts[-1]}"] = array
        elif parts[0] == "norm":
            theirs[f"layernorm.{parts[-1]}"] = array
        elif "qkv" in parts:
            for part, piece in zip(("query", "key", "value"), np.split(array, 3)):
                theirs[f"{layer}.{parts[1]}.attention.attention.{part}.{parts[-1]}"] = piece
        elif "attn" in parts:
            theirs[f"{layer}.{parts[1]}.attention.output.dense.{parts[-1]}"] = array
        elif parts[2] in ("ls1", "ls2"):
            theirs[f"{layer}.{parts[1]}.layer_scale{parts[2][-1]}.lambda1"] = array
        elif "mlp" in parts:
            names = {"w12": "weights_in", "w3": "weights_out"}
            theirs[f"{layer}.{parts[1]}.mlp.{names[parts[3]]}.{parts[-1]}"] = array
        else:
            theirs[f"{layer}.{'.'.join(parts[1:])}"] = array
    ours, renamed = (written(tmp_path, s, f"{i}.safetensors") for i, s in enumerate((state, theirs)))
    jax.tree.map(
        np.testing.assert_array_equal,
        dinov2.load(encoder=renamed, num_heads=HEADS).params,
        dinov2.load(encoder=ours, num_heads=HEADS).params,
    )
    plain = checkpoint(scales=False)
    del plain["mask_token"]
    model = dinov2.load(encoder=written(tmp_path, plain), num_heads=HEADS)
    assert not model.encoder.layer_scale
    check(model, plain, IMAGES)


# Widths, blocks, and how many numbers the published models have.
SIZES = {"S": (384, 12, 22056576), "B": (768, 12, 86580480), "L": (1024, 24, 304368640), "g": (1536, 40, 1136480768)}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    """As many numbers as the published models have, but for the biases of keys; those with registers have 4 vectors more."""
    width, depth, published = SIZES[size]
    model = FeatureViT(width=width, depth=depth, heads=width // 64, gated_mlp=size == "g", scan_layers=True)
    for registers in (0, 4):
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.clone(registers=registers).param_shapes()))
        assert count == published - depth * width + registers * width


def test_bad_input(tmp_path):
    state = checkpoint()
    path = written(tmp_path, state)
    with pytest.raises(ValueError, match="0 heads of width 16"):
        dinov2.load(encoder=path)
    with pytest.raises(ValueError, match="num_heads=3"):
        dinov2.load(encoder=path, num_heads=3)
    model = dinov2.load(encoder=path, num_heads=HEADS)
    with pytest.raises(ValueError, match="images of 6x7: patches of 2 pixels do not fill them"):
        model.features(np.zeros((1, 6, 7, 3)))
    with pytest.raises(ValueError, match=r"images \(1, 6, 6, 1\): expected \[b, H, W, 3\]"):
        model.features(np.zeros((1, 6, 6, 1)))
    extra = written(tmp_path, state | {"storage_tokens": np.zeros((1, 4, WIDTH), np.float32)})
    with pytest.raises(ValueError, match="unknown names: storage_tokens"):
        dinov2.load(encoder=extra, num_heads=HEADS)
    less = written(tmp_path, {name: x for name, x in state.items() if name != "blocks.0.ls2.gamma"})
    with pytest.raises(ValueError, match=r"missing: transformer/blocks_0/gamma2 \(blocks.0.ls2.gamma\)"):
        dinov2.load(encoder=less, num_heads=HEADS)
