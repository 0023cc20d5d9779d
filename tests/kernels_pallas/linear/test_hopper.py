"""The Hopper kernels in Pallas's interpreter, where this jax has one, and lowered without a device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import explain, mosaic_gpu, target
from kernels_pallas.linear import linear_attention

pytestmark = pytest.mark.numeric
interprets = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="jax before 0.11 cannot interpret Hopper kernels")

# Operands, copies of states and outputs are each rounded once to 8 bits, a relative 2^-9; errors of sums are below their largest
# entry's, of which the gradient of a log-decay, a sum of products of such sums, has two.
TOLERANCE = 2.0**-7


def draw(t, *, decay=0.3, h=1, dk=64, dv=64, seed=0):
    rng = np.random.default_rng(seed)
    token, state = (1, t, h), (1, h, dk, dv)
    wide = [rng.standard_normal((*token, d)) * d**-0.5 for d in (dk, dk)] + [rng.standard_normal((*token, dv)) for _ in "vo"]
    q, k, v, do = (np.asarray(x).astype(jnp.bfloat16) for x in wide)
    g = (-decay * rng.uniform(size=token)).astype(np.float32)
    return q, k, v, g, *(rng.standard_normal(state).astype(np.float32) for _ in range(2)), do


def recurrence(q, k, v, g, state, dstate, do):
    """(o, last state), (dq, dk, dv, dg, dstate0): token by token in float64, from the definition."""
    q, k, v, g, state, dstate, do = (np.asarray(x, np.float64) for x in (q, k, v, g, state, dstate, do))
    states, o = [state], []
    for t in range(q.shape[1]):
        states.append(np.exp(g[:, t, :, None, None]) * states[-1] + k[:, t, :, :, None] * v[:, t, :, None])
        o.append(np.einsum("bhk,bhkv->bhv", q[:, t], states[-1]))
    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, g))
    for t in reversed(range(q.shape[1])):
        dstate = dstate + q[:, t, :, :, None] * do[:, t, :, None]
        dq[:, t] = np.einsum("bhkv,bhv->bhk", states[t + 1], do[:, t])
        dk[:, t] = np.einsum("bhkv,bhv->bhk", dstate, v[:, t])
        dv[:, t] = np.einsum("bhkv,bhk->bhv", dstate, k[:, t])
        dstate = np.exp(g[:, t, :, None, None]) * dstate
        dg[:, t] = np.einsum("bhkv,bhkv->bh", dstate, states[t])
    return (np.stack(o, 1), states[-1]), (dq, dk, dv, dg, dstate)


@functools.cache
def compiled(decay: bool):
    def fn(q, k, v, g, state, dstate, do):
        def op(q, k, v, g, state):
            return linear_attention(q, k, v, g if decay else None, state=state, implementation="hopper")

        out, back = jax.vjp(op, q, k, v, g, state)
        return out, back((do, dstate))

    return jax.jit(fn)


def compare(data, decay: bool):
    with target("h100", interpret=True):
        out, bars = compiled(decay)(*data)
    q, k, v, g, *rest = data
    want_out, want_bars = recurrence(q, k, v, g if decay else 0 * g, *rest)
    want_bars = list(want_bars)
    if not decay:
        want_bars[3] = 0 * want_bars[3]
    names = ("o", "last", "dq", "dk", "dv", "dlog_decay", "dstate")
    assert out[0].dtype == bars[0].dtype == jnp.bfloat16 and out[1].dtype == bars[3].dtype == jnp.float32
    errors = {}
    for name, x, y in zip(names, (*out, *bars), (*want_out, *want_bars)):
        assert x.shape == y.shape, name
        errors[name] = float(np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1e-3))
    assert max(errors.values()) <= TOLERANCE, errors
    return errors


@interprets
@pytest.mark.parametrize("decay", [0.3, 20.0])
def test_decay(decay):
    # Two chunks, the second of them ragged; strong decay leaves nothing but a token's own key, whose gradient must stay exact.
    data = draw(127, decay=decay)
    data[3][:, 40:43] = -0.01
    compare(data, decay=True)


@interprets
@pytest.mark.parametrize("length", [63, 64, 333, 680])
def test_other_lengths(length):
    # 65 and 1 are below.
    compare(draw(length), decay=True)


@interprets
def test_without_decay():
    errors = compare(draw(65, h=2), decay=False)
    # Products of 16-bit numbers are exact and the state is never rounded, forward or backward.
    assert errors["last"] < 1e-5 and errors["dstate"] < 1e-5


@interprets
def test_wide_heads_of_one_token():
    # Two slices of keys and two of values.
    compare(draw(1, dk=128, dv=128), decay=True)


@interprets
def test_minus_infinity_forgets():
    data = draw(127)
    data[3][:, 70] = -np.inf
    compare(data, decay=True)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("dk, dv", [(64, 128), (128, 256)])
def test_lowers(decay, dk, dv):
    token = lambda d: jax.ShapeDtypeStruct((2, 333, 3, d), jnp.bfloat16)  # noqa: E731
    gate, state = jax.ShapeDtypeStruct((2, 333, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3, dk, dv), jnp.float32)

    def fn(q, k, v, g, state):
        out, back = jax.vjp(lambda *x: linear_attention(*x[:3], x[3] if decay else None, state=x[4]), q, k, v, g, state)
        return out, back(out)

    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
    with target("h100"):
        lowered = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=checks)(
            token(dk), token(dk), token(dv), gate, state
        )
    # Forward; states, their cotangents, and gradients of tokens.
    assert lowered.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 4


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dtype": jnp.float32}, "dtype float32 is not bfloat16"),
        ({"dtype": jnp.float16}, "dtype float16 is not bfloat16"),
        ({"dk": 96}, "dk=96 is not 64 or 128"),
        ({"dv": 32}, "dv=32 is not 64, 128, 192 or 256"),
        ({"channel": True, "dtype": jnp.float16}, "dtype float16 is not bfloat16"),
        ({"block_size": 4}, "block_size=4"),
        ({"kind": "a100"}, "it needs a Hopper GPU"),
    ],
)
def test_refuses(change, reason):
    options = {"dtype": jnp.bfloat16, "dk": 64, "dv": 64, "channel": False, "block_size": None, "kind": "h100"} | change
    token = lambda d: jax.ShapeDtypeStruct((1, 8, 2, d), options["dtype"])  # noqa: E731
    shape = (1, 8, 2, options["dk"]) if options["channel"] else (1, 8, 2)
    gate = None if options["block_size"] else jax.ShapeDtypeStruct(shape, jnp.float32)
    args = token(options["dk"]), token(options["dk"]), token(options["dv"]), gate
    with target(options["kind"]):
        (choice,) = explain(linear_attention, *args, block_size=options["block_size"])
        assert choice.implementation == "xla"
        assert reason in dict(choice.refused)["hopper"]
        with pytest.raises(ValueError, match="implementation='hopper' cannot run on gpu"):
            explain(linear_attention, *args, block_size=options["block_size"], implementation="hopper")
