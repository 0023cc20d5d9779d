"""Splash attention, interpreted, against float64 in numpy where upstream's own answers are wrong or missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BlockMask, target
from kernels_pallas.attention import splash
from kernels_pallas.attention.problem import Problem
from kernels_pallas.device import Device

pytestmark = pytest.mark.numeric
V5E = Device("tpu", "v5e", interpret=True)
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}


def causal(q, k):
    return q[0] >= k[0]


def noisy_and_clean(q, k):
    return ((q[0] == k[0]) & (q[1] == k[1])) | ((k[1] == 1) & (k[0] < q[0]))


def with_dead_blocks():
    """190 queries of which the first 130 (a block and two rows) and some others see nothing; 300 keys, the last 130 unseen."""
    q = np.r_[np.full(130, -9), np.arange(50), np.full(10, -9)][None]
    return BlockMask.build(causal, q, np.r_[np.arange(170) // 4, np.full(130, 99)][None])


def two_halves():
    ids = np.arange(150) // 16
    meta = np.stack([np.r_[ids, ids], np.arange(300) // 150])
    return BlockMask.build(noisy_and_clean, meta, meta)


def oracle(q, k, v, do, dlse, allowed, scale):
    """o, lse, dq, dk, dv in float64, head by head."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    o, dq, dk, dv, lse = np.zeros(q.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(k.shape), np.zeros(dlse.shape)
    for i in range(q.shape[0]):
        for h in range(q.shape[2]):
            g = h * k.shape[2] // q.shape[2]
            a, b, c, d = q[i, :, h], k[i, :, g], v[i, :, g], do[i, :, h]
            e = np.exp(scale * a @ b.T) * allowed
            total = e.sum(1, keepdims=True)
            p = e / np.where(total == 0, 1, total)
            with np.errstate(divide="ignore"):
                lse[i, :, h] = np.log(total[:, 0])
            o[i, :, h] = p @ c
            ds = p * (d @ c.T - ((d @ c.T) * p).sum(1, keepdims=True) + dlse[i, :, h, None])
            dq[i, :, h] = scale * ds @ b
            dk[i, :, g] += scale * ds.T @ a
            dv[i, :, g] += p.T @ d
    return o, lse, dq, dk, dv


def inputs(mask, h, g, d, dtype):
    rng = np.random.default_rng(0)
    sq, sk = mask.shape
    shapes = [(2, sq, h, d), (2, sk, g, d), (2, sk, g, d), (2, sq, h, d)]
    q, k, v, do = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return q, k, v, do, jnp.asarray(rng.standard_normal((2, sq, h)), jnp.float32)


def run(q, k, v, do, dlse, mask, scale, block, device=V5E):
    o, lse = splash.forward(q, k, v, mask=mask, scale=scale, device=device, block=block)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    return o, lse, *splash.backward(q, k, v, lse, do, delta, mask=mask, scale=scale, device=device, block=block)


@pytest.mark.parametrize(
    "mask, heads, d, dtype",
    [
        (with_dead_blocks(), (2, 1), 32, "float32"),
        (two_halves(), (2, 2), 64, "bfloat16"),
        (BlockMask.build(causal, np.arange(1)[None], np.arange(63)[None] - 62), (1, 1), 64, "float32"),
    ],
    ids=["dead", "noisy_and_clean", "one_query"],
)
def test_forward_and_gradients(mask, heads, d, dtype):
    args = inputs(mask, *heads, d, dtype)
    got = jax.jit(lambda *x: run(*x, mask, d**-0.5, 128))(*args)
    want = oracle(*args, mask.dense(), d**-0.5)
    assert [x.dtype for x in got] == [dtype, "float32", dtype, dtype, dtype]
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, want):
        x, live = np.asarray(x, np.float64), np.isfinite(y)
        assert np.array_equal(np.isneginf(x), ~live), name
        bound = TOLERANCE[dtype] * max(1, np.abs(y[live]).max())
        np.testing.assert_allclose(x[live], y[live], rtol=0, atol=bound, err_msg=name)


def test_mask_is_evaluated_a_block_at_a_time():
    sizes = []

    def recorded(q, k):
        allowed = q[0] >= k[0]
        sizes.append(np.size(allowed))
        return allowed

    mask = BlockMask.build(recorded, np.arange(700)[None], np.arange(900)[None])
    lazy = splash._Lazy(mask, (128, 128))
    assert lazy.shape == (768, 1024)
    sizes.clear()
    part = lazy[640:768, 512:640]
    assert sizes == [60 * 128]
    np.testing.assert_array_equal(part, np.pad(mask.dense()[640:, 512:640], ((0, 68), (0, 0))))
    assert not lazy[0:128, 896:1024][:, 4:].any()


def test_refuses_other_devices_large_heads_and_masks_of_nothing():
    nothing = BlockMask.build(causal, np.zeros((1, 40)), np.ones((1, 33)))
    problem = Problem(two_halves(), 1, 2, 2, 64, "bfloat16", 0.125)
    tpu = Device("tpu", "v5e")
    assert splash.refuses(problem, tpu) is None
    assert "TPU" in splash.refuses(problem, Device("cpu", "cpu"))
    assert "512" in splash.refuses(Problem(two_halves(), 1, 2, 2, 512, "bfloat16", 0.125), tpu)
    assert "no query" in splash.refuses(Problem(nothing, 1, 2, 2, 64, "bfloat16", 0.125), tpu)


def test_lowers_for_a_tpu_that_is_not_there():
    mask = two_halves()
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(mask, 4, 2, 64, "bfloat16")]
    with target("v5e") as device:
        exported = jax.export.export(jax.jit(lambda *x: run(*x, mask, 0.125, 512, device)), platforms=["tpu"])(*args)
    assert exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 3
