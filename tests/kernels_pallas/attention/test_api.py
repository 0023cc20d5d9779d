"""The public op: what it checks, what it picks, how it composes; and every backend against the same float64 reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import BlockMask, explain, target
from kernels_pallas.attention import api, block_sparse_attention, xla
from kernels_pallas.block_mask import FULL

pytestmark = pytest.mark.numeric

HERE = Path(__file__).parent


@pytest.mark.parametrize("implementation", ["tpu", "splash", "hopper"])
@pytest.mark.parametrize("name", ["block_causal", "dead"])
def test_backends(checks, masks, implementation, name):
    """Interpreted kernels through the same entry and the same check as all others; their own files look closer.

    The scale is a power of two: splash attention has none, so that its queries are scaled, and rounded, before it.
    """
    checks.check(implementation, masks[name], b=1, h=2, g=1, dtype="bfloat16", scale=0.125)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 333, 680])
@pytest.mark.parametrize("implementation", ["tpu", "splash", "hopper"])
def test_lengths(checks, implementation, length):
    """Those of which `split` and `xla` have tests in their own files."""
    mask = BlockMask.build(checks.not_later, checks.scales(length), checks.scales(length))
    checks.check(implementation, mask, b=1, h=1, g=1, dtype="bfloat16" if implementation == "hopper" else "float32")


def shapes(sq=10, sk=12, h=4, g=2, d=64, dtype=jnp.bfloat16):
    k = jax.ShapeDtypeStruct((2, sk, g, d), dtype)
    return jax.ShapeDtypeStruct((2, sq, h, d), dtype), k, k


def picked(kind, mask, **sizes):
    """What is chosen on a device that is not here."""
    with target(kind):
        (choice,) = explain(lambda *x: block_sparse_attention(*x, mask), *shapes(*mask.shape, **sizes))
    return choice


def test_choices_and_reasons(checks, masks):
    by_scale = BlockMask.build(checks.same, checks.scales(680), checks.scales(680))
    window = BlockMask.build(checks.near, np.arange(512)[None], np.arange(512)[None])
    assert picked("cpu", by_scale).implementation == "split"
    choice = picked("cpu", window)
    assert choice.implementation == "xla"
    refused = dict(choice.refused)
    assert refused["hopper"] == "it is for gpu" and refused["tpu"] == "it is for tpu"
    assert "more than 64 runs" in refused["split"]
    choice = picked("v5e", by_scale, d=128)
    assert choice.implementation == "tpu" and dict(choice.refused)["hopper"] == "it is for gpu"
    choice = picked("h100", by_scale)
    assert choice.implementation == "hopper" and choice.refused == ()
    choice = picked("a100", by_scale)
    assert choice.implementation == "cudnn"
    assert "Hopper" in dict(choice.refused)["hopper"]
    choice = picked("a100", by_scale, dtype=jnp.float32)
    assert choice.implementation == "split"
    assert "float32" in dict(choice.refused)["cudnn"]
    assert str(choice).startswith("block_sparse_attention on gpu a100: split (first that can) for Problem(")


def test_a_forced_implementation_that_cannot_run_raises(checks):
    q, k, v = (jnp.zeros(x.shape, x.dtype) for x in shapes())
    mask = BlockMask.build(checks.same, np.zeros((1, 10)), np.zeros((1, 12)))
    with pytest.raises(ValueError, match="implementation='hopper' cannot run on cpu cpu: it is for gpu; problem: "):
        block_sparse_attention(q, k, v, mask, implementation="hopper")
    with pytest.raises(ValueError, match="implementation='flash' is not one of hopper, tpu, splash, cudnn, split, xla"):
        block_sparse_attention(q, k, v, mask, implementation="flash")


X = np.zeros((2, 10, 4, 8), np.float32)
Y = np.zeros((2, 12, 2, 8), np.float32)
MASK = BlockMask.build(lambda q, k: q[0] >= k[0], np.zeros((1, 10)), np.zeros((1, 12)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], Y, Y, MASK), r"q must be \[b, sq, h, d\] with no empty axis, not \(10, 4, 8\)"),
        ((X, Y[..., None], Y, MASK), r"k must be \[b, sk, g, d\] with no empty axis, not \(2, 12, 2, 8, 1\)"),
        ((X[:0], Y, Y, MASK), r"q must be .* not \(0, 10, 4, 8\)"),
        ((X, Y, Y[:, :11], MASK), r"k \(2, 12, 2, 8\) and v \(2, 11, 2, 8\)"),
        ((X[:1], Y, Y, MASK), r"q \(1, 10, 4, 8\) and k \(2, 12, 2, 8\) must agree in batch and head size"),
        ((X[..., :7], Y, Y, MASK), r"q \(2, 10, 4, 7\) and k \(2, 12, 2, 8\) must agree"),
        ((X[:, :, :3], Y, Y, MASK), r"q \(2, 10, 3, 8\) has 3 heads, which the 2 heads of k \(2, 12, 2, 8\) do not divide"),
        ((X.astype(int), Y, Y, MASK), "q must be float32, bfloat16, float16, not int64"),
        ((X.astype(np.float16), Y, Y, MASK), "q float16, k float32 and v float32 must have one dtype"),
        ((X, Y, Y, MASK.dense()), "mask must be a BlockMask, not ndarray"),
        ((X, Y, Y, MASK[:9, :]), r"mask BlockMask\(.*9x12.*\) does not fit q \(2, 10, 4, 8\) and k \(2, 12, 2, 8\)"),
        ((X, Y, Y, MASK, np.inf), "scale must be a finite number, .*not inf"),
        ((X, Y, Y, MASK, "1"), "scale must be a finite number, .*not '1'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*arguments)


def test_a_traced_scale_is_bad_input():
    with pytest.raises(ValueError, match="known when the function is traced"):
        jax.jit(lambda s: block_sparse_attention(X, Y, Y, MASK, s))(1.0)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(xla, "static_choice", lambda problem, device: xla.Blocks(32, 64))


@pytest.fixture(scope="module")
def problem(checks, masks):
    """A mask that splits and has dead queries, and two sets of arrays for it."""
    mask = masks["dead"]
    first, second = (checks.draw(mask, b=1, d=8, seed=seed) for seed in (0, 1))
    return mask, first, second


def loss(mask, implementation):
    def f(q, k, v):
        o, lse = block_sparse_attention(q, k, v, mask, return_lse=True, implementation=implementation)
        return (jnp.sin(o) * jnp.arange(8)).sum() + jnp.where(lse == -jnp.inf, 0.0, jnp.cos(lse)).sum()

    return f


@pytest.mark.parametrize("implementation", ["xla", "split"])
def test_transformations(checks, problem, small, implementation):
    """The same gradients under vmap, in a scan and rematerialised: one by one, they are checked elsewhere."""
    mask, first, second = problem
    step = jax.value_and_grad(loss(mask, implementation), (0, 1, 2))
    remat = jax.value_and_grad(jax.checkpoint(loss(mask, implementation)), (0, 1, 2))
    pairs = tuple(jnp.stack([x, y]) for x, y in zip(first[:3], second[:3]))
    q, k, v = pairs

    @checks.jit
    def every_way():
        return {
            "one by one": jax.tree.map(lambda *x: jnp.stack(x), step(q[0], k[0], v[0]), step(q[1], k[1], v[1])),
            "vmap": jax.vmap(step)(q, k, v),
            "vmap of queries and values": jax.vmap(step, (0, None, 0))(q, k[0], v),
            "scan and remat": jax.lax.scan(lambda c, x: (c, remat(*x)), None, pairs)[1],
        }

    found = every_way()
    want = found.pop("one by one")
    for name, got in found.items():
        same = slice(0, 1 if "queries" in name else 2)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            np.testing.assert_allclose(x[same], y[same], rtol=1e-5, atol=1e-5, err_msg=name)


def test_lse_is_optional_and_changes_nothing(checks, problem):
    mask, (q, k, v, *_), _ = problem
    o, lse = checks.jit(lambda *x: block_sparse_attention(*x, mask, return_lse=True))(q, k, v)
    np.testing.assert_array_equal(checks.jit(lambda *x: block_sparse_attention(*x, mask))(q, k, v), o)
    assert lse.shape == q.shape[:3] and lse.dtype == jnp.float32


def test_equal_masks_share_a_compilation(checks):
    traces = []

    def f(mask, q, k):
        traces.append(mask)
        return block_sparse_attention(q, k, k, mask)

    f = jax.jit(f, static_argnums=0)
    for _ in range(2):
        f(BlockMask.build(checks.same, np.zeros((1, 10)), np.zeros((1, 12))), X, Y)
    assert len(traces) == 1


def test_importing_loads_no_backend_and_starts_no_device():
    code = """
