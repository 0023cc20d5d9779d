"""The TPU kernels, interpreted, against float64 in numpy; their worklists; lowering for TPUs without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import BlockMask, target
from kernels_pallas.attention import tpu
from kernels_pallas.attention.problem import Problem
from kernels_pallas.attention.tpu_blocks import Blocks, static_choice, unpack, worklist
from kernels_pallas.device import Device

pytestmark = pytest.mark.numeric

FUSED = Blocks((32, 64), (64, 32), None)
TWO_PASSES = Blocks((64, 32), (32, 64), (32, 32))
V5E = Device("tpu", "v5e", interpret=True)
# Rounding of the inputs' dtype, times what sums of ~100 terms of order 1 may add up to.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1.5e-2, "float16": 2e-3}


def causal(q, k):
    return q[0] >= k[0]


def same(q, k):
    return q[0] == k[0]


def noisy_and_clean(q, k):
    return ((q[0] == k[0]) & (q[1] == k[1])) | ((k[1] == 1) & (k[0] < q[0]))


def mixed(q, k):
    return ((q[0] >= k[0]) & ~(q[1] == 1)) | (q[0] + 1 == k[0]) | ~(k[1] < 2)


def scales(n):
    """Scale of every token of a next-scale order: 1, 4, 9, ... tokens, cut at n."""
    return np.repeat(np.arange(1, 30), np.arange(1, 30) ** 2)[None, :n]


def two_halves(n, block):
    ids = np.arange(n // 2) // block
    return np.stack([np.r_[ids, ids], np.arange(n) // (n // 2)])


def with_dead_blocks():
    # Queries 0..69 and 90..94 see nothing (a row of blocks and some rows), keys 64..139 are seen by nobody (blocks and some).
    q = np.r_[np.full(70, -9), np.arange(20), np.full(5, -9), np.arange(6)][None]
    k = np.r_[np.arange(64) // 4, np.full(76, 99)][None]
    return BlockMask.build(causal, q, k)


MASKS = {
    "block_causal": BlockMask.build(causal, scales(127), scales(127)),
    "block_diagonal": BlockMask.build(same, scales(127), scales(127)),
    "noisy_and_clean": BlockMask.build(noisy_and_clean, two_halves(128, 16), two_halves(128, 16)),
    "mixed": BlockMask.build(mixed, two_halves(100, 9), np.random.default_rng(0).integers(0, 5, (2, 77))),
    "dead": with_dead_blocks(),
    "nothing": BlockMask.build(causal, np.zeros((1, 40)), np.ones((1, 33))),
    "everything": BlockMask.build(causal, np.ones((1, 128)), np.zeros((1, 64))),
}


def problem_of(mask, heads=4, kv_heads=2, head_size=64, dtype="bfloat16"):
    return Problem(mask, 1, heads, kv_heads, head_size, dtype, 0.125)


def arrays(mask, h, g, d, dtype, seed=0):
    """q, k, v, do [b=2, ...] of dtype and dlse float32, all of order 1."""
    rng = np.random.default_rng(seed)
    sq, sk = mask.shape
    shapes = [(2, sq, h, d), (2, sk, g, d), (2, sk, g, d), (2, sq, h, d)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes] + [
        jnp.asarray(rng.standard_normal((2, sq, h)), jnp.float32)
    ]


def oracle(q, k, v, do, dlse, allowed, scale):
    """o, lse, dq, dk, dv in float64, from the Jacobian of the softmax."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    s = np.where(allowed, scale * np.einsum("bqhd,bkhd->bhqk", q, k), -np.inf)
    top = np.maximum(s.max(-1, keepdims=True), -1e300)
    e = np.exp(s - top)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = np.where(total == 0, -np.inf, top + np.log(total))[..., 0]
    o = np.einsum("bhqk,bkhd->bqhd", p, v)
    dp = np.einsum("bqhd,bkhd->bhqk", do, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) + p * np.moveaxis(dlse, 1, 2)[..., None]
    dq, dk = scale * np.einsum("bhqk,bkhd->bqhd", ds, k), scale * np.einsum("bhqk,bqhd->bkhd", ds, q)
    dv = np.einsum("bhqk,bqhd->bkhd", p, do)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(3) for x in (dk, dv))
    return o, np.moveaxis(lse, 1, 2), dq, dk, dv


