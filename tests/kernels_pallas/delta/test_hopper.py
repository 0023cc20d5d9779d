"""The Hopper kernels in Pallas's interpreter, where this jax has one, and lowered without a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import explain, mosaic_gpu, target
from kernels_pallas.delta import gated_delta, hopper

pytestmark = pytest.mark.numeric
interprets = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="jax before 0.11 cannot interpret Hopper kernels")

# Rounded to 8 bits, a relative 2^-9 each, are a gradient in 16 bits, and scores and outputs. What tokens with keys that are alike
# write alternates in sign: terms of an output are larger than their sums.
ROUNDED = {"o": 2.0**-7, "q": 2.0**-8, "k": 2.0**-8, "v": 2.0**-8}
# All other operands are two 8-bit numbers, off by 2^-17; up to 4 such products follow each other, of two operands each.
EXACT = 2.0**-14


@pytest.fixture
def compare(oracle):
    """Asserts on the largest error of each output and cotangent against the recurrence, relative to its largest value."""
    bounds = dict.fromkeys(("o", "last", *oracle.names), EXACT) | ROUNDED

    def fn(data, vmapped=False):
        narrow = {name: x.astype(jnp.bfloat16 if name in ("q", "k", "v", "o_bar") else np.float32) for name, x in data.items()}
        wide = {name: np.asarray(x, np.float64) for name, x in narrow.items()}
        with target("h100", interpret=True):
            (o, last), bars = compiled(vmapped)([narrow[name] for name in oracle.names], (narrow["o_bar"], narrow["state_bar"]))
        inputs = [wide[name] for name in oracle.names]
        want_o, want_states = oracle.recurrence(*inputs)
        want = [want_o, want_states[-1], *oracle.adjoint(*inputs, wide["o_bar"], wide["state_bar"])]
        assert o.dtype == bars[0].dtype == bars[2].dtype == jnp.bfloat16 and last.dtype == bars[3].dtype == jnp.float32
        errors = {}
        for name, x, y in zip(bounds, (o, last, *bars), want):
            assert x.shape == y.shape, name
            errors[name] = float(np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1e-3))
        assert all(errors[name] <= bound for name, bound in bounds.items()), errors

    return fn


@functools.cache
def compiled(vmapped: bool):
    """Outputs and cotangents, of all sequences as one batch or of each in a call of its own."""

    def fn(*x):
        out, back = jax.vjp(functools.partial(gated_delta, implementation="hopper"), *x[:6])
        return out, back(x[6:])

    def each(*x):
        return jax.tree.map(lambda y: y[0], fn(*(y[None] for y in x)))

    return jax.jit(lambda inputs, bars: (jax.vmap(each) if vmapped else fn)(*inputs, *bars))


@interprets
@pytest.mark.parametrize("cosine, beta, decay", [(0.5, 1.0, 0.1), (0.95, 1.0, 0.0), (0.5, 1.0, 20.0)])
def test_two_chunks(oracle, compare, cosine, beta, decay):
    # The second of them ragged. Keys that are alike make T dense; strong decay leaves nothing but a token's own key.
    data = oracle.draw(127, cosine=cosine, beta=beta, decay=decay, dk=64, dv=64, h=1)
    data["log_decay"][:, 60:67] = np.maximum(data["log_decay"][:, 60:67], -0.01)
    compare(data)


@interprets
@pytest.mark.parametrize("length", [63, 64, 333, 680])
def test_other_lengths(oracle, compare, length):
    # 65 and 1 are below.
    compare(oracle.draw(length, cosine=0.5, dk=64, dv=64, h=1))


@interprets
def test_two_heads_and_slices_of_values(oracle, compare, monkeypatch):
    # Gradients of four chunks, three of them at once.
    monkeypatch.setattr(hopper, "_GROUP", 3)
    compare(oracle.draw(65, dk=64, dv=128, h=2))


@interprets
def test_wide_keys_of_one_token_under_vmap(oracle, compare):
    compare(oracle.draw(1, b=2, dk=128, dv=64, h=1), vmapped=True)


@interprets
def test_minus_infinity_forgets(oracle, compare):
    data = oracle.draw(127, dk=64, dv=64, h=1)
    data["log_decay"][:, [5, 70]] = -np.inf
    compare(data)


@pytest.mark.parametrize("dk, dv", [(64, 128), (128, 64), (128, 128)])
def test_lowers(dk, dv):
    token = lambda d: jax.ShapeDtypeStruct((2, 333, 3, d), jnp.bfloat16)  # noqa: E731
    gate, state = jax.ShapeDtypeStruct((2, 333, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3, dk, dv), jnp.float32)

    def fn(*x):
        out, back = jax.vjp(gated_delta, *x)
        return out, back(out)

    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
    with target("h100"):
        lowered = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=checks)(
            token(dk), token(dk), token(dv), gate, gate, state
        )
    # Forward; states, and their cotangents.
    assert lowered.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": jnp.float32}, "dtype float32 is not bfloat16"),
        ({"dtype": jnp.float16}, "dtype float16 is not bfloat16"),
        ({"dk": 96}, "dk=96 is not 64 or 128"),
        ({"dv": 256}, "dv=256 is not 64 or 128"),
        ({"kind": "a100"}, "it needs a Hopper GPU"),
    ],
)
def test_refuses(change, reason):
    options = {"dtype": jnp.bfloat16, "dk": 64, "dv": 64, "kind": "h100"} | change
    token = lambda d: jax.ShapeDtypeStruct((1, 8, 2, d), options["dtype"])  # noqa: E731
    gate = jax.ShapeDtypeStruct((1, 8, 2), jnp.float32)
    args = token(options["dk"]), token(options["dk"]), token(options["dv"]), gate, gate
    with target(options["kind"]):
        (choice,) = explain(gated_delta, *args)
        assert choice.implementation == "xla"
        assert reason in dict(choice.refused)["hopper"]
        with pytest.raises(ValueError, match="implementation='hopper' cannot run on gpu"):
            explain(gated_delta, *args, implementation="hopper")