import sys, kernels_pallas
from jax._src import xla_bridge
print(xla_bridge._backends, "jax.experimental.pallas" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=HERE.parents[2])
    assert done.stdout.strip() == "{} False", done.stderr[-2000:]
    assert all(isinstance(i.where, str) for i in api.IMPLEMENTATIONS)


def test_four_devices():
    """Over batch and heads, mapped by hand and partitioned by the compiler: nothing is gathered, nothing changes."""
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HERE.parents[2])}
    done = subprocess.run([sys.executable, HERE / "four_devices.py"], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    assert len(results) == 6
    for name, found in results.items():
        assert found["difference"] < 1e-5, name
        assert found["pieces"] == 4, name


@st.composite
def any_masks(draw):
    """Masks of unions of intervals, with random metadata: no structure that a plan could rely on."""
    sq, sk = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    runs = draw(st.integers(1, 40))
    q, k = (np.repeat(rng.integers(0, 6, (2, n)), runs, axis=1)[:, :n] for n in (sq, sk))
    pred = draw(st.sampled_from([_both, _either, _never, _beyond]))
    return BlockMask.build(pred, q, k)


def _both(q, k):
    return (q[0] >= k[0]) & (q[1] == k[1])


def _either(q, k):
    return (q[0] > k[0]) | (q[1] == k[1])


def _never(q, k):
    return q[0] > k[0] + 9


def _beyond(q, k):
    return ~(q[0] + 1 < k[1])


@settings(max_examples=60, deadline=None)
@given(mask=any_masks(), block=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_plans_drop_no_live_element_and_call_full_only_what_is(mask, block):
    allowed, (bq, bk) = mask.dense(), block
    for padding_is_partial in (False, True):
        seen = {}
        for how in ("rows", "columns"):
            lists = getattr(mask, how)(block, padding_is_partial=padding_is_partial)
            seen[how] = {
                ((i, j) if how == "rows" else (j, i)): kind
                for i, n in enumerate(lists.count)
                for j, kind in zip(lists.index[i, :n].tolist(), lists.kind[i, :n].tolist())
            }
        assert seen["rows"] == seen["columns"]
        covered = np.zeros_like(allowed)
        for (i, j), kind in seen["rows"].items():
            part = np.s_[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            covered[part] = True
            assert allowed[part].any()
            if kind == FULL:
                assert allowed[part].all()
                assert not padding_is_partial or allowed[part].shape == block
        assert not (allowed & ~covered).any()