def run(q, k, v, do, dlse, mask, scale, blocks, device=V5E):
    @jax.jit
    def both(q, k, v, do, dlse):
        o, lse = tpu.forward(q, k, v, mask=mask, scale=scale, device=device, blocks=blocks)
        delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
        return o, lse, *tpu.backward(q, k, v, lse, do, delta, mask=mask, scale=scale, device=device, blocks=blocks)

    return both(q, k, v, do, dlse)


def check(mask, h, g, d, dtype, blocks, scale=None, tolerance=None):
    inputs = arrays(mask, h, g, d, dtype)
    scale = d**-0.5 if scale is None else scale
    got = run(*inputs, mask, scale, blocks)
    want = oracle(*inputs, mask.dense(), scale)
    assert [x.dtype for x in got] == [dtype, "float32", dtype, dtype, dtype]
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), got, want):
        x, live = np.asarray(x, np.float64), np.isfinite(y)
        assert np.array_equal(np.isneginf(x), np.isneginf(y)), name
        bound = (tolerance or TOLERANCE[dtype]) * max(1, np.abs(y[live]).max(initial=0))
        np.testing.assert_allclose(x[live], y[live], rtol=0, atol=bound, err_msg=name)
    return got


@pytest.mark.parametrize("name", MASKS)
def test_forward_and_gradients_of_every_mask_in_float32(name):
    check(MASKS[name], 2, 1, 32, "float32", FUSED)


@pytest.mark.parametrize("name", ["mixed", "dead"])
def test_dq_by_a_pass_of_its_own(name):
    check(MASKS[name], 2, 1, 32, "float32", TWO_PASSES)


@pytest.mark.parametrize(
    "dtype, heads, head_size", [("bfloat16", (4, 2), 64), ("float16", (1, 1), 48), ("bfloat16", (3, 3), 128)]
)
def test_dtypes_head_sizes_and_groups(dtype, heads, head_size):
    check(MASKS["noisy_and_clean"], *heads, head_size, dtype, FUSED)


def test_large_scores_do_not_overflow():
    # Scores of up to 1000 are themselves rounded by 1000 * 2 ** -24, which is the relative error of a weight.
    got = check(MASKS["block_causal"], 1, 1, 32, "float32", FUSED, scale=40.0, tolerance=1000 * 2**-23)
    assert np.abs(np.asarray(got[1])).max() > 300  # exp(300) is not a float32


def test_queries_without_keys_have_no_output_and_no_gradient():
    o, lse, dq, dk, dv = check(MASKS["dead"], 2, 1, 32, "float32", FUSED)
    dead = ~MASKS["dead"].dense().any(1)
    assert dead[:70].all() and not dead[70:90].any()
    assert not np.asarray(o)[:, dead].any() and np.isneginf(np.asarray(lse)[:, dead]).all()
    assert not np.asarray(dq)[:, dead].any() and not np.asarray(dk)[:, 64:].any() and not np.asarray(dv)[:, 64:].any()


