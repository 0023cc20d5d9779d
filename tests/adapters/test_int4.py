"""4-bit layers in models that do not know of them: equal to float layers with the same weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.adapters import (
    Int4Module,
    apply_int4,
    dequantise,
    get_kernel,
    kernel_bytes,
    linear_layers,
    quantise,
    replace_kernel,
    unstack_layers,
    with_hessians,
)
from jaxgen.generators import NextScaleSampler
from kernels_pallas import explain
from kernels_pallas.int4 import PackedInt4

pytestmark = pytest.mark.numeric
LABELS = jnp.array([0, 2])
FEATURES = jax.random.normal(jax.random.key(9), (2, 13, 6))


class Mixed(nn.Module):
    """Every kind of dense layer: with and without bias, several features, several and inner axes, and one with batch axes."""

    dtype: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, use_bias=False, dtype=self.dtype, name="plain")(x)
        x = nn.DenseGeneral((4, 8), dtype=self.dtype, name="split")(x)  # [b, l, 4, 8]
        x = nn.DenseGeneral(24, axis=(-2, -1), dtype=self.dtype, name="join")(jnp.tanh(x))  # [b, l, 24]
        x = nn.DenseGeneral((3,), axis=1, dtype=self.dtype, name="inner")(x)  # [b, 24, 3]
        x = nn.DenseGeneral(5, batch_dims=(0,), name="batched")(x)
        return nn.Conv(2, (1,), name="conv")(x)


@pytest.fixture(scope="module")
def mixed():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)
    shapes = jax.eval_shape(Mixed().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.asarray(0.3 * rng.normal(size=v.shape), jnp.float32), shapes)
    return x, variables, linear_layers(Mixed(), shapes, x)


def test_layers_are_found(mixed):
    _, _, layers = mixed
    assert {path: layer[1:] for path, layer in layers.items()} == {
        "plain": (0, 16, 16),
        "split": (0, 16, 32),
        "join": (0, 32, 24),
        "inner": (0, 8, 3),
    }
    assert layers["join"].shape == (4, 8, 24) and layers["join"].matrix == (32, 24)


@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), ("bfloat16", 3e-2)])
def test_every_kind_of_layer(mixed, dtype, tolerance):
    """bfloat16 weights round alike in both, sums in another order."""
    x, variables, layers = mixed
    packed = quantise(variables, layers, group=16)
    assert {path for path in layers if isinstance(get_kernel(packed, path), PackedInt4)} == set(layers)
    assert get_kernel(packed, "inner").group == 8 and get_kernel(packed, "join").group == 16
    int4, plain = jax.jit(apply_int4(Mixed(dtype)).apply), jax.jit(Mixed(dtype).apply)
    got, want, floats = int4(packed, x), plain(dequantise(packed, layers), x), plain(variables, x)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())
    assert got.dtype == want.dtype and np.abs(want - floats).max() > 1e-3
    np.testing.assert_array_equal(int4(variables, x), floats)


def test_where_group_and_the_implementation_matter(mixed):
    x, variables, layers = mixed
    some = quantise(variables, layers, where=lambda path: path in ("split", "join"), group=16)
    assert get_kernel(some, "plain") is get_kernel(variables, "plain")
    assert get_kernel(quantise(variables, layers, group=8), "split").group == 8
    calls = explain(apply_int4(Mixed()).apply, some, x)
    assert [(call.op, call.implementation, call.problem.m) for call in calls] == [("int4_matmul", "xla", 16)] * 2
    with pytest.raises(ValueError, match="implementation='tpu' cannot run on cpu"):
        apply_int4(Mixed(), implementation="tpu")(some, x)
    exact = jax.tree.map(lambda x: x.dtype.name, quantise(variables, layers, scale_dtype=jnp.float32))
    assert get_kernel(exact, "plain").scales == "float32" and get_kernel(some, "split").scales.dtype == jnp.bfloat16
    clipped = [quantise(variables, layers, clip=clip) for clip in ("max", "mse")]
    assert (get_kernel(clipped[0], "join").words != get_kernel(clipped[1], "join").words).any()
    assert get_kernel(quantise(variables, layers, layout="nk"), "join").layout == "nk"


def test_gradients_pass_through_to_other_parameters(mixed):
    x, variables, layers = mixed
    packed = quantise(variables, layers, where=lambda path: path != "plain")
    kernel = get_kernel(variables, "plain")

    def loss(apply, variables, kernel):
        return jnp.sum(jnp.square(apply(replace_kernel(variables, "plain", kernel), x)))

    got = jax.jit(jax.grad(lambda kernel: loss(apply_int4(Mixed()), packed, kernel)))(kernel)
    floats = dequantise(packed, layers)
    want = jax.jit(jax.grad(lambda kernel: loss(Mixed().apply, floats, kernel)))(kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("unrolled", [False, True])
def test_a_generator_scanned_and_unrolled(tiny, unrolled):
    module = tiny.generator.clone(scan_layers=not unrolled)
    variables = unstack_layers(tiny.params["generator"]) if unrolled else tiny.params["generator"]
    layers = linear_layers(module, variables, LABELS, FEATURES)
    blocks = [path for path in layers if "transformer" in path]
    # Modulation, queries with keys and values, projection, and the two of the MLP.
    assert len(blocks) == 5 * (tiny.generator.depth if unrolled else 1)
    assert {layers[path].stacked for path in blocks} == {1 - unrolled}
    packed = quantise(variables, layers, where=lambda path: path.startswith("transformer"), group=32)
    got = jax.jit(Int4Module(module).apply)(packed, LABELS, FEATURES)
    want = jax.jit(module.apply)(dequantise(packed, layers), LABELS, FEATURES)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_packed_stack_is_packed_layers(tiny):
    layers = linear_layers(tiny.generator, tiny.params["generator"], LABELS, FEATURES)
    where = dict(where=lambda path: path.startswith("transformer"))
    stacked = quantise(tiny.params["generator"], layers, **where)
    variables = unstack_layers(tiny.params["generator"])
    apart = quantise(variables, linear_layers(tiny.generator.clone(scan_layers=False), variables, LABELS, FEATURES), **where)
    assert jax.tree.structure(unstack_layers(stacked)) == jax.tree.structure(apart)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), apart)


def test_bytes(tiny):
    layers = linear_layers(tiny.generator, tiny.params["generator"], LABELS, FEATURES)
    before = kernel_bytes(tiny.params["generator"])
    count = sum(x.size for x in jax.tree.leaves(tiny.params["generator"]))
    assert before == {"packed": 0, "rest": 2 * count, "total": 2 * count}
    paths = [path for path in layers if path.startswith("transformer")]
    packed = quantise(tiny.params["generator"], layers, where=paths.__contains__, group=32)
    weights = sum(int(np.prod(layers[path].shape)) for path in paths)
    after = kernel_bytes(packed, dtype=jnp.float32)
    assert after == {"packed": weights // 2 + weights // 32 * 2, "rest": 4 * (count - weights), "total": after["total"]}
    assert after["total"] == after["packed"] + after["rest"]


def test_hessians_are_those_of_the_inputs(mixed):
    """Against inputs by hand; what another module calls does not count."""
    x, variables, layers = mixed
    other = nn.Dense(16, name="plain")
    theirs = {"params": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)}}

    def fn(variables, x):
        other.apply(theirs, x)
        return Mixed().apply(variables, x)

    out, sums = jax.jit(with_hessians(Mixed(), fn, layers))(variables, x)
    np.testing.assert_allclose(out, jax.jit(Mixed().apply)(variables, x), rtol=1e-5, atol=1e-6)
    p = {name: {k: np.asarray(v, np.float64) for k, v in leaf.items()} for name, leaf in variables["params"].items()}
    first = np.asarray(x, np.float64)
    second = first @ p["plain"]["kernel"]
    third = np.tanh(np.einsum("bld,dhk->blhk", second, p["split"]["kernel"]) + p["split"]["bias"]).reshape(2, 8, 32)
    fourth = np.swapaxes(third @ p["join"]["kernel"].reshape(32, 24) + p["join"]["bias"], 1, 2)
    for path, inputs in (("plain", first), ("split", second), ("join", third), ("inner", fourth)):
        flat = inputs.reshape(-1, inputs.shape[-1])
        np.testing.assert_allclose(sums[path], flat.T @ flat, rtol=1e-4, atol=1e-4)


def test_gptq_by_way_of_the_model(mixed):
    x, variables, layers = mixed
    want, sums = jax.jit(with_hessians(Mixed(), Mixed().apply, layers))(variables, x)
    errors = []
    for options in (dict(), dict(method="gptq", hessians=sums), dict(method="gptq", hessians=sums, damp=10.0)):
        packed = quantise(variables, layers, where=lambda path: path == "join", **options)
        errors.append(float(jnp.square(jax.jit(apply_int4(Mixed()).apply)(packed, x) - want).mean()))
    assert errors[1] < 0.7 * errors[0] and errors[1] < errors[2]


def test_the_sampler_compiles_once(tiny):
    layers = linear_layers(tiny.generator, tiny.params["generator"], LABELS, FEATURES)
    packed = quantise(tiny.params["generator"], layers, where=lambda path: path.startswith("transformer"))
    before = NextScaleSampler._sample._cache_size()
    tokens = []
    for seed in (0, 1):
        sampler = NextScaleSampler(generator=apply_int4(tiny.generator), tokenizer=tiny.tokenizer)
        params = {"generator": jax.tree.map(jnp.copy, packed), "tokenizer": tiny.params["tokenizer"]}
        tokens.append(sampler(params, jax.random.key(seed), np.array([0, 2]))[1])
    assert NextScaleSampler._sample._cache_size() == before + 1
    assert (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(method="awq"), "method='awq' is not one of rtn, gptq"),
        (dict(method="gptq"), "method='gptq' needs hessians of plain, split, join, inner"),
        (dict(where=lambda path: False), "where picks none of the 4 layers plain, split, join, inner"),
        (dict(group=4), "layer plain has 16 inputs: group=4 leaves 4 to a scale"),
        (dict(clip="best"), "clip='best'"),
    ],
)
def test_bad_options(mixed, options, words):
    with pytest.raises(ValueError, match=words):
        quantise(mixed[1], mixed[2], **options)


def test_scanned_layers_and_strangers_are_named(tiny, mixed):
    layers = linear_layers(tiny.generator, tiny.params["generator"], LABELS, FEATURES)
    with pytest.raises(ValueError, match="blocks/attention/qkv, .* are scanned: unstack_layers"):
        with_hessians(tiny.generator, tiny.generator.apply, layers)
    with pytest.raises(ValueError, match="there is no layer plain/x: x is not one of kernel"):
        get_kernel(mixed[1], "plain/x")
