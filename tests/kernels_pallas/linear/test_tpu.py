"""The TPU kernels in Pallas's interpreter against the recurrence, and their lowering."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

from kernels_pallas import explain, target
from kernels_pallas.linear import linear_attention, tpu

pytestmark = pytest.mark.numeric
DECAYS = ("none", "scalar", "channel")


def interpreted(q, k, v, log_decay, state):
    with target("v5e", interpret=True):
        return linear_attention(q, k, v, log_decay, state=state, implementation="tpu")


@pytest.fixture
def small(monkeypatch):
    """Two chunks a segment and two heads a grid step: short sequences have several of each."""

    def choice(problem, device):
        return tpu.Blocks(chunk=64 if problem.decay == "channel" else 128, heads=2, segment=2)

    monkeypatch.setattr(tpu, "static_choice", choice)


@pytest.mark.parametrize("decay", DECAYS)
def test_recurrence(oracle, small, decay):
    """Three heads, of which a grid step takes two: one is padding. Three chunks, of which a segment takes two: likewise."""
    fn = oracle.differentiated(interpreted)
    length = 150 if decay == "channel" else 300
    for regime in ("mild", "strong", "mixed") if decay != "none" else ("mild",):
        args = oracle.inputs(1, length, 3, 64, 128, decay=decay, regime=regime)
        oracle.check(fn(*args), args)


@pytest.mark.parametrize("decay", DECAYS)
def test_bfloat16(oracle, decay):
    args = oracle.inputs(2, 70, 2, 64, 64, decay=decay, regime="mixed", dtype="bfloat16")
    oracle.check(oracle.differentiated(interpreted)(*args), args, roundings=4)


@pytest.mark.parametrize(
    "decay, length", [("none", 1), *(("scalar", n) for n in (1, 63, 64, 65, 127, 333, 680)), ("channel", 680)]
)
def test_lengths(oracle, decay, length):
    """At the static choice of blocks."""
    args = oracle.inputs(1, length, 1, 64, 64, decay=decay)
    oracle.check(oracle.differentiated(interpreted)(*args), args)


def test_vmap(oracle):
    args = oracle.inputs(3, 10, 2, 64, 64, decay="scalar")

    def mapped(*args):
        return tuple(x[:, 0] for x in jax.vmap(interpreted)(*(x[:, None] for x in args)))

    oracle.check(oracle.differentiated(mapped)(*args), args)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("heads,key_size,value_size", [(5, 64, 64), (8, 128, 256)])
def test_lowers_for_tpu(decay, heads, key_size, value_size):
    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, v = struct(2, 1000, heads, key_size), struct(2, 1000, heads, value_size)
    shape = {"none": None, "scalar": (2, 1000, heads), "channel": q.shape}[decay]
    log_decay = None if shape is None else struct(*shape, dtype=jnp.float32)
    state = struct(2, heads, key_size, value_size, dtype=jnp.float32)

    def both(q, k, v, log_decay, state):
        with target("v5e"):
            out, pull = jax.vjp(lambda *args: linear_attention(*args[:4], state=args[4]), q, k, v, log_decay, state)
            return out, pull(out)

    module = export.export(jax.jit(both), platforms=["tpu"])(q, q, v, log_decay, state).mlir_module()
    # Forward, states at the starts of segments, backward.
    assert module.count("tpu_custom_call") == 3


@pytest.mark.parametrize("heads,key_size,value_size,want", [(8, 128, 128, 8), (25, 64, 64, 8), (3, 64, 64, 3), (6, 64, 128, 6)])
def test_blocks_of_heads_end_at_lanes(heads, key_size, value_size, want):
    q, v = (jax.ShapeDtypeStruct((1, 4096, heads, size), jnp.bfloat16) for size in (key_size, value_size))
    with target("v5e") as device:
        problem = explain(linear_attention, q, q, v)[0].problem
        plan = tpu.Plan.of(q, v, problem, tpu.static_choice(problem, device), bytes_a_token=8 * key_size)
    assert plan.heads == want
    assert plan.all_heads % plan.heads == 0 and 0 <= plan.all_heads - heads < plan.heads
    for size in (key_size, value_size):
        assert plan.heads * size % 128 == 0 or plan.heads == plan.all_heads == heads
