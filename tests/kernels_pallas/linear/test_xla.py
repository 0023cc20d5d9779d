"""The chunked scan against the recurrence and dense masks, values and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.linear import linear_attention

pytestmark = pytest.mark.numeric
LENGTHS = (1, 63, 64, 65, 127, 333, 680)


def causal(q, k, v, log_decay, state):
    return linear_attention(q, k, v, log_decay, state=state, implementation="xla")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_recurrence(oracle, decay, length):
    fn = oracle.differentiated(causal)
    for regime in ("mild", "strong", "mixed") if decay != "none" else ("mild",):
        args = oracle.inputs(1, length, 2, 8, 12, decay=decay, regime=regime, seed=length)
        oracle.check(fn(*args), args)


@pytest.mark.parametrize("decay", ["none", "scalar", "channel"])
def test_bfloat16(oracle, decay):
    fn = oracle.differentiated(causal)
    for regime in ("mild", "mixed") if decay != "none" else ("mild",):
        args = oracle.inputs(2, 150, 1, 16, 16, decay=decay, regime=regime, dtype="bfloat16")
        got = fn(*args)
        assert [x.dtype.name for x in got[:5]] == ["bfloat16", "float32", "bfloat16", "bfloat16", "bfloat16"]
        oracle.check(got, args, roundings=4)


def test_float16_states_leave_its_range(oracle):
    q, k, v, _, state, do, dstate = oracle.inputs(1, 40, 1, 8, 8, dtype="float16")
    args = (q / 10000, k * 1000, v * 1000, None, state, do / 10000, dstate)
    got = oracle.differentiated(causal)(*args)
    assert got[0].dtype == jnp.float16 and float(jnp.abs(got[1]).max()) > 1e6
    oracle.check(got, args, roundings=2)


@pytest.mark.parametrize("length,block", [(65, 16), (333, 50), (333, 200), (64, 64), (127, 1)])
def test_blocks_see_themselves(oracle, length, block):
    args = oracle.inputs(1, length, 2, 8, 12, seed=block)

    def fn(q, k, v, log_decay, state):
        return linear_attention(q, k, v, log_decay, block_size=block, state=state)

    number = np.arange(length) // block
    oracle.check(oracle.differentiated(fn)(*args), args, sees=number[:, None] >= number[None])


@pytest.mark.parametrize("length", [1, 50, 333])
def test_everybody_sees_everybody(oracle, length):
    args = oracle.inputs(2, length, 1, 12, 8, seed=length)

    def fn(q, k, v, log_decay, state):
        return linear_attention(q, k, v, log_decay, causal=False, state=state)

    oracle.check(oracle.differentiated(fn)(*args), args, sees=np.ones((length, length)))


def test_forgetting_everything_has_no_gradient_and_no_nan(oracle):
    q, k, v, _, state, do, dstate = oracle.inputs(1, 70, 1, 8, 8)
    log_decay = jnp.zeros((1, 70, 1)).at[:, 30].set(-jnp.inf)
    got = oracle.differentiated(causal)(q, k, v, log_decay, state, do, 0 * dstate)
    assert all(bool(jnp.isfinite(x).all()) for x in got)
    assert got[5][0, 30, 0] == 0
    alone = oracle.jit(causal)(q[:, 30:], k[:, 30:], v[:, 30:], None, None)
    np.testing.assert_allclose(got[0][:, 30:], alone[0], rtol=1e-5, atol=1e-5)


def shapes(jaxpr):
    """Of all values in a program and in those inside."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from shapes(getattr(inner, "jaxpr", inner))


def test_few_states_are_kept():
    """The backward pass of 64 chunks has no array of more than 8 states."""
    q, v = jnp.ones((1, 64 * 128, 1, 24)), jnp.ones((1, 64 * 128, 1, 40))

    def loss(q, k, v):
        return causal(q, k, v, None, None)[0].sum()

    found = list(shapes(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, q, v).jaxpr))
    states = [math.prod(shape[:-2]) for shape in found if shape[-2:] == (40, 24)]
    assert len(states) > 10 and max(states) == 8
