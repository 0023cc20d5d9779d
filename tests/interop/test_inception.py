"""InceptionV3 against a PyTorch network of the published layout, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.interop import files, inception
from jaxgen.nn.inception import InceptionV3, inception_input

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

# The published layout, written down once more: block -> branch -> channels out, window. Inputs follow from the order.
A = {
    "branch1x1": (64, 1, 1),
    "branch5x5_1": (48, 1, 1),
    "branch5x5_2": (64, 5, 5),
    "branch3x3dbl_1": (64, 1, 1),
    "branch3x3dbl_2": (96, 3, 3),
    "branch3x3dbl_3": (96, 3, 3),
}
B = {"branch3x3": (384, 3, 3), "branch3x3dbl_1": (64, 1, 1), "branch3x3dbl_2": (96, 3, 3), "branch3x3dbl_3": (96, 3, 3)}
D = {
    "branch3x3_1": (192, 1, 1),
    "branch3x3_2": (320, 3, 3),
    "branch7x7x3_1": (192, 1, 1),
    "branch7x7x3_2": (192, 1, 7),
    "branch7x7x3_3": (192, 7, 1),
    "branch7x7x3_4": (192, 3, 3),
}
E = {
    "branch1x1": (320, 1, 1),
    "branch3x3_1": (384, 1, 1),
    "branch3x3_2a": (384, 1, 3),
    "branch3x3_2b": (384, 3, 1),
    "branch3x3dbl_1": (448, 1, 1),
    "branch3x3dbl_2": (384, 3, 3),
    "branch3x3dbl_3a": (384, 1, 3),
    "branch3x3dbl_3b": (384, 3, 1),
    "branch_pool": (192, 1, 1),
}


def c_block(c):
    sevens = {"branch7x7_1": (c, 1, 1), "branch7x7_2": (c, 1, 7), "branch7x7_3": (192, 7, 1)}
    long = {"1": (c, 1, 1), "2": (c, 7, 1), "3": (c, 1, 7), "4": (c, 7, 1), "5": (192, 1, 7)}
    return {
        "branch1x1": (192, 1, 1),
        **sevens,
        **{f"branch7x7dbl_{i}": conv for i, conv in long.items()},
        "branch_pool": (192, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": (192, A | {"branch_pool": (32, 1, 1)}),
    "Mixed_5c": (256, A | {"branch_pool": (64, 1, 1)}),
    "Mixed_5d": (288, A | {"branch_pool": (64, 1, 1)}),
    "Mixed_6a": (288, B),
    "Mixed_6b": (768, c_block(128)),
    "Mixed_6c": (768, c_block(160)),
    "Mixed_6d": (768, c_block(160)),
    "Mixed_6e": (768, c_block(192)),
    "Mixed_7a": (768, D),
    "Mixed_7b": (1280, E),
    "Mixed_7c": (2048, E),
}
STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}


def convolutions():
    """(name, channels in, channels out, height, width of the window) of every convolution."""
    for name, (c_in, *rest) in STEM.items():
        yield name, c_in, *rest
    for block, (c_in, branches) in BLOCKS.items():
        before = None
        for name, (c_out, *window) in branches.items():
            first = name.endswith("_1") or "_" not in name or name == "branch_pool"
            # 2a and 2b read the same input, and so do 3a and 3b.
            source = c_in if first else before
            yield f"{block}.{name}", source, c_out, *window
            if not name.endswith("a"):
                before = c_out


def random_state(classes=1008, seed=0):
    """A state dict in which activations keep their size, and every vector matters."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, c_in, c_out, *window in convolutions():
        state[f"{name}.conv.weight"] = rng.normal(size=(c_out, c_in, *window)) * (2 / (c_in * np.prod(window))) ** 0.5
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, c_out)
        state[f"{name}.bn.bias"] = rng.normal(size=c_out) * 0.2
        state[f"{name}.bn.running_mean"] = rng.normal(size=c_out) * 0.2
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, c_out)
        state[f"{name}.bn.num_batches_tracked"] = np.array(3)
    state["fc.weight"], state["fc.bias"] = rng.normal(size=(classes, 2048)) * 0.05, rng.normal(size=classes)
    return {name: x.astype(np.int64 if x.dtype.kind == "i" else np.float32) for name, x in state.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    state, path = random_state(), tmp_path_factory.mktemp("inception") / "weights.safetensors"
    files.write_safetensors(path, state)
    return state, path


class Torch:
    """The network in PyTorch's functions. `tensorflow` as in InceptionV3."""

    def __init__(self, state, tensorflow):
        torch = pytest.importorskip("torch")
        self.f = torch.nn.functional
        self.torch, self.tensorflow = torch, tensorflow
        self.state = {name: torch.from_numpy(np.asarray(x)) for name, x in state.items()}

    def conv(self, x, name, stride=1, same=True):
        s = self.state
        weight = s[f"{name}.conv.weight"]
        padding = tuple(n // 2 for n in weight.shape[2:]) if same else 0
        x = self.f.conv2d(x, weight, stride=stride, padding=padding)
        norm = [s[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return self.f.relu(self.f.batch_norm(x, *norm, eps=0.001))

    def branch(self, x, block, *names, last=1):
        for name in names:
            stride = last if name == names[-1] else 1
            x = self.conv(x, f"{block}.{name}", stride, same=stride == 1)
        return x

    def pooled(self, x, block, take_max=False):
        if take_max:
            x = self.f.max_pool2d(x, 3, 1, 1)
        else:
            x = self.f.avg_pool2d(x, 3, 1, 1, count_include_pad=not self.tensorflow)
        return self.conv(x, f"{block}.branch_pool")

    def block(self, x, name):
        def branch(*names, last=1):
            return self.branch(x, name, *names, last=last)

        def many(stem, count):
            return [f"{stem}_{i + 1}" for i in range(count)]

        kind = BLOCKS[name][1]
        if name.startswith("Mixed_5"):
            out = [branch("branch1x1"), branch(*many("branch5x5", 2)), branch(*many("branch3x3dbl", 3)), self.pooled(x, name)]
        elif kind is B:
            out = [branch("branch3x3", last=2), branch(*many("branch3x3dbl", 3), last=2), self.f.max_pool2d(x, 3, 2)]
        elif kind is D:
            out = [branch(*many("branch3x3", 2), last=2), branch(*many("branch7x7x3", 4), last=2), self.f.max_pool2d(x, 3, 2)]
        elif kind is E:
            one, two = branch("branch3x3_1"), branch(*many("branch3x3dbl", 2))
            out = [branch("branch1x1")]
            out += [self.conv(one, f"{name}.branch3x3_2{s}") for s in "ab"]
            out += [self.conv(two, f"{name}.branch3x3dbl_3{s}") for s in "ab"]
            out += [self.pooled(x, name, take_max=self.tensorflow and name == "Mixed_7c")]
        else:
            out = [branch("branch1x1"), branch(*many("branch7x7", 3)), branch(*many("branch7x7dbl", 5)), self.pooled(x, name)]
        return self.torch.cat(out, 1)

    def __call__(self, images):
        x = self.torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        x = self.conv(x, "Conv2d_1a_3x3", 2, same=False)
        x = self.conv(x, "Conv2d_2a_3x3", same=False)
        x = self.f.max_pool2d(self.conv(x, "Conv2d_2b_3x3"), 3, 2)
        x = self.conv(self.conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
        x = self.f.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            if name == "Mixed_6d":  # TensorFlow's mixed_6/conv
                spatial = self.conv(x, "Mixed_6d.branch1x1")[:, :7]
            x = self.block(x, name)
        pool = x.mean((2, 3))
        logits = pool @ self.state["fc.weight"].T
        out = {"pool": pool, "spatial": spatial.permute(0, 2, 3, 1), "logits_unbiased": logits}
        return {name: value.numpy() for name, value in (out | {"logits": logits + self.state["fc.bias"]}).items()}


@pytest.mark.parametrize("tensorflow", [True, False])
def test_activations_equal_pytorchs(saved, tensorflow):
    images = np.random.default_rng(1).uniform(-1, 1, (2, 107, 107, 3)).astype(np.float32)
    want = Torch(saved[0], tensorflow)(images)
    _, variables = inception.load(saved[1])
    module = InceptionV3(tensorflow=tensorflow)
    got = jax.jit(module.apply)(variables, images)
    assert got["pool"].shape == (2, 2048) and got["logits"].shape == (2, 1008)
    for name in ("pool", "spatial", "logits", "logits_unbiased"):
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], atol=2e-5 * scale, rtol=0, err_msg=name)
    assert want["spatial"].std() > 0.1 and want["pool"].std() > 0.01


def test_torchvisions_layout_is_known_by_its_classes(saved, monkeypatch):
    last = {"fc.weight": np.zeros((1000, 2048), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    state = saved[0] | last | {"AuxLogits.conv0.conv.weight": np.zeros((128, 768, 1, 1), np.float32)}
    monkeypatch.setattr(files, "read_state_dict", lambda path: state)
    module, variables = inception.load("tv.pth", preprocess="pytorch_fid")
    assert module == InceptionV3(num_classes=1000, tensorflow=False, preprocess="pytorch_fid")
    assert variables["params"]["Mixed_7c"]["branch3x3_2b"]["kernel"].shape == (3, 1, 384, 384)


def test_the_way_out_and_back(saved, tmp_path):
    _, variables = inception.load(saved[1])
    inception.save(tmp_path / "again.safetensors", variables)
    again = files.read_state_dict(tmp_path / "again.safetensors")
    want = {name: x for name, x in saved[0].items() if not name.endswith("num_batches_tracked")}
    assert set(again) == set(want)
    for name, x in want.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
    del variables["params"]["Mixed_5b"]
    with pytest.raises(ValueError, match="missing.*Mixed_5b"):
        inception.save(tmp_path / "broken.safetensors", variables)


def test_other_files_are_named(saved, monkeypatch):
    good = saved[0]

    def refused(state, match):
        monkeypatch.setattr(files, "read_state_dict", lambda path: state)
        with pytest.raises(ValueError, match=match):
            inception.load("bad.pth")

    refused({"fc.weight": good["fc.weight"]}, "bad.pth: not the weights of InceptionV3.*no fc.bias")
    refused(good | {"fc.bias": np.zeros(10, np.float32)}, "10 classes")
    refused({name: x for name, x in good.items() if name != "Mixed_6b.branch1x1.bn.bias"}, r"missing.*Mixed_6b.branch1x1.bn.bias")
    refused(good | {"extra.weight": np.zeros(3, np.float32)}, "unknown names: extra.weight")
    refused(good | {"Conv2d_1a_3x3.bn.bias": np.zeros(31, np.float32)}, "wrong shape.*Conv2d_1a_3x3")


def tensorflow_resize(image, side):
    """TensorFlow 1's ResizeBilinear, a loop over pixels: the corner of a pixel is its place."""
    height, width = image.shape[:2]
    out = np.zeros((side, side, image.shape[2]))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            below, right = min(top + 1, height - 1), min(left + 1, width - 1)
            first = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            second = image[below, left] + (image[below, right] - image[below, left]) * (x - left)
            out[i, j] = first + (second - first) * (y - top)
    return out


def test_tensorflows_resize():
    images = np.random.default_rng(2).integers(0, 256, (1, 40, 21, 3)).astype(np.uint8)
    got = inception_input(images)[0]
    np.testing.assert_allclose(got, (tensorflow_resize(images[0].astype(float), 299) - 128) / 128, atol=2e-4)
    whole = np.random.default_rng(3).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    np.testing.assert_array_equal(inception_input(whole), (whole.astype(np.float32) - 128) / 128)


def test_pytorch_fids_resize():
    torch = pytest.importorskip("torch")
    images = np.random.default_rng(2).integers(0, 256, (2, 40, 21, 3)).astype(np.uint8)
    x = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).float() / 255
    want = 2 * torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
    got = inception_input(images, "pytorch_fid")
    np.testing.assert_allclose(got, np.moveaxis(want.numpy(), 1, -1), atol=1e-5)
    assert np.abs(got - inception_input(images)).max() > 0.1


def test_what_it_observes_of_pictures(saved):
    """`observe` is `__call__` of preprocessed pixels; shapes alone, since 299 pixels take long here."""
    shapes = jax.eval_shape(
        lambda v, x: InceptionV3().apply(v, x, method="observe"),
        inception.load(saved[1])[1],
        jax.ShapeDtypeStruct((3, 64, 64, 1), jnp.uint8),
    )
    assert {name: x.shape for name, x in shapes.items()} == {"pool": (3, 2048), "spatial": (3, 2023), "logits": (3, 1008)}
    for bad in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected uint8"):
            inception_input(bad)
    with pytest.raises(ValueError, match="preprocess='torch'"):
        inception_input(np.zeros((1, 8, 8, 3), np.uint8), "torch")
    with pytest.raises(ValueError, match="at least 75"):
        InceptionV3().init(jax.random.key(0), jnp.zeros((1, 74, 80, 3)))
