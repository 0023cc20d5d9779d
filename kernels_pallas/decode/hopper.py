"""Attention of a few rows to a cache on Hopper (sm_90a): the positions are split over blocks of threads (split-KV).

One block of threads a sequence, kv head and part of the positions, so that the whole cache is under way at once (Dao et al.
2023, Flash-Decoding). The parts are of the sequence's own length, not of the cache's, and their softmaxes are merged by XLA.
The rows that share a kv head fill one wgmma of 64 rows; the padding is free, since the kernel waits for memory.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.base2 import LN2, LOG2E
from kernels_pallas.decode.problem import Problem
from kernels_pallas.device import Device
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "forward", "refuses", "static_choice"]

_ROWS = 64
_BARS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_BARS_FLOAT32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the kernel.

    Attributes:
      keys: positions of a tile.
      stages: tiles of keys and of values in shared memory at a time.
      multiprocessors: of the device; each holds one block of threads, since a warp-specialised kernel takes all registers.
    """

    keys: int
    stages: int
    multiprocessors: int = 132


def static_choice(problem: Problem, device: Device) -> Blocks:
    """16 KiB tiles, and as many as fit: enough bytes under way to hide the memory's latency."""
    return tuned(
        Blocks(keys=8192 // problem.head_size, stages=4 if problem.rows <= _ROWS else 3),
        "decode" if problem.queries == 1 else "tree",
        device,
        dtype=problem.dtype,
        head_size=problem.head_size,
        length=problem.length,
    )


def parts_of(work: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts to split `steps` tiles of each of `work` sequences and heads.

    Blocks of threads run in waves, one a multiprocessor, and each costs about two tiles more than those it reads: its start,
    the first tile's way, its result.
    """

    def tiles(parts):
        return -(-work * parts // multiprocessors) * (-(-steps // parts) + 2)

    return min(range(1, steps + 1), key=tiles)


def refuses(problem: Problem, device: Device) -> str | None:
    """Why the kernel cannot compute `problem` on `device`, or None."""
    if (reason := mosaic_gpu.refuses(device)) is not None:
        return reason
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype {problem.dtype} is not bfloat16 or float16, the types of its products"
    if problem.head_size not in (64, 128):
        return f"head size {problem.head_size} is not 64 or 128"
    if problem.length % 8:
        return f"cache length {problem.length} is not a multiple of 8, the rows of a layout tile: allocate it so"
    return None


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
    warpgroups = 1 if n <= _ROWS else 2
    tiles = pl.cdiv(n, warpgroups * _ROWS)
    parts = parts_of(b * g * tiles, pl.cdiv(s, blocks.keys), blocks.multiprocessors)
    padded = tiles * warpgroups * _ROWS
    # Few rows are written in eights, not padded: with many parts that would be many bytes.
    written = n + -n % 8 if n <= _ROWS else padded
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - n), (0, 0)))
    scratch = {
        "q": plgpu.SMEM((warpgroups, _ROWS, d), q.dtype, transforms=_BARS),
        "o": plgpu.SMEM((warpgroups, _ROWS, d), jnp.float32, transforms=_BARS_FLOAT32),
        "lse": plgpu.SMEM((warpgroups, _ROWS), jnp.float32),
        "arrived": plgpu.Barrier(num_barriers=warpgroups),
    }
    if device.interpret:
        # Pallas's interpreter takes the first operand of a product from shared memory only.
        scratch["p"] = plgpu.SMEM((warpgroups, _ROWS, blocks.keys), q.dtype, transforms=_BARS)

    def body(lengths_g, q_g, k_g, v_g, o_g, lse_g, *scratch_refs):
        refs = dict(zip(scratch, scratch_refs))
        _block_of_threads(
            lengths_g, q_g, k_g, v_g, o_g, lse_g, refs, blocks=blocks, parts=parts, tiles=tiles, scale=problem.scale
        )

    o, lse = mosaic_gpu.kernel(
        body,
        device,
        name="decode",
        out_type=[
            jax.ShapeDtypeStruct((b, g, parts, written, d), jnp.float32),
            jax.ShapeDtypeStruct((b, g, parts, padded), jnp.float32),
        ],
        scratch_types=list(scratch.values()),
        grid=(b * g * parts * tiles,),
        grid_names=("i",),
        threads=warpgroups + 1,
        approx_math=True,
    )(lengths, q, k_cache, v_cache)
    return _merged(o[..., :n, :], lse[..., :n])


def _block_of_threads(lengths_g, q_g, k_g, v_g, o_g, lse_g, refs, *, blocks, parts, tiles, scale):
    """One part of the positions of one sequence and kv head, for 64 rows a warpgroup."""
    # Tiles of rows that read the same positions are neighbours, so that they find them in the L2 cache.
    i, wg = lax.axis_index("i"), lax.axis_index("wg")
    i, tile = _divided(i, tiles)
    i, part = _divided(i, parts)
    b, g = _divided(i, k_g.shape[2])
    warpgroups, _, d = refs["q"].shape
    row, written = (tile * warpgroups + wg) * _ROWS, min(_ROWS, o_g.shape[3])
    length = lengths_g[b]
    steps, _ = _divided(length + (blocks.keys - 1), blocks.keys)
    share, _ = _divided(steps + (parts - 1), parts)
    first = part * share
    count = lax.max(lax.min(steps - first, share), jnp.int32(0))
    q_s, o_s, lse_s, arrived = (refs[name].at[wg] for name in ("q", "o", "lse", "arrived"))

    def compute(pipeline):
        plgpu.copy_gmem_to_smem(q_g.at[b, g, pl.ds(row, _ROWS)], q_s, arrived)
        plgpu.barrier_wait(arrived)
        rows = jnp.zeros((_ROWS,), jnp.float32)
        acc, m, l = pipeline((jnp.zeros((_ROWS, d), jnp.float32), rows - jnp.inf, rows))
        dead = l == 0
        l = jnp.where(dead, 1.0, l)
        o_s[...] = acc * lax.broadcast_in_dim(1 / l, acc.shape, [0])
        lse_s[...] = jnp.where(dead, -jnp.inf, (m + jnp.log2(l)) * LN2)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_s.at[pl.ds(0, written)], o_g.at[b, g, part, pl.ds(row, written)])
        plgpu.copy_smem_to_gmem(lse_s, lse_g.at[b, g, part, pl.ds(row, _ROWS)])
        plgpu.wait_smem_to_gmem(0)

    def step(indices, k_s, v_s, k_used, v_used, carry):
        acc, m, l = carry
        here = length - (first + indices[0]) * blocks.keys

        def qk(products):
            plgpu.wgmma(products, q_s, k_s.T)
            return products[...]

        s = pl.run_scoped(qk, plgpu.ACC((_ROWS, blocks.keys), jnp.float32)) * (scale * LOG2E)
        plgpu.barrier_arrive(k_used)

        def masked():
            # What lies past the length may be anything, and 0 * NaN is NaN: the values are cleared too. Warpgroups that share
            # the tile all write the same.
            v = v_s[...]
            v_s[...] = jnp.where(plgpu.broadcasted_iota(jnp.int32, v.shape, 0) < here, v, jnp.zeros_like(v))
            plgpu.commit_smem()
            return jnp.where(plgpu.broadcasted_iota(jnp.int32, s.shape, 1) < here, s, -jnp.inf)

        s = lax.cond(here < blocks.keys, masked, lambda: s)
        # All rows see the same positions, at least one: the maximum is finite.
        m_new = jnp.maximum(m, s.max(axis=1))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [0]))
        l = l * alpha + p.sum(axis=1)
        p = p.astype(v_s.dtype)
        if "p" in refs:
            refs["p"][wg] = p
            plgpu.commit_smem()
            p = refs["p"].at[wg]

        def pv(products):
            plgpu.wgmma(products, p, v_s)
            return products[...]

        products = pl.run_scoped(pv, plgpu.ACC((_ROWS, d), jnp.float32))
        plgpu.barrier_arrive(v_used)
        return acc * lax.broadcast_in_dim(alpha, acc.shape, [0]) + products, m_new, l

    spec = plgpu.BlockSpec((blocks.keys, d), lambda t: (first + t, 0), transforms=_BARS)
    plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(count,),
        in_specs=[spec, spec],
        memory_registers=40,
        max_concurrent_steps=blocks.stages,
        wg_axis="wg",
        num_compute_wgs=warpgroups,
        manual_consumed_barriers=True,
        compute_context=compute,
    )(k_g.at[b, :, g], v_g.at[b, :, g])


def _divided(i, n: int):
    return lax.div(i, jnp.int32(n)), lax.rem(i, jnp.int32(n))


def _merged(o, lse):
    """One softmax of the parts: o [b, g, parts, n, d], lse [b, g, parts, n] -> [b, g, n, d], [b, g, n]."""
    if o.shape[2] == 1:
        return o[:, :, 0], lse[:, :, 0]
    top = lse.max(axis=2, keepdims=True)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(axis=2)
    o = jnp.einsum("bgpn,bgpnd->bgnd", weights, o) / jnp.where(total == 0, 1.0, total)[..., None]
    return o, top[:, :, 0] + jnp.log(total)
