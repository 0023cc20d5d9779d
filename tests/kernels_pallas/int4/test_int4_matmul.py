"""x w against numpy float64 with the weights decoded bit by bit, by every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import current_device, explain, mosaic_gpu, target
from kernels_pallas.int4 import IMPLEMENTATIONS, Problem, int4_matmul, pack_int4, relayout, xla
from kernels_pallas.int4.pieces import pieces

pytestmark = pytest.mark.numeric
KIND = {"xla": ("cpu", "kn"), "xla nk": ("cpu", "nk"), "tpu": ("v5e", "kn"), "hopper": ("h100", "nk")}
# Unit roundoff of x and y's type; products and sums are float32.
ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(params=list(KIND))
def implementation(request):
    if request.param == "hopper" and not mosaic_gpu.can_interpret():
        pytest.skip("this jax does not interpret Mosaic GPU kernels")
    return request.param


def multiply(x, w, implementation):
    """By one implementation, interpreted, with weights in its layout."""
    kind, layout = KIND[implementation]
    with target(kind, interpret=True):
        return jax.jit(lambda x, w: int4_matmul(x, w, implementation=implementation.split()[0]))(x, relayout(w, layout))


def inputs(m, k, n, group, dtype, *lead, scale_dtype="float32"):
    rng = np.random.default_rng(m + k + n)
    w = pack_int4(jnp.asarray(rng.normal(size=(k, n)), jnp.float32), group, scale_dtype=scale_dtype, layout="kn")
    return jnp.asarray(rng.normal(size=(*lead, m, k)), dtype), w


def check(y, x, weights, dtype, weights_rounded=False):
    """|error| <= roundoff |y| + (rounded weights) roundoff |x| |w| + float32 sums: k roundoff |x| |w|, all worst cases."""
    x = np.asarray(x).astype(np.float64)
    size = np.abs(x) @ np.abs(weights)
    want = x @ weights
    inner = 2 * x.shape[-1] * ROUNDOFF["float32"] + (ROUNDOFF[dtype] if weights_rounded else 0)
    error = np.abs(np.asarray(y).astype(np.float64) - want)
    np.testing.assert_array_less(error, 1.01 * ROUNDOFF[dtype] * np.abs(want) + inner * size + 1e-30)


@pytest.mark.parametrize(
    "m, k, n, group, dtype",
    [
        (3, 128, 37, 128, "bfloat16"),
        (1, 256, 64, 64, "float16"),
        (17, 128, 128, 32, "float32"),
    ],
)
def test_products(m, k, n, group, dtype, implementation, decode):
    x, w = inputs(m, k, n, group, dtype, scale_dtype="float32" if dtype == "float32" else "bfloat16")
    y = multiply(x, w, implementation)
    assert y.shape == (m, n) and y.dtype == dtype
    check(y, x, decode(w)[1], dtype, weights_rounded=implementation.startswith("xla"))


@pytest.mark.parametrize(
    "name, m, n, sizes",
    [
        ("tpu", 18, 130, dict(m=16, n=128, k=256)),
        ("hopper", 9, 65, dict(m=8, k=256, warpgroups=1, stages=2, blocks=8)),
    ],
)
def test_every_axis_of_the_grid(name, m, n, sizes, decode, monkeypatch):
    """Two blocks along m, two and a ragged end along n, four steps of k of which two share a scale, and k split in two."""
    if name == "hopper" and not mosaic_gpu.can_interpret():
        pytest.skip("this jax does not interpret Mosaic GPU kernels")
    backend = next(i for i in IMPLEMENTATIONS if i.name == name).backend
    monkeypatch.setattr(backend, "static_choice", lambda problem, device: backend.Blocks(**sizes))
    x, w = inputs(m, 1024, n, 512, "bfloat16")
    check(multiply(x, w, name), x, decode(w)[1], "bfloat16")


def test_gradients(implementation, decode):
    """dx = dy w^T; the scales' is zero, the words' has no type."""
    x, w = inputs(3, 128, 20, 32, "float32")
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(3, 20)), jnp.float32)

    def loss(x, w):
        return jnp.sum(weight * multiply(x, w, implementation))

    dx, dw = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, w)
    check(dx, weight, decode(w)[1].T, "float32", weights_rounded=True)
    assert dw.words.dtype == jax.dtypes.float0 and not dw.scales.any()


@pytest.mark.parametrize("layout", ["kn", "nk"])
def test_weights_are_made_in_slices(layout, monkeypatch, decode):
    """Three, forward and backward: no array is as large as the weights, which the float32 copy would be."""
    x, w = inputs(4, 384, 10, 64, "bfloat16")
    monkeypatch.setattr(xla, "_SLICE", 128 * 10)
    program = jax.make_jaxpr(int4_matmul)(x, relayout(w, layout))
    largest = max(v.aval.size for eqn in subjaxprs(program.jaxpr) for v in eqn.outvars)
    assert largest < 384 * (10 if layout == "kn" else 64) / 2
    y, pull = jax.vjp(lambda x: int4_matmul(x, relayout(w, layout), implementation="xla"), x)
    check(y, x, decode(w)[1], "bfloat16", weights_rounded=True)
    check(pull(y)[0], y, decode(w)[1].T, "bfloat16", weights_rounded=True)


def subjaxprs(jaxpr):
    """All equations, those inside calls and loops too; custom rules are entered, what they produce is not counted twice."""
    for eqn in jaxpr.eqns:
        inner = [j for value in eqn.params.values() for j in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns"))]
        inner = [getattr(j, "jaxpr", j) for j in inner if hasattr(j, "eqns") or hasattr(j, "jaxpr")]
        for sub in inner:
            yield from subjaxprs(sub)
        if not inner:
            yield eqn


def test_leading_axes_are_rows(implementation, decode):
    x, w = inputs(2, 128, 9, 128, "bfloat16", 2, 1)
    y = multiply(x, w, implementation)
    assert y.shape == (2, 1, 2, 9)
    check(y.reshape(4, 9), x.reshape(4, 128), decode(w)[1], "bfloat16", weights_rounded=True)
    one = multiply(x[0, 0, 0], w, implementation)
    assert one.shape == (9,)
    np.testing.assert_array_equal(one, y[0, 0, 0])


def test_layers_are_scanned_and_mapped(implementation):
    """A stack of two layers, and two batches of x for one layer, against one call a layer."""
    kind, layout = KIND[implementation]
    name = implementation.split()[0]
    rng = np.random.default_rng(0)
    w = pack_int4(jnp.asarray(rng.normal(size=(2, 128, 128)), jnp.float32), 64, layout=layout)
    x = jnp.asarray(rng.normal(size=(2, 3, 128)), jnp.float32)

    @jax.jit
    def run(x, w):
        layers = [jax.tree.map(lambda a, i=i: a[i], w) for i in range(2)]
        y = [int4_matmul(x[0], layers[0], name), int4_matmul(x[1], layers[1], name)]
        chained = int4_matmul(y[0], layers[1], name)
        scanned, each = jax.lax.scan(lambda x, w: (int4_matmul(x, w, name),) * 2, x[0], w)
        mapped = jax.vmap(lambda x, w: int4_matmul(x, w, name))(x, w)
        shared = jax.vmap(lambda x: int4_matmul(x, layers[0], name))(x)
        return (y[0], y[0]), (chained, scanned), (each[0], y[0]), (mapped, jnp.stack(y)), (shared[0], y[0])

    with target(kind, interpret=True):
        for got, want in run(x, w):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_pieces_add_up():
    """Exactly, for every finite float16 and for floats of full precision."""
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)][None]
    single = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)
    for x, count in ((half, 2), (single, 3), (jnp.asarray(single, jnp.bfloat16), 1)):
        parts = pieces(jnp.asarray(x))
        assert parts.shape == (count, *x.shape) and parts.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(parts).astype(np.float64).sum(0), np.asarray(x).astype(np.float64))


def test_the_choice_and_its_reasons():
    x, w = inputs(2, 128, 8, 128, "bfloat16")

    def chosen(kind, w=w, **kwargs):
        with target(kind):
            (choice,) = explain(int4_matmul, x, w, **kwargs)
        return choice.implementation, dict(choice.refused)

    with target("h100"):
        assert current_device().hopper
    assert chosen("cpu")[0] == "xla" and chosen("v5e")[0] == "tpu"
    name, why = chosen("h100")
    assert name == "xla" and "relayout(packed, 'nk')" in why["hopper"]
    assert chosen("h100", relayout(w, "nk"))[0] == "hopper"
    assert "relayout(packed, 'kn')" in chosen("v5e", relayout(w, "nk"))[1]["tpu"]
    assert "Hopper" in chosen("a100", relayout(w, "nk"))[1]["hopper"]
    x, small = inputs(2, 72, 8, 72, "bfloat16")
    for kind, layout, name in (("v5e", "kn", "tpu"), ("h100", "nk", "hopper")):
        name_chosen, why = chosen(kind, relayout(small, layout))
        assert name_chosen == "xla" and "k=72, group=72" in why[name]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, w: int4_matmul(x[:, :64], w), r"x \(2, 64\) must be \[..., k\] with the k=128 of w \[128, 8\]"),
        (lambda x, w: int4_matmul(x.astype(jnp.int32), w), "x must be float32, bfloat16 or float16, not int32"),
        (lambda x, w: int4_matmul(x[:0], w), r"x \(0, 128\)"),
        (lambda x, w: int4_matmul(x, w.words), "w must be a PackedInt4"),
        (lambda x, w: int4_matmul(x, jax.tree.map(lambda a: a[None], w)), r"leading axes, words \(1, 16, 8\)"),
        (lambda x, w: int4_matmul(x, w, implementation="triton"), "implementation='triton' is not one of tpu, hopper, xla"),
        (lambda x, w: int4_matmul(x, w, implementation="tpu"), "implementation='tpu' cannot run on cpu"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        change(*inputs(2, 128, 8, 128, "float32"))


def test_a_mesh_splits_rows_and_columns(implementation):
    """One device, but the sizes of a shard: kernels take what the arrays have, not what the call had."""
    x, w = inputs(4, 128, 128, 64, "bfloat16")
    kind, layout = KIND[implementation]
    w = relayout(w, layout)
    backend = next(i for i in IMPLEMENTATIONS if i.name == implementation.split()[0]).backend
    problem = Problem(4, 128, 128, 64, w.tile, layout, "bfloat16", "float32")
    columns = slice(0, 32)
    words = w.words[:, columns] if layout == "kn" else w.words[columns]
    with target(kind, interpret=True) as device:
        y = backend.forward(x[:2], words, w.scales[:, columns], problem=problem, device=device)
        whole = backend.forward(x, w.words, w.scales, problem=problem, device=device)
    assert y.shape == (2, 32)
    np.testing.assert_array_equal(y, whole[:2, :32])
