"""Attention of a few rows to a cache, for TPU: blocks past the lengths are not fetched, and the cache is read where it lies.

XLA lays a cache [b, s, g, d] out in one of three ways, whichever pads least, and a Pallas operand must be row-major; the
kernel therefore takes the axes in the order in which they lie in memory, so that the transpose before it moves nothing:

- d a multiple of 128 lanes and g of 2, 4 or 8k heads: row-major. Heads are interleaved in sublanes and read by stride.
- d a multiple of 128, other g: [b, g, s, d].
- other d: positions along the lanes, [b, g, d, s].

Where a program keeps its cache otherwise, XLA inserts the copy that this avoids.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.base2 import LN2, LOG2E
from kernels_pallas.decode.problem import Problem
from kernels_pallas.device import Device
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "forward", "refuses", "static_choice"]

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a step.

    Attributes:
      positions: of the cache, a multiple of 128.
      rows: most query rows a kv head, a multiple of 128; more are split, and every part reads the cache again.
    """

    positions: int
    rows: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """About 1 MiB of keys a step, so that what a grid step costs by itself is little beside the copies."""
    position_bytes = _heads(problem.kv_heads) * problem.head_size * jnp.dtype(problem.dtype).itemsize
    positions = max(_LANES, min(2048, (1 << 20) // position_bytes // _LANES * _LANES))
    # Scores of one head and the accumulators of all of them share the 16 MiB of scoped VMEM with the blocks.
    default = Blocks(positions=positions, rows=256 if problem.head_size <= 128 else 128)
    return tuned(
        default,
        "decode" if problem.queries == 1 else "tree",
        device,
        dtype=problem.dtype,
        head_size=problem.head_size,
        length=problem.length,
    )


def refuses(problem: Problem, device: Device) -> str | None:
    """Why the kernel cannot compute `problem`, or None."""
    if problem.dtype not in ("float32", "bfloat16"):
        return f"Mosaic has no {problem.dtype} products; bfloat16 and float32 work"
    if problem.head_size % 8 or problem.head_size > 512:
        return f"head size {problem.head_size} is not a multiple of 8 up to 512"
    return None


def block_at(step, length, positions: int):
    """Which block of a cache a step has: past the length the last one still, which is not fetched again."""
    return lax.min(step, lax.max(lax.div(length + (positions - 1), positions) - 1, 0))


def forward(q, k_cache, v_cache, lengths, *, problem: Problem, device: Device):
    """Attention of rows to the first `lengths` positions.

    Args:
      q: [b, g, n, d].
      k_cache: [b, s, g, d].
      v_cache: [b, s, g, d].
      lengths: int32 [b] in 0..s.
      problem: static facts; `batch` is not used.
      device: to build for.

    Returns:
      (o float32 [b, g, n, d], lse float32 [b, g, n]).
    """
    (b, g, n, d), s = q.shape, k_cache.shape[1]
    blocks = static_choice(problem, device)
    rows = min(blocks.rows, _up(n, 32 // q.dtype.itemsize))
    heads = _heads(g)
    positions = min(blocks.positions, _up(s, _LANES))
    layout = _layout(g, d)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -n % rows), (0, 0)))
    order, shape = {
        "sgd": ((0, 1, 2, 3), (1, positions, heads, _LANES)),
        "gsd": ((0, 2, 1, 3), (1, heads, positions, d)),
        "gds": ((0, 2, 3, 1), (1, heads, d, positions)),
    }[layout]

    # Loads with a stride are of 128 lanes: wider interleaved heads come in so many blocks, of one array.
    columns = d // _LANES if layout == "sgd" else 1

    def cache_block(column, i, h, r, j, lengths):
        where = {"s": block_at(j, lengths[i], positions), "g": h, "d": column}
        return (i, *(where[axis] for axis in layout))

    cache = [pl.BlockSpec(shape, functools.partial(cache_block, column)) for column in range(columns)]
    row_block = pl.BlockSpec((1, heads, rows, d), lambda i, h, r, j, lengths: (i, h, r, 0))
    padded = q.shape[2]
    # Not `pl.num_programs`: jax 0.11.2 keeps the trace of a kernel for other grids with the same blocks, that number included.
    steps = pl.cdiv(s, positions)
    body = functools.partial(_kernel, layout=layout, scale=problem.scale, positions=positions, steps=steps)
    o, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, g // heads, padded // rows, steps),
            in_specs=[row_block, *cache, *cache],
            out_specs=[row_block, pl.BlockSpec((1, heads, 1, rows), lambda i, h, r, j, lengths: (i, h, 0, r))],
            scratch_shapes=[
                pltpu.VMEM((heads, rows, _LANES), jnp.float32),
                pltpu.VMEM((heads, rows, _LANES), jnp.float32),
                pltpu.VMEM((heads, rows, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((b, g, padded, d), jnp.float32),
            jax.ShapeDtypeStruct((b, g, 1, padded), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=device.interpret,
        name="decode",
    )(lengths, q, *[k_cache.transpose(order)] * columns, *[v_cache.transpose(order)] * columns)
    return o[:, :, :n], lse[:, :, 0, :n]


def _kernel(lengths, q_ref, *refs, layout, scale, positions, steps):
    *caches, o_ref, lse_ref, m_ref, l_ref, acc_ref = refs
    k_refs, v_refs = caches[: len(caches) // 2], caches[len(caches) // 2 :]
    j = pl.program_id(3)
    here = lengths[pl.program_id(0)] - j * positions
    heads = q_ref.shape[1]
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    @pl.when(j == 0)
    def _():
        m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def head(h, k, v, ragged):
        contract = ((1,), (0,)) if layout == "gds" else ((1,), (1,))
        s = lax.dot_general(q_ref[0, h], k, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
        s = s * (scale * LOG2E)
        if ragged:
            # What lies past the length may be anything, and 0 * NaN is NaN: the values are cleared too.
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 1) < here, s, -jnp.inf)
            axis = 1 if layout == "gds" else 0
            v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, axis) < here, v, jnp.zeros_like(v))
        # All rows see the same positions, at least one: from the first step on the maximum is finite.
        m_old = m_ref[h]
        m = jnp.maximum(m_old, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - m[:, :1])
        alpha = jnp.exp2(m_old - m)
        m_ref[h] = m
        l_ref[h] = l_ref[h] * alpha + p.sum(axis=1, keepdims=True)
        contract = ((1,), (1,)) if layout == "gds" else ((1,), (0,))
        pv = lax.dot_general(p.astype(v.dtype), v, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
        acc_ref[h] = acc_ref[h] * alpha[:, :1] + pv

    def step(ragged):
        together = _together(q_ref.dtype, layout)

        def some(i, _):
            for h, (k, v) in enumerate(zip(_heads_of(k_refs, i, layout), _heads_of(v_refs, i, layout))):
                head(i * together + h, k, v, ragged)

        # Few rows are over before the products' latency is: heads should overlap. Many would only make a long program, but
        # Mosaic cannot find interleaved 16-bit heads by a number that it does not know.
        unroll = together > 1 or q_ref.shape[2] <= 64
        lax.fori_loop(0, heads // together, some, None, unroll=unroll)

    pl.when(here >= positions)(lambda: step(False))
    pl.when((here > 0) & (here < positions))(lambda: step(True))

    @pl.when(j == steps - 1)
    def _():
        for h in range(heads):
            dead = l_ref[h] == 0
            l = jnp.where(dead, 1.0, l_ref[h])
            o_ref[0, h] = acc_ref[h] / l[:, :1]
            lse = jnp.where(dead, -jnp.inf, (m_ref[h] + jnp.log2(l)) * LN2)
            lse_ref[0, h] = lse.T[:1]


def _together(dtype, layout: str) -> int:
    """Heads that can only be read together: two interleaved ones of 16 bits share 32-bit words."""
    return 4 // dtype.itemsize if layout == "sgd" else 1


def _heads_of(refs, i, layout: str) -> list[jax.Array]:
    """The cache of the i-th `_together` heads: [positions, d] each, of layout "gds" [d, positions]."""
    if layout != "sgd":
        return [refs[0][0, i]]
    columns = []
    for ref in refs:
        words = ref if ref.dtype.itemsize == 4 else ref.bitcast(jnp.uint32)
        _, positions, rows, lanes = words.shape
        columns.append(words.reshape(positions * rows, lanes)[pl.ds(i, positions, stride=rows), :])
    words = jnp.concatenate(columns, axis=1)
    if words.dtype == jnp.float32:
        return [words]
    # The even head is the low half of a word; a bfloat16 is the high half of a float32.
    return [pltpu.bitcast(half, jnp.float32).astype(jnp.bfloat16) for half in (words << 16, words & jnp.uint32(0xFFFF0000))]


def _layout(g: int, d: int) -> str:
    if d % _LANES:
        return "gds"
    return "sgd" if g in (2, 4) or g % 8 == 0 else "gsd"


def _heads(g: int) -> int:
    """Heads in a block: the largest divisor up to 8, the sublanes that a row-major cache interleaves."""
    return max(size for size in range(1, 9) if g % size == 0)


def _up(n: int, multiple: int) -> int:
    return n + -n % multiple
