"""The Hopper kernels against float64 closed forms, in Pallas's interpreter with its race detector on, and lowered for cuda."""

import dataclasses
import functools
import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import BlockMask, mosaic_gpu
from kernels_pallas.attention import hopper, hopper_backward, hopper_work
from kernels_pallas.attention.problem import Problem
from kernels_pallas.device import target

pytestmark = pytest.mark.numeric
interpreted = pytest.mark.skipif(
    not mosaic_gpu.can_interpret(), reason="this jax does not interpret warp-specialised Mosaic GPU kernels; 0.11 does"
)
# An exception inside the interpreter would leave its other threads waiting.
DETECTS_RACES = mosaic_gpu.can_interpret() and "on_race" in inspect.signature(plgpu.InterpretGPUParams).parameters


def next_scale(q, k):
    return k[0] <= q[0]


def noisy_clean(q, k):
    """Block diffusion over [noisy, clean]: row 0 is the block, row 1 says clean."""
    return ((q[0] == k[0]) & (q[1] == k[1])) | ((k[1] == 1) & (k[0] < q[0]))


def within(q, k):
    """Equal segments, except that 9 is visible to all and sees nothing but itself."""
    return (q[0] == k[0]) | ((k[0] == 9) & ~(q[0] == 9))


def segments(*sizes_and_ids):
    return np.concatenate([np.full(size, i, np.int32) for size, i in sizes_and_ids])[None]


