"""The public functions: steps, resuming, causality, transformations, bad input, and what is picked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import explain, target
from kernels_pallas.linear import linear_attention, linear_attention_step

pytestmark = pytest.mark.numeric
DECAYS = ("none", "scalar", "channel")


@pytest.mark.parametrize("decay", DECAYS)
def test_step_is_the_recurrence(oracle, decay):
    q, k, v, log_decay, state, *_ = oracle.inputs(2, 5, 3, 8, 12, decay=decay, regime="mixed")
    want, states = oracle.recurrence(*(oracle.float64(x) for x in (q, k, v, log_decay, state)))
    for n in range(5):
        o, state = linear_attention_step(q[:, n], k[:, n], v[:, n], None if log_decay is None else log_decay[:, n], state)
        np.testing.assert_allclose(o, want[:, n], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state, states[n + 1], rtol=1e-5, atol=1e-5)


def test_step_is_the_op_at_one_token(oracle):
    q, k, v, log_decay, *_ = oracle.inputs(2, 1, 3, 8, 12, decay="scalar", dtype="bfloat16")
    o, state = oracle.jit(linear_attention)(q, k, v, log_decay)
    o1, state1 = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], log_decay[:, 0])
    assert o1.dtype == o.dtype and state1.dtype == state.dtype == jnp.float32
    np.testing.assert_allclose(o1.astype("float32"), o[:, 0].astype("float32"), rtol=2**-7)
    np.testing.assert_allclose(state1, state, rtol=2**-8)


@pytest.mark.parametrize("decay,cut", [("none", 1), ("none", 64), ("scalar", 37), ("channel", 37)])
def test_resuming(oracle, decay, cut):
    q, k, v, log_decay, state, *_ = oracle.inputs(1, 90, 2, 8, 8, decay=decay)
    fn = oracle.jit(lambda q, k, v, log_decay, state: linear_attention(q, k, v, log_decay, state=state))
    o, last = fn(q, k, v, log_decay, state)
    outs = []
    for part in (slice(0, cut), slice(cut, None)):
        out, state = fn(*(None if x is None else x[:, part] for x in (q, k, v, log_decay)), state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), o, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-4)


def test_resuming_between_blocks(oracle):
    q, k, v, _, state, *_ = oracle.inputs(1, 50, 2, 8, 8)
    fn = oracle.jit(lambda q, k, v, state: linear_attention(q, k, v, block_size=10, state=state))
    o, last = fn(q, k, v, state)
    first, middle = fn(q[:, :20], k[:, :20], v[:, :20], state)
    second, end = fn(q[:, 20:], k[:, 20:], v[:, 20:], middle)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), o, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("decay", DECAYS)
def test_the_future_changes_nothing(oracle, decay):
    q, k, v, log_decay, state, *_ = oracle.inputs(1, 140, 1, 8, 8, decay=decay)
    fn = oracle.jit(lambda *args: linear_attention(*args[:4], state=args[4])[0])
    o = fn(q, k, v, log_decay, state)
    for cut in (1, 70, 129):
        other = [None if x is None else x.at[:, cut:].multiply(3.0) for x in (q, k, v, log_decay)]
        changed = fn(*other, state)
        np.testing.assert_array_equal(changed[:, :cut], o[:, :cut])
        assert (changed[:, cut:] != o[:, cut:]).any()


def test_jit_vmap_scan_and_remat(oracle):
    q, k, v, log_decay, *_ = oracle.inputs(3, 20, 2, 8, 8, decay="scalar")

    def loss(q, k, v, log_decay):
        o, state = linear_attention(q, k, v, log_decay)
        return jnp.sum(o**2) + jnp.sum(state**2)

    want, grads = oracle.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, log_decay)

    def scanned(*arrays):
        return jax.lax.scan(lambda total, xs: (total + loss(*(x[None] for x in xs)), None), 0.0, arrays)[0]

    def mapped(*arrays):
        return jax.vmap(lambda *xs: loss(*(x[None] for x in xs)))(*arrays).sum()

    for other in (scanned, mapped, jax.checkpoint(loss)):
        value, other_grads = oracle.jit(jax.value_and_grad(other, argnums=(0, 1, 2, 3)))(q, k, v, log_decay)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        for a, b in zip(other_grads, grads):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_equal_calls_share_a_trace(oracle):
    q, k, v, *_ = oracle.inputs(1, 10, 1, 8, 8)
    traces = []

    @jax.jit
    def fn(q, k, v):
        traces.append(1)
        return linear_attention(q, k, v)

    fn(q, k, v)
    fn(2 * q, k, v)
    assert len(traces) == 1


def test_no_state_is_zeros(oracle):
    q, k, v, _, state, *_ = oracle.inputs(1, 10, 1, 8, 8)
    for a, b in zip(linear_attention(q, k, v), linear_attention(q, k, v, state=0 * state)):
        np.testing.assert_array_equal(a, b)


def test_types_of_gradients(oracle):
    q, k, v, log_decay, state, *_ = oracle.inputs(1, 10, 1, 8, 8, decay="scalar", dtype="bfloat16")
    arrays = (q, k, v, log_decay.astype(jnp.bfloat16), state.astype(jnp.bfloat16))

    def loss(q, k, v, log_decay, state):
        o, last = linear_attention(q, k, v, log_decay, state=state)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(last)

    assert [x.dtype for x in jax.eval_shape(jax.grad(loss, argnums=range(5)), *arrays)] == [jnp.bfloat16] * 5


ARRAYS = {"q": (2, 10, 4, 16), "k": (2, 10, 4, 16), "v": (2, 10, 4, 32)}


@pytest.mark.parametrize(
    "changes,options,message",
    [
        ({"q": (2, 10, 16)}, {}, r"q \(2, 10, 16\), k \(2, 10, 4, 16\), v"),
        ({"k": (2, 10, 2, 16)}, {}, r"k \(2, 10, 2, 16\)"),
        ({"v": (2, 11, 4, 32)}, {}, r"v \(2, 11, 4, 32\)"),
        ({"q": (2, 0, 4, 16), "k": (2, 0, 4, 16), "v": (2, 0, 4, 32)}, {}, "empty"),
        ({"log_decay": (2, 10)}, {}, r"log_decay \(2, 10\) must be \[b, t, h\]"),
        ({"log_decay": (2, 10, 4, 32)}, {}, r"log_decay \(2, 10, 4, 32\)"),
        ({"state": (2, 4, 32, 16)}, {}, r"state float32 \(2, 4, 32, 16\)"),
        ({}, {"block_size": 0}, "block_size=0"),
        ({}, {"block_size": 2.0}, "block_size=2.0"),
        ({}, {"block_size": 4, "causal": False}, "block_size=4 .* causal=False"),
        ({"log_decay": (2, 10, 4)}, {"causal": False}, r"log_decay \(2, 10, 4\) needs an order .* causal=False"),
        ({"log_decay": (2, 10, 4)}, {"block_size": 4}, "needs an order .* block_size=4"),
        ({}, {"implementation": "cuda"}, "implementation='cuda' is not one of tpu, hopper, xla"),
        ({}, {"implementation": "tpu"}, "cannot run on cpu"),
    ],
)
def test_bad_input(changes, options, message):
    arrays = {name: jnp.zeros(shape) for name, shape in (ARRAYS | changes).items()}
    with pytest.raises(ValueError, match=message):
        linear_attention(**arrays, **options)


@pytest.mark.parametrize("types", [("float32", "bfloat16", "float32"), ("int32", "int32", "int32")])
def test_bad_types(types):
    with pytest.raises(ValueError, match="must be of one type"):
        linear_attention(*(jnp.zeros(shape, dtype) for shape, dtype in zip(ARRAYS.values(), types)))
    with pytest.raises(ValueError, match="log_decay must be of a floating type"):
        linear_attention(*(jnp.zeros(shape) for shape in ARRAYS.values()), jnp.zeros((2, 10, 4), int))


def test_bad_step():
    with pytest.raises(ValueError, match=r"q \(2, 1, 4, 16\) must be \[b, h, d\]"):
        linear_attention_step(*(jnp.zeros((2, 1, 4, 16)),) * 3)


def picked(kind, size=64, dtype=jnp.bfloat16, **options):
    x = jax.ShapeDtypeStruct((2, 100, 4, size), dtype)
    with target(kind):
        (choice,) = explain(linear_attention, x, x, x, **options)
    return choice


def test_what_is_picked():
    assert picked("v5e").implementation == "tpu"
    assert picked("a100").implementation == "xla"
    assert picked("cpu").implementation == "xla"
    assert "block_size=100" in dict(picked("v5p", causal=False).refused)["tpu"]
    assert "block_size=10" in dict(picked("v5p", block_size=10).refused)["tpu"]
    assert "float16" in dict(picked("v5e", dtype=jnp.float16).refused)["tpu"]
    assert "dk=32" in dict(picked("v5e", size=32).refused)["tpu"]
    assert picked("v5e", implementation="xla").forced


def test_an_implementation_that_cannot_run_says_so():
    x = jnp.zeros((1, 8, 2, 32))
    with target("v5e"), pytest.raises(ValueError, match="dk=32 is not 64"):
        linear_attention(x, x, x, implementation="tpu")
