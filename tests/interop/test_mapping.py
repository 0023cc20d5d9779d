import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxgen.interop import mapping
from jaxgen.interop.mapping import Rule, check_shapes, conv_rules, linear_rules, norm_rules, to_jax, to_torch

RULES = (
    *linear_rules("blocks.{i}.attn.proj", "blocks_{i}/attn/proj"),
    *linear_rules("blocks.{i}.ffn.fc1", "blocks/ffn/fc1", bias=False),
    *norm_rules("down.{i}.block.{j}.norm", "down_{i}_{j}/norm"),
    *conv_rules("phi.{k}", "phi/conv"),
    *conv_rules("conv1d", "conv1d", bias=False),
    Rule("blocks.{i}.scale_mul", "blocks_{i}/attn/scale", mapping.reshape((1, -1, 1, 1), (-1,))),
    Rule("emb.weight", "emb/embedding"),
)


def state(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"conv1d.weight": (4, 3, 5), "emb.weight": (7, 4)}
    for i in range(12):  # more than ten: "10" must not sort before "2"
        shapes |= {f"blocks.{i}.attn.proj.weight": (3, 2), f"blocks.{i}.attn.proj.bias": (3,)}
        shapes |= {f"blocks.{i}.ffn.fc1.weight": (5, 2), f"blocks.{i}.scale_mul": (1, 6, 1, 1)}
    for i in range(2):
        shapes |= {f"phi.{i}.weight": (4, 3, 2, 1), f"phi.{i}.bias": (4,)}
        for j in range(3):
            shapes |= {f"down.{i}.block.{j}.norm.weight": (4,), f"down.{i}.block.{j}.norm.bias": (4,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_names_layouts_and_stacks():
    sd = state()
    params = to_jax(sd, RULES)
    np.testing.assert_array_equal(params["blocks_3"]["attn"]["proj"]["kernel"], sd["blocks.3.attn.proj.weight"].T)
    np.testing.assert_array_equal(params["blocks_11"]["attn"]["scale"], sd["blocks.11.scale_mul"].ravel())
    np.testing.assert_array_equal(params["down_1_2"]["norm"]["scale"], sd["down.1.block.2.norm.weight"])
    np.testing.assert_array_equal(params["emb"]["embedding"], sd["emb.weight"])
    assert params["blocks"]["ffn"]["fc1"]["kernel"].shape == (12, 2, 5)
    for i in range(12):
        np.testing.assert_array_equal(params["blocks"]["ffn"]["fc1"]["kernel"][i], sd[f"blocks.{i}.ffn.fc1.weight"].T)
    for o, c, y in np.ndindex(4, 3, 2):
        assert params["phi"]["conv"]["kernel"][1, y, 0, c, o] == sd["phi.1.weight"][o, c, y, 0]
    for o, c, x in np.ndindex(4, 3, 5):
        assert params["conv1d"]["kernel"][x, c, o] == sd["conv1d.weight"][o, c, x]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_round_trip_is_exact(dtype):
    sd = {name: (array * 100).astype(dtype) for name, array in state().items()}
    sd["emb.weight"].flat[:3] = np.array([np.inf, np.nan, -0.0]).astype(dtype) if dtype != np.int64 else 0
    back = to_torch(to_jax(sd, RULES), RULES)
    assert set(back) == set(sd)
    for name, array in sd.items():
        assert back[name].dtype == array.dtype and back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes(), name  # NaNs and signs of zero included


def test_jax_arrays_go_back():
    params = {"a": {"kernel": jnp.ones((2, 3), jnp.bfloat16)}}
    (weight,) = to_torch(params, linear_rules("x", "a", bias=False)).values()
    assert weight.shape == (3, 2) and weight.dtype == ml_dtypes.bfloat16 and isinstance(weight, np.ndarray)


def test_linear_and_conv_act_the_same():
    """x W^T on one side is x K on the other; the same for a convolution over one position."""
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(5, 3)), rng.normal(size=(2, 3))
    np.testing.assert_array_equal(x @ mapping.linear.to_jax(w), x @ w.T)
    w, patch = rng.normal(size=(5, 3, 2, 4)), rng.normal(size=(3, 2, 4))
    theirs = np.einsum("oihw,ihw->o", w, patch)
    np.testing.assert_allclose(np.einsum("hwio,hwi->o", mapping.conv.to_jax(w), patch.transpose(1, 2, 0)), theirs, rtol=1e-12)


def test_all_unknown_and_missing_names_are_listed_with_shapes():
    sd = state()
    del sd["emb.weight"], sd["blocks.5.ffn.fc1.weight"]
    sd |= {"extra.weight": np.zeros((2, 9)), "blocks.x.attn.proj.bias": np.zeros(3), "mask": np.zeros((8, 8))}
    with pytest.raises(ValueError) as error:
        to_jax(sd, RULES, ignore=("mask",))
    text = str(error.value)
    assert "unknown names: extra.weight (2, 9), blocks.x.attn.proj.bias (3,)" in text
    assert "missing names: emb.weight, blocks.5.ffn.fc1.weight" in text
    assert "mask" not in text
    with pytest.raises(ValueError, match=r"unknown names: mask \(8, 8\)"):
        to_jax(state() | {"mask": np.zeros((8, 8))}, RULES, ignore=("mas",))  # the whole name has to match


def test_expected_shapes():
    params = to_jax(state(), RULES)
    check_shapes(params, params)
    assert to_jax(state(), RULES, expected=params)
    sd = state()
    del sd["blocks.3.attn.proj.weight"]
    sd["down.0.block.1.norm.bias"] = np.zeros(9)
    sd["blocks.12.attn.proj.bias"] = np.zeros(3)
    with pytest.raises(ValueError) as error:
        to_jax(sd, RULES, expected=params)
    text = str(error.value)
    assert "missing: blocks_3/attn/proj/kernel (blocks.3.attn.proj.weight) (2, 3)" in text
    assert "wrong shape: down_0_1/norm/bias (down.0.block.1.norm.bias) has (9,), expected (4,)" in text
    assert "not expected: blocks_12/attn/proj/bias (blocks.12.attn.proj.bias) (3,)" in text
    with pytest.raises(ValueError, match=r"a/b has \(2,\), expected \(3,\)"):
        check_shapes({"a": {"b": np.zeros(2)}}, {"a": {"b": np.zeros(3)}})


def test_optional_rules():
    with pytest.raises(ValueError, match="missing names: fc.bias"):
        to_jax({"fc.weight": np.zeros((2, 3))}, linear_rules("fc", "fc"))
    assert list(to_jax({"fc.weight": np.zeros((2, 3))}, linear_rules("fc", "fc", optional=True))["fc"]) == ["kernel"]


def test_bad_rules_and_arrays():
    with pytest.raises(ValueError, match="differ by more than one"):
        Rule("a.{i}.b.{j}", "a/b")
    with pytest.raises(ValueError, match="differ by more than one"):
        Rule("a", "a_{i}")
    with pytest.raises(ValueError, match=r"fc.weight \(3,\): does not fit fc/kernel .*2 axes"):
        to_jax({"fc.weight": np.zeros(3)}, linear_rules("fc", "fc", bias=False))
    with pytest.raises(ValueError, match=r"c.weight \(3, 3\): does not fit c/kernel"):
        to_jax({"c.weight": np.zeros((3, 3))}, conv_rules("c", "c", bias=False))
    with pytest.raises(ValueError, match=r"b.{i}: shapes .* differ and cannot be stacked"):
        to_jax({"b.0": np.zeros(3), "b.1": np.zeros(4)}, [Rule("b.{i}", "b")])
    with pytest.raises(ValueError, match="y: same is already taken by x"):
        to_jax({"x": np.zeros(3), "y": np.zeros(3)}, [Rule("x", "same"), Rule("y", "same")])
    with pytest.raises(ValueError, match=r"without a published name: new/kernel \(2, 3\)"):
        to_torch({"new": {"kernel": np.zeros((2, 3))}}, RULES)


def test_numbers_are_numbers_and_repeat():
    rule = Rule("a.{i}.b{i}", "a_{i}")
    assert set(to_jax({"a.1.b1": np.zeros(1), "a.10.b10": np.zeros(1)}, [rule])) == {"a_1", "a_10"}
    for name in ("a.1.b2", "a.01.b01", "a.x.bx", "za.1.b1"):
        with pytest.raises(ValueError, match="unknown names"):
            to_jax({name: np.zeros(1)}, [rule])
