"""A decay a channel on Hopper: its kernels in Pallas's interpreter, where this jax has one, and lowered without a device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from kernels_pallas import explain, mosaic_gpu, target
from kernels_pallas.linear import hopper_channel, linear_attention

pytestmark = pytest.mark.numeric
interprets = pytest.mark.skipif(not mosaic_gpu.can_interpret(), reason="jax before 0.11 cannot interpret Hopper kernels")


def hopper(q, k, v, log_decay, state):
    return linear_attention(q, k, v, log_decay, state=state, implementation="hopper")


@pytest.fixture(scope="module")
def compare(oracle):
    """Checks all seven results against the recurrence and its adjoint in float64."""
    fn = oracle.differentiated(hopper)

    def run(args):
        with target("h100", interpret=True):
            got = fn(*args)
        assert [x.dtype.name for x in got] == ["bfloat16", "float32", *["bfloat16"] * 3, "float32", "float32"]
        # Terms of dlog_decay have a state and the cotangent of one, and both sum terms of two rounded factors.
        oracle.check(got, args, roundings=4)
        return got

    return run


@interprets
@pytest.mark.parametrize("regime", ["mild", "strong", "mixed"])
def test_ragged_chunks(oracle, compare, regime):
    # Two chunks; mixed has -inf, and channels that forget next to ones that do not.
    compare(oracle.inputs(1, 127, 1, 64, 64, decay="channel", regime=regime, dtype="bfloat16"))


@interprets
@pytest.mark.parametrize("length", [63, 64, 333, 680])
def test_other_lengths(oracle, compare, length):
    # 65 and 1 are below.
    compare(oracle.inputs(1, length, 1, 64, 64, decay="channel", dtype="bfloat16"))


@interprets
@pytest.mark.parametrize("regime", ["mild", "strong"])
def test_last_chunk_of_one_token(oracle, compare, regime):
    # Heads and batches are told apart.
    compare(oracle.inputs(2, 65, 2, 64, 64, decay="channel", regime=regime, dtype="bfloat16", seed=1))


@interprets
@pytest.mark.parametrize("regime", ["mild", "strong"])
def test_wide_heads_of_one_token(oracle, compare, regime):
    # Two slices of values, and two row tiles of a state.
    compare(oracle.inputs(1, 1, 1, 128, 128, decay="channel", regime=regime, dtype="bfloat16"))


@interprets
def test_wide_heads_through_chunks_at_a_time(oracle, compare, monkeypatch):
    # Three chunks: the middle one has a state and a cotangent of one from others. XLA takes two, and the last.
    monkeypatch.setattr(hopper_channel, "AT_ONCE", 2)
    compare(oracle.inputs(1, 130, 1, 128, 64, decay="channel", regime="mixed", dtype="bfloat16"))


@interprets
def test_state_is_not_rounded(oracle):
    # Nothing is written, so what is left of the state after two chunks has no rounding but float32's.
    q, k, v, log_decay, state, *_ = oracle.inputs(1, 70, 1, 64, 64, decay="channel", dtype="bfloat16")
    with target("h100", interpret=True):
        _, last = oracle.jit(hopper)(q, 0 * k, v, log_decay, state)
    want = np.exp(oracle.float64(log_decay).sum(1))[..., None] * oracle.float64(state)
    # The exponent is a sum of 70 numbers below 0.05, so below 3.5: some ten of its roundings of 2^-24 and those of the rest.
    np.testing.assert_allclose(last, want, rtol=64 * 2.0**-24)


@pytest.mark.parametrize("dk, dv", [(64, 128), (128, 256)])
def test_lowers(dk, dv):
    token = lambda d, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((2, 333, 3, d), dtype)  # noqa: E731
    args = token(dk), token(dk), token(dv), token(dk, jnp.float32), jax.ShapeDtypeStruct((2, 3, dk, dv), jnp.float32)

    def fn(*args):
        out, back = jax.vjp(lambda *x: linear_attention(*x[:4], state=x[4]), *args)
        return out, back(out)

    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
    with target("h100"):
        (choice,) = explain(linear_attention, *args[:4])
        assert choice.implementation == "hopper"
        lowered = export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=checks)(*args)
    # Forward; states and their cotangents. The rest is XLA's, without a loop.
    assert lowered.mlir_module().count("stablehlo.custom_call @mosaic_gpu") == 3
    assert "stablehlo.while" not in lowered.mlir_module()
