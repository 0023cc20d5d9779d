"""What is made of cuDNN's calls, with a stand-in for cuDNN itself that keeps its contract; lowering is in test_lowering.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BlockMask, target
from kernels_pallas.attention import block_sparse_attention, cudnn

pytestmark = pytest.mark.numeric


def probabilities(q, k, bias, scale, causal):
    """Scores [b, h, q, k] in float32, as cuDNN forms them from half-precision inputs."""
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    if causal:
        s = jnp.where(np.tri(q.shape[1], k.shape[1], dtype=bool), s, -jnp.inf)
    return s if bias is None else s + bias.astype(jnp.float32)


def widen(x, heads):
    return jnp.repeat(x, heads // x.shape[2], axis=2)


@pytest.fixture
def stand_in(monkeypatch):
    """cuDNN's contract: the log-sum-exp in float32, and a gradient from whatever log-sum-exp and output it is given."""
    calls = []

    def forward(q, k, v, bias, scale, causal):
        calls.append(("forward", q.shape[1], k.shape[1], bias is not None, causal))
        s = probabilities(q, widen(k, q.shape[2]), bias, scale, causal)
        lse = jax.nn.logsumexp(s, axis=-1)
        o = jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(s - lse[..., None]), widen(v, q.shape[2]).astype(jnp.float32))
        return o.astype(q.dtype), lse.swapaxes(1, 2)

    def backward(q, k, v, lse, o, do, bias, scale, causal):
        calls.append(("backward", q.shape[1], k.shape[1], bias is not None, causal))
        assert o.dtype == do.dtype == q.dtype and lse.dtype == jnp.float32
        wide = [widen(x, q.shape[2]).astype(jnp.float32) for x in (k, v)]
        q, o, do = (x.astype(jnp.float32) for x in (q, o, do))
        p = jnp.exp(probabilities(q, wide[0], bias, scale, causal) - lse.swapaxes(1, 2)[..., None])
        delta = jnp.einsum("bqhd,bqhd->bhq", do, o)[..., None]
        ds = p * (jnp.einsum("bqhd,bkhd->bhqk", do, wide[1]) - delta) * scale
        dq = jnp.einsum("bhqk,bkhd->bqhd", ds, wide[0])
        dk, dv = jnp.einsum("bhqk,bqhd->bkhd", ds, q), jnp.einsum("bhqk,bqhd->bkhd", p, do)
        dk, dv = (x.reshape(*k.shape[:3], -1, k.shape[3]).sum(3) for x in (dk, dv))
        return dq.astype(k.dtype), dk.astype(k.dtype), dv.astype(k.dtype)

    monkeypatch.setattr(cudnn, "_forward_call", forward)
    monkeypatch.setattr(cudnn, "_backward_call", backward)
    return calls


def on_a100(checks, mask, **sizes):
    inputs = checks.draw(mask, **({"dtype": "bfloat16", "b": 1} | sizes))
    with target("a100"):
        got = checks.run("cudnn", inputs, mask)
    checks.compare(got, inputs, mask.dense(), inputs[0].shape[3] ** -0.5)


def test_split_masks_need_no_mask(checks, stand_in):
    # Noisy queries of the middle of three blocks see it and the first clean one; all others see one interval.
    ids = np.arange(192) // 64
    meta = np.stack([np.r_[ids, ids], np.r_[np.zeros(192), np.ones(192)]])
    mask = BlockMask.build(checks.noisy_and_clean, meta, meta)
    on_a100(checks, mask, dtype="float16", h=2, g=1)
    assert len(stand_in) == 14 and not any(masked or causal for *_, masked, causal in stand_in)


def test_short_pieces_are_plain_products(checks, masks, stand_in):
    on_a100(checks, masks["block_causal"])  # scales of 1, 4, ..., 64 and 10 tokens
    assert stand_in == []


def test_causal_uses_the_causal_kernel(checks, stand_in):
    line = np.arange(90)[None]
    on_a100(checks, BlockMask.build(checks.not_later, line, line))
    assert stand_in == [("forward", 90, 90, False, True), ("backward", 90, 90, False, True)]


def test_dense_masks_and_dead_rows(checks, stand_in):
    line = np.arange(80)[None]
    dead_from_10 = np.where((line >= 10) & (line < 20), 500, line)
    on_a100(checks, BlockMask.build(checks.near, dead_from_10, line))
    assert stand_in == [("forward", 80, 80, True, False), ("backward", 80, 80, True, False)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_that_gives_delta(dtype):
    rng = np.random.default_rng(0)
    do = rng.standard_normal((6, 16)) * np.array([1, 1e-4, 0, 0, 1, 30.0])[:, None]
    delta = np.array([3.0, 1e-3, 5.0, 0.0, 0.0, -2e3])
    do = jnp.asarray(do, dtype)
    do2, o = jax.jit(cudnn._output_with)(do, jnp.asarray(delta, jnp.float32))
    assert do2.dtype == o.dtype == dtype
    got = (np.asarray(do2, np.float64) * np.asarray(o, np.float64)).sum(-1)
    # Every product is positive, so their sum keeps the relative error of one rounding.
    np.testing.assert_allclose(got, delta, rtol=float(jnp.finfo(dtype).eps))
    moved = abs(np.asarray(do2, np.float64) - np.asarray(do, np.float64)).max(-1)
    assert (moved <= abs(delta) * (2.0**-60 if dtype == "bfloat16" else 2.0**-14)).all()
    assert moved[2] > 0 and not moved[[0, 3, 4, 5]].any()


def test_refusals_say_why(checks):
    line = np.arange(60)[None] // 2
    mask = BlockMask.build(checks.not_later, line, line)
    x = {"d": 64, "dtype": "bfloat16", "b": 1}

    def refusal(kind, mask, message, **sizes):
        q, k, v, *_ = checks.draw(mask, **(x | sizes))
        with target(kind), pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, mask, implementation="cudnn")

    refusal("a100", mask, "takes bfloat16 and float16, not float32", dtype="float32")
    refusal("a100", mask, "head sizes that 8 divides up to 128, not 60", d=60)
    refusal("a100", mask, "up to 128, not 136", d=136)
    refusal("v5e", mask, "it is for gpu")
    odd = BlockMask.build(checks.near, np.arange(81)[None], np.arange(80)[None])
    refusal("a100", odd, "dense mask for even lengths only", h=1, g=1)
    far = np.arange(0, 6000)[None]
    sparse = BlockMask.build(checks.same, far, far)
    assert "a dense mask would compute them all" in cudnn._pattern(sparse)