def test_the_predicate_is_not_evaluated_where_all_blocks_are_full():
    calls = []

    def counted(q, k):
        calls.append(1)
        return q[0] >= k[0]

    mask = BlockMask.build(counted, np.ones((1, 128)), np.zeros((1, 64)))
    inputs = arrays(mask, 1, 1, 32, "float32")
    partial = BlockMask.build(counted, np.arange(128)[None], np.arange(64)[None])
    for planned in (mask, partial):
        for block in ((64, 32), (32, 64), (32, 32)):
            planned.planned(block)
    calls.clear()
    jax.eval_shape(lambda *x: run(*x, mask, 1.0, TWO_PASSES), *inputs)
    assert not calls
    jax.eval_shape(lambda *x: run(*x, partial, 1.0, TWO_PASSES), *inputs)
    assert len(calls) == 3  # once a kernel, in its partial branch


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_worklist_has_every_live_block_once_in_order(name, columns):
    mask, block = MASKS[name], (32, 16)
    dense = mask.dense()
    steps = [tuple(int(x) for x in unpack(jnp.int32(item))) for item in worklist(mask, block, columns=columns)]
    n = [-(-size // step) for size, step in zip(mask.shape, block)]
    for major in range(n[1] if columns else n[0]):
        mine = [step for step in steps if step[0] == major]
        assert [s[2] for s in mine] == [1] + [0] * (len(mine) - 1)
        assert [s[3] for s in mine] == [0] * (len(mine) - 1) + [1]
        want = []
        for minor in range(n[0] if columns else n[1]):
            i, j = (minor, major) if columns else (major, minor)
            part = dense[i * 32 : (i + 1) * 32, j * 16 : (j + 1) * 16]
            if part.any():
                want.append((minor, 2 if part.all() and part.shape[1] == 16 else 1))
        assert [(s[1], s[4]) for s in mine] == (want or [(0, 0)])
    assert [s[0] for s in steps] == sorted(s[0] for s in steps)


def test_large_blocks_come_from_one_fine_plan():
    mask = BlockMask.build(causal, scales(1500)[:, ::-1], scales(1300))
    for block in ((256, 512), (512, 256), (512, 512)):
        steps = [unpack(jnp.int32(item)) for item in worklist(mask, block)]
        plan = mask.planned(block).copy()
        plan[:, -1] = np.minimum(plan[:, -1], 1)
        got = np.zeros_like(plan)
        for major, minor, _, _, kind in steps:
            got[major, minor] = kind
        np.testing.assert_array_equal(got, plan)


def test_static_choice_keeps_dq_in_fast_memory_where_it_fits():
    long = BlockMask.build(causal, np.arange(9451)[None] // 4096, np.arange(9451)[None] // 4096)
    assert static_choice(problem_of(long, 16, 16), Device("tpu", "v5e")).rows is None
    assert static_choice(problem_of(long, 16, 16), Device("tpu", "v4")).rows == (512, 512)
    assert static_choice(problem_of(long, 16, 1), Device("tpu", "v5p")).rows == (512, 512)
    assert static_choice(problem_of(MASKS["dead"]), Device("tpu", "v5e")) == Blocks((128, 256), (128, 256), None)


def test_refuses_other_devices_large_heads_and_worklists_beyond_scalar_memory(monkeypatch):
    tpu_device = Device("tpu", "v5e")
    assert tpu.refuses(problem_of(MASKS["mixed"]), tpu_device) is None
    assert "TPU" in tpu.refuses(problem_of(MASKS["mixed"]), Device("gpu", "h100", "9.0"))
    assert "1024" in tpu.refuses(problem_of(MASKS["mixed"], head_size=1024), tpu_device)
    monkeypatch.setattr(tpu, "_MAX_ITEMS", 0)
    assert "scalar memory" in tpu.refuses(problem_of(MASKS["mixed"]), tpu_device)


@pytest.mark.parametrize(
    "name, rows, dtype, head_size",
    [
        ("mixed", None, "bfloat16", 64),
        ("dead", (512, 512), "float32", 48),
        ("noisy_and_clean", (512, 512), "float16", 128),
    ],
)
def test_lowers_for_a_tpu_that_is_not_there(name, rows, dtype, head_size):
    mask = MASKS[name]
    q, k, v, do, dlse = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(mask, 4, 2, head_size, dtype))
    with target("v5e") as device:
        choice = static_choice(problem_of(mask, head_size=head_size, dtype=dtype), device)
        blocks = Blocks(choice.forward, choice.columns, rows)

        def both(q, k, v, do, dlse):
            return run(q, k, v, do, dlse, mask, 0.125, blocks, device)

        text = jax.export.export(jax.jit(both), platforms=["tpu"])(q, k, v, do, dlse).mlir_module()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == (2 if rows is None else 3)