SCALES = segments(*((n * n, i) for i, n in enumerate((1, 2, 3, 4, 5, 6, 8, 7))))  # 204 tokens
TWO_HALVES = np.stack([np.tile(np.arange(80) // 16, 2), np.repeat([0, 1], 80)]).astype(np.int32)
MASKS = {
    # Several tiles a row and a ragged end of 12.
    "next scale": BlockMask(next_scale, SCALES, SCALES),
    # Two rows of metadata; whole quarters of the mask are empty.
    "noisy, clean": BlockMask(noisy_clean, TWO_HALVES, TWO_HALVES),
    # More keys than queries. 140 queries, so a whole pair of tiles, see nothing, and 70 keys, so a whole tile, are seen by none.
    "dead": BlockMask(within, segments((140, -1), (60, 2)), segments((64, 2), (70, 7), (130, 2))),
    # Shorter than anything the hardware moves.
    "one query": BlockMask(within, segments((1, 3)), segments((40, 9), (25, 3))),
}


@dataclasses.dataclass(frozen=True)
class Case:
    mask: str
    dtype: type
    batch: int
    heads: int
    kv_heads: int
    head_size: int
    # None is the static choice; others have more tiles than stages.
    blocks: hopper.Blocks | None = None
    backward_blocks: hopper_backward.Blocks | None = None


CASES = [
    Case("next scale", jnp.bfloat16, 1, 2, 1, 64, hopper.Blocks(64, 2), hopper_backward.Blocks(64, 2, 64, 2)),
    Case("noisy, clean", jnp.bfloat16, 1, 2, 2, 32, hopper.Blocks(64, 2, take_turns=False)),
    Case("dead", jnp.float16, 2, 1, 1, 128),
    Case("one query", jnp.float16, 1, 3, 1, 96),
]


def double(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


class Oracle:
    """Everything in float64 from dense probabilities, and how far a kernel may be from it.

    A kernel rounds p, ds and its outputs to the inputs' dtype and does all else in float32. So o = p v may be off by
    u (p |v| + |o|), where u is the unit roundoff, or half the smallest float16 where p is that small; gradients likewise.
    `fine` allows for float32 in exponents of up to some tens and in sums of some hundred terms.
    """

    fine = 1e-5

    def __init__(self, mask, q, k, v, do, dlse, scale):
        self.unit, group = float(jnp.finfo(q.dtype).eps) / 2, q.shape[2] // k.shape[2]
        q, k, v, do = (double(x) for x in (q, k, v, do))
        self.group, wide_k, wide_v = group, np.repeat(k, group, 2), np.repeat(v, group, 2)
        allowed = mask.dense()[None, None]
        s = np.where(allowed, np.einsum("bqhd,bkhd->bhqk", q, wide_k) * scale, -np.inf)
        top = s.max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0)
        total = np.exp(s - top).sum(-1, keepdims=True)
        with np.errstate(divide="ignore"):
            lse = top + np.log(total)
        p = np.where(total > 0, np.exp(s - top) / np.where(total > 0, total, 1), 0)
        self.lse = lse[..., 0].swapaxes(1, 2)
        self.dead = ~mask.dense().any(1)
        tiny = allowed * 2.0**-25
        self.o = self.sum("bhqk,bkhd->bqhd", p, wide_v, p * self.fine, tiny)
        delta = np.einsum("bqhd,bqhd->bqh", do, self.o[0]) - dlse
        self.delta = delta
        dp, delta = np.einsum("bqhd,bkhd->bhqk", do, wide_v), delta.swapaxes(1, 2)[..., None]
        ds = p * (dp - delta) * scale
        loose = p * (abs(dp) + abs(delta)) * scale * self.fine
        self.dq = self.sum("bhqk,bkhd->bqhd", ds, wide_k, loose, tiny)
        self.dk = self.sum("bhqk,bqhd->bkhd", ds, q, loose, tiny, fold=True)
        self.dv = self.sum("bhqk,bqhd->bkhd", p, do, p * self.fine, tiny, fold=True)

    def sum(self, equation, weights, values, loose, tiny, fold=False):
        """The exact sum over heads of a group if `fold`, and what it may be off by."""
        exact = np.einsum(equation, weights, values)
        off = np.einsum(equation, self.unit * abs(weights) + loose + tiny, abs(values))
        if fold:
            exact, off = (x.reshape(*x.shape[:2], -1, self.group, x.shape[3]).sum(3) for x in (exact, off))
        return exact, off + self.unit * abs(exact) + self.fine


def inputs(case):
    mask = MASKS[case.mask]
    rng = np.random.default_rng(0)

    def draw(length, heads):
        return jnp.asarray(rng.standard_normal((case.batch, length, heads, case.head_size)), case.dtype)

    (sq, sk), h, g = mask.shape, case.heads, case.kv_heads
    q, k, v, do = draw(sq, h), draw(sk, g), draw(sk, g), draw(sq, h)
    return mask, (q, k, v, do), rng.standard_normal((case.batch, sq, h))


@pytest.fixture
def races(monkeypatch, caplog):
    """Turns the interpreter's race detector on, where it can report without raising; the text of what it found."""
    if DETECTS_RACES:
        params = functools.partial(plgpu.InterpretGPUParams, detect_races=True, on_race="warn")
        monkeypatch.setattr(plgpu, "InterpretGPUParams", params)
    with caplog.at_level(logging.WARNING):
        yield lambda: [r.getMessage() for r in caplog.records if "RACE" in r.getMessage()]


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mask)
def test_against_float64(case, races, monkeypatch):
    for module, blocks in ((hopper, case.blocks), (hopper_backward, case.backward_blocks)):
        if blocks is not None:
            monkeypatch.setattr(module, "static_choice", lambda problem, device, blocks=blocks: blocks)
    mask, (q, k, v, do), dlse = inputs(case)
    scale = 1.7 * case.head_size**-0.5
    exact = Oracle(mask, q, k, v, do, dlse, scale)
    with target("h100", interpret=True) as device:
        static = dict(mask=mask, scale=scale, device=device)
        assert hopper.refuses(Problem.of(q, k, mask, scale), device) is None
        o, lse = hopper.forward(q, k, v, **static)
        # What callers' arithmetic with -inf may make of delta in dead rows must not matter.
        delta = np.where(exact.dead[None, :, None], np.nan, exact.delta).astype(np.float32)
        dq, dk, dv = hopper.backward(q, k, v, jnp.float32(exact.lse), do, jnp.asarray(delta), **static)
    assert (o.dtype, lse.dtype, dq.dtype, dk.dtype, dv.dtype) == (q.dtype, jnp.float32, q.dtype, k.dtype, v.dtype)
    live = ~exact.dead
    np.testing.assert_allclose(np.asarray(lse)[:, live], exact.lse[:, live], rtol=1e-5, atol=1e-5)
    assert (np.asarray(lse)[:, ~live] == -np.inf).all()
    for name, got in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items():
        want, off = getattr(exact, name)
        assert got.shape == want.shape, name
        worst = np.max(abs(double(got) - want) / off)
        assert worst <= 1, f"{name} is off by {worst:.2f} times what rounding explains"
    assert not double(o)[:, ~live].any() and not double(dq)[:, ~live].any()
    unseen = ~mask.dense().any(0)
    assert not double(dk)[:, unseen].any() and not double(dv)[:, unseen].any()
    assert not races()


@pytest.mark.skipif(not DETECTS_RACES, reason="this jax's interpreter reports no races; 0.12 does")
def test_race_detector_sees_a_missing_fence(races, monkeypatch):
    """The check above can fail: without the fence, the output may be copied before it is written."""
    monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
    mask, (q, k, v, _), _ = inputs(CASES[3])
    with target("h100", interpret=True) as device:
        jax.block_until_ready(hopper.forward(q, k, v, mask=mask, scale=1.0, device=device))
    assert races()


def lowered(fn, *arrays):
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu_v2", "mosaic_gpu")]
    return export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=checks)(*arrays).mlir_module()


@pytest.mark.parametrize("head_size, dtype", [(32, jnp.float16), (64, jnp.bfloat16), (96, jnp.bfloat16), (128, jnp.bfloat16)])
def test_lowers_for_cuda(head_size, dtype):
    """Also with several heads a group, and with lengths that no tile divides."""
    scales = segments(*((n * n, i) for i, n in enumerate((1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 3))))
    mask = BlockMask(next_scale, scales, scales)
    length = mask.shape[0]
    assert length % 8
    q, do = (jax.ShapeDtypeStruct((2, length, 4, head_size), dtype) for _ in range(2))
    k, v = (jax.ShapeDtypeStruct((2, length, 2, head_size), dtype) for _ in range(2))
    row = jax.ShapeDtypeStruct((2, length, 4), jnp.float32)
    with target("h100") as device:
        assert hopper.refuses(Problem.of(q, k, mask, 0.1), device) is None
        static = dict(mask=mask, scale=0.1, device=device)
        assert lowered(functools.partial(hopper.forward, **static), q, k, v).count("@mosaic_gpu_v2") == 1
        assert lowered(functools.partial(hopper.backward, **static), q, k, v, row, do, row).count("@mosaic_gpu_v2") == 2


def test_metadata_that_the_predicate_does_not_read_is_not_loaded():
    """Mosaic finds no layout for a row that is loaded and not used; a cut of a combination reads by slices."""
    rows = np.stack([np.arange(200), np.zeros(200, int)])
    mask = BlockMask(next_scale, rows, rows) & BlockMask(next_scale, rows[:1] * 2, rows[:1])
    q = jax.ShapeDtypeStruct((1, 200, 2, 64), jnp.bfloat16)
    with target("h100") as device:
        assert "@mosaic_gpu_v2" in lowered(functools.partial(hopper.forward, mask=mask, scale=0.1, device=device), q, q, q)


def test_blocks_change_the_program(monkeypatch):
    mask = MASKS["next scale"]
    q, k = (jax.ShapeDtypeStruct((1, mask.shape[0], h, 64), jnp.bfloat16) for h in (2, 1))
    row = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    with target("h100") as device:
        static = dict(mask=mask, scale=0.125, device=device)

        def programs(module, fn, arrays, choices):
            for blocks in choices:
                monkeypatch.setattr(module, "static_choice", lambda problem, device, blocks=blocks: blocks)
                yield lowered(functools.partial(fn, **static), *arrays)

        forward = [hopper.Blocks(128, 2), hopper.Blocks(64, 2), hopper.Blocks(128, 3), hopper.Blocks(128, 2, take_turns=False)]
        assert len(set(programs(hopper, hopper.forward, (q, k, k), forward))) == len(forward)
        sizes = [(64, 2, 64, 2), (128, 2, 64, 2), (64, 3, 64, 2), (64, 2, 128, 2), (64, 2, 64, 3)]
        both = [hopper_backward.Blocks(*size) for size in sizes]
        assert len(set(programs(hopper_backward, hopper.backward, (q, k, k, row, q, row), both))) == len(both)


@pytest.mark.parametrize("tile", [(64, 64), (64, 128)])
@pytest.mark.parametrize("name", MASKS)
def test_schedule_visits_every_live_tile_once(name, tile):
    plan = MASKS[name].planned(tile)
    rows = hopper_work.schedule(plan)
    again = np.zeros((2 * len(rows), plan.shape[1]), plan.dtype)
    for pair, count, *entries in rows:
        for entry in entries[:count]:
            column = entry >> 4
            assert not again[2 * pair : 2 * pair + 2, column].any(), "visited twice"
            again[2 * pair : 2 * pair + 2, column] = entry & 3, entry >> 2 & 3
    np.testing.assert_array_equal(again[: len(plan)], plan)
    assert not again[len(plan) :].any()
    assert sorted(rows[:, 0]) == list(range(len(rows)))
    assert (np.diff(rows[:, 1]) <= 0).all(), "most visits first"


def test_schedule_masks_a_ragged_end():
    full = np.full((2, 3), 2, np.int8)
    (row,) = hopper_work.schedule(full, ragged=True)
    assert [(e >> 4, e & 3, e >> 2 & 3) for e in row[2:]] == [(0, 2, 2), (1, 2, 2), (2, 1, 1)]
    assert (full == 2).all(), "the plan is shared and must stay as it is"


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(dtype="float32"), "bfloat16 or float16, .* not float32"),
        (dict(head_size=80), "head size must be 32, 64, 96 or 128, not 80"),
        (dict(head_size=256), "head size .* not 256"),
        (dict(scale=0.0), "scale must be positive"),
        (dict(scale=-1.0), "scale must be positive"),
        (dict(batch=65536), "at most 65535"),
        (dict(heads=65536), "at most 65535"),
    ],
)
def test_refuses(change, reason):
    problem = Problem(MASKS["next scale"], 1, 2, 1, 64, "bfloat16", 0.125)
    with target("h200") as device:
        assert hopper.refuses(problem, device) is None
        got = hopper.refuses(dataclasses.replace(problem, **change), device)
    assert got is not None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(got)


def test_refuses_other_devices_and_too_much_shared_memory(monkeypatch):
    problem = Problem(MASKS["next scale"], 1, 2, 1, 128, "bfloat16", 0.125)
    for kind in ("cpu", "v5e", "a100", "b200"):
        with target(kind) as device:
            assert "Hopper" in hopper.refuses(problem, device)
    with target("h100") as device:
        monkeypatch.setattr(hopper_backward, "static_choice", lambda problem, device: hopper_backward.Blocks(128, 3, 64, 2))
        assert "262144 bytes of shared memory" in hopper.refuses(problem, device)
        monkeypatch.undo()
        monkeypatch.setattr(hopper, "static_choice", lambda problem, device: hopper.Blocks(128, 4))
        assert "295424 bytes of shared memory" in hopper.refuses(problem, device)


@pytest.mark.skipif(mosaic_gpu.can_interpret(), reason="this jax interprets")
def test_refuses_to_interpret_on_an_old_jax():
    with target("h100", interpret=True) as device:
        assert "cannot interpret" in hopper.refuses(Problem(MASKS["dead"], 1, 1, 1, 64, "bfloat16", 1.0), device)
