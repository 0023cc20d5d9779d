"""Gradients of block-sparse attention on Hopper: one kernel for queries, one for keys and values, over live tiles only."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.attention import hopper_work as work
from kernels_pallas.attention.problem import Problem
from kernels_pallas.base2 import LOG2E
from kernels_pallas.block_mask import EMPTY, BlockMask
from kernels_pallas.device import Device
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "backward", "shared_memory", "static_choice"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the two backward kernels.

    Attributes:
      block_k: keys of a tile that the kernel of dq visits, a multiple of 64.
      stages_k: such tiles, of keys and of values, in shared memory at a time.
      block_q: queries of a tile that the kernel of dk and dv visits, a multiple of 64.
      stages_q: such tiles, of queries and of gradients, in shared memory at a time.
    """

    block_k: int
    stages_k: int
    block_q: int
    stages_q: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """What was measured, or else the widest tiles that the registers hold beside the accumulators."""
    default = Blocks(block_k=128 if problem.head_size <= 64 else 64, stages_k=3, block_q=64, stages_q=3)
    return tuned(default, "attention_backward", device, **problem.bucket)


def shared_memory(problem: Problem, blocks: Blocks) -> int:
    """Bytes of shared memory that the tiles of the hungrier kernel take."""
    rows = work.WARPGROUPS * work.ROWS
    position = 2 * 2 * problem.head_size  # its query and gradient, or its key and value
    dq = position * (rows + blocks.stages_k * blocks.block_k)
    dkv = position * rows + (position + 2 * 4) * blocks.stages_q * blocks.block_q
    return max(dq, dkv)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    do: jax.Array,
    delta: jax.Array,
    *,
    mask: BlockMask,
    scale: float,
    device: Device,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients from recomputed probabilities (FlashAttention-2, arXiv:2307.08691, algorithm 2).

    With p = exp(scale q k^T - lse) where allowed: dv = p^T do, ds = scale p (do v^T - delta), dq = ds k, dk = ds^T q.

    Args:
      q: [b, sq, h, d].
      k: [b, sk, g, d], g divides h.
      v: [b, sk, g, d].
      lse: float32 [b, sq, h], of `forward`.
      do: [b, sq, h, d], the gradient of o.
      delta: float32 [b, sq, h], the sum of do * o over d, less the gradient of lse.
      mask: that of `forward`, as are `scale` and `device`.
      scale: of the products, positive.
      device: that the kernels are built for.

    Returns:
      (dq, dk, dv) in the dtypes of q, k and v; 0 for queries that may attend to nothing and keys that nothing attends to.
    """
    sq, sk = mask.shape
    blocks = static_choice(Problem.of(q, k, mask, scale), device)
    whole = math.lcm(work.WARPGROUPS * work.ROWS, blocks.block_q)
    terms = _row_terms(lse, delta, scale, -(-sq // whole) * whole)
    q, k, v, do = tiles.pad_length(q, k, v, do)
    static = dict(mask=mask, scale=scale, device=device, blocks=blocks)
    dq = _grad_q(q, k, v, do, *terms, **static)
    dk, dv = _grad_kv(q, k, v, do, *terms, **static)
    return dq[:, :sq], dk[:, :sk], dv[:, :sk]


def _row_terms(lse: jax.Array, delta: jax.Array, scale: float, length: int) -> tuple[jax.Array, jax.Array]:
    """lse in bits, and scaled delta, both [b, h, length]: p = exp2(bits q k^T - lse) and ds = p (scale do v^T - delta).

    Queries that see nothing, and those past the end, get lse = +inf, which makes p = 0 whatever the mask, and delta = 0.
    """
    dead = lse == -jnp.inf

    def rows(x, fill):
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - x.shape[1])), constant_values=fill)

    return rows(jnp.where(dead, jnp.inf, lse * LOG2E), jnp.inf), rows(jnp.where(dead, 0.0, delta * scale), 0.0)


def _two_products(a, b, c, e, then):
    """(then(a @ b), c @ e) of tiles in shared memory; the second product runs while `then` computes."""

    def run(first, second):
        plgpu.wgmma(first, a, b)
        plgpu.wgmma(second, c, e)
        # Products complete in order: when one is left, the first is there. Its registers are not those of the second.
        done = then(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return done, second[...]  # waits for all

    shape = a.shape[0], b.shape[1]
    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32), plgpu.ACC(shape, jnp.float32))


def _grad_q(q, k, v, do, lse, delta, *, mask, scale, device, blocks):
    b, _, h, d = q.shape
    rows, bk = work.ROWS, blocks.block_k
    schedule = work.schedule(mask.planned((rows, bk)), ragged=mask.shape[1] % bk > 0)
    (dq,) = work.launch(
        "attention_dq",
        lambda *refs: _q_block(*refs, mask=mask, scale=scale, blocks=blocks),
        device,
        arrays=(q, k, v, do, lse, delta, *work.metadata(mask, (work.WARPGROUPS * rows, bk)), jnp.asarray(schedule)),
        outputs=[(q.shape, q.dtype)],
        scratch={
            "q": work.tile(rows, d, q.dtype),
            "do": work.tile(rows, d, q.dtype),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=work.WARPGROUPS),
            **work.stage(bk, q.dtype, device),
        },
        grid={"b": b, "h": h, "i": len(schedule)},
    )
    return dq


def _q_block(q_g, k_g, v_g, do_g, lse_g, delta_g, q_meta_g, k_meta_g, schedule_g, dq_g, scratch, *, mask, scale, blocks):
    """One thread block: 64 queries for each of two warpgroups, over the tiles of keys and values that either needs."""
    b, h, i, wg = (lax.axis_index(name) for name in ("b", "h", "i", "wg"))
    rows, bk, d = work.ROWS, blocks.block_k, q_g.shape[-1]
    g = lax.div(h, jnp.int32(q_g.shape[2] // k_g.shape[2]))
    visits = work.Visits(schedule_g, i, wg)
    own = pl.ds(visits.start, rows)
    q_s, do_s, loaded = (scratch[name].at[wg] for name in ("q", "do", "loaded"))
    stage = scratch["stage"].at[wg] if "stage" in scratch else None

    def compute(loop):
        plgpu.copy_gmem_to_smem(q_g.at[b, own, h], q_s, loaded)
        plgpu.copy_gmem_to_smem(do_g.at[b, own, h], do_s, loaded)
        plgpu.barrier_wait(loaded)  # it counts both copies
        lse, delta = (mosaic_gpu.load(x.at[b, h, own]) for x in (lse_g, delta_g))
        dq, _, _ = loop((jnp.zeros((rows, d), jnp.float32), lse, delta))
        # All products of this warpgroup, the only reader of its queries, have been waited for: the output takes their place.
        q_s[...] = dq.astype(q_g.dtype)
        plgpu.commit_smem()  # makes all threads' writes visible to the copy engine
        plgpu.copy_smem_to_gmem(q_s, dq_g.at[b, own, h])
        plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copy

    def step(ids, v_s, k_s, v_done, k_done, carry):
        visit = visits[ids[0]]

        def attend(carry):
            dq, lse, delta = carry

            def ok():
                return work.allowed(mask, q_meta_g, k_meta_g, visits.start, visit.index * bk, (rows, bk))

            def softmax(s):
                s = work.masked(s, visit.kind, ok)
                return jnp.exp2(s * (scale * LOG2E) - lax.broadcast_in_dim(lse, s.shape, [0]))

            p, dp = _two_products(q_s, k_s.T, do_s, v_s.T, softmax)
            plgpu.barrier_arrive(v_done)
            ds = (p * (dp * scale - lax.broadcast_in_dim(delta, p.shape, [0]))).astype(q_g.dtype)
            (dq,) = tiles.accumulate((dq,), lambda add: add(0, ds, k_s), stage)
            plgpu.barrier_arrive(k_done)
            return dq, lse, delta

        def skip(carry):
            plgpu.barrier_arrive(v_done)
            plgpu.barrier_arrive(k_done)
            return carry

        return lax.cond(visit.kind == EMPTY, skip, attend, carry)

    # Values come first, since the copying warpgroup waits in this order, and they are done with first.
    spec = plgpu.BlockSpec((bk, d), lambda t: (visits[t].index, 0), transforms=tiles.transforms(d))
    work.stream(step, compute, (visits.count,), [spec, spec], blocks.stages_k)(v_g.at[b, :, g], k_g.at[b, :, g])


def _grad_kv(q, k, v, do, lse, delta, *, mask, scale, device, blocks):
    b, _, g, d = k.shape
    rows, bq = work.ROWS, blocks.block_q
    # Not ragged: gradients of keys past the last are dropped, and queries past the last have p = 0.
    schedule = work.schedule(mask.planned((bq, rows)).T)
    return work.launch(
        "attention_dkv",
        lambda *refs: _kv_block(*refs, mask=mask, scale=scale, blocks=blocks),
        device,
        arrays=(q, k, v, do, lse, delta, *work.metadata(mask, (bq, work.WARPGROUPS * rows)), jnp.asarray(schedule)),
        outputs=[(k.shape, k.dtype), (v.shape, v.dtype)],
        scratch={
            "k": work.tile(rows, d, k.dtype),
            "v": work.tile(rows, d, v.dtype),
            "loaded": plgpu.Barrier(num_arrivals=2, num_barriers=work.WARPGROUPS),
            **work.stage(bq, k.dtype, device),
        },
        grid={"b": b, "g": g, "i": len(schedule)},
    )


def _kv_block(q_g, k_g, v_g, do_g, lse_g, delta_g, q_meta_g, k_meta_g, schedule_g, dk_g, dv_g, scratch, *, mask, scale, blocks):
    """One thread block: 64 keys for each of two warpgroups, over the tiles of queries that either needs, of all heads of a group.

    Tiles are transposed, keys by queries, so that p and ds come out as the first operands of dv and dk.
    """
    b, g, i, wg = (lax.axis_index(name) for name in ("b", "g", "i", "wg"))
    rows, bq, d = work.ROWS, blocks.block_q, q_g.shape[-1]
    group = q_g.shape[2] // k_g.shape[2]
    visits = work.Visits(schedule_g, i, wg)
    own = pl.ds(visits.start, rows)
    k_s, v_s, loaded = (scratch[name].at[wg] for name in ("k", "v", "loaded"))
    stage = scratch["stage"].at[wg] if "stage" in scratch else None

    def compute(loop):
        plgpu.copy_gmem_to_smem(k_g.at[b, own, g], k_s, loaded)
        plgpu.copy_gmem_to_smem(v_g.at[b, own, g], v_s, loaded)
        plgpu.barrier_wait(loaded)  # it counts both copies
        zeros = jnp.zeros((rows, d), jnp.float32)
        dk, dv = loop((zeros, zeros))
        # All products of this warpgroup, the only reader of its keys and values, have been waited for: the outputs take
        # their places.
        k_s[...] = dk.astype(k_g.dtype)
        v_s[...] = dv.astype(v_g.dtype)
        plgpu.commit_smem()  # makes all threads' writes visible to the copy engine
        plgpu.copy_smem_to_gmem(k_s, dk_g.at[b, own, g])
        plgpu.copy_smem_to_gmem(v_s, dv_g.at[b, own, g])
        plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies

    def step(ids, q_s, do_s, lse_s, delta_s, *done_and_carry):
        *done, carry = done_and_carry
        visit = visits[ids[1]]

        def attend(carry):
            # The sixteen addresses that wgmma needs of k and v are not worth registers around the loop: d = 128 has none left.
            k_w, v_w = (scratch[name].at[wg + visit.zero] for name in ("k", "v"))

            def ok():
                q_start = visit.index * bq
                return work.allowed(mask, q_meta_g, k_meta_g, q_start, visits.start + visit.zero, (rows, bq), transposed=True)

            def softmax(s):
                s = work.masked(s, visit.kind, ok)
                # Read here: while a mask is computed there are no registers for it.
                return jnp.exp2(s * (scale * LOG2E) - lax.broadcast_in_dim(mosaic_gpu.load(lse_s), s.shape, [1]))

            p, dp = _two_products(k_w, q_s.T, v_w, do_s.T, softmax)

            def gradients(add):
                add(1, p.astype(v_g.dtype), do_s)  # runs while ds is computed
                delta = lax.broadcast_in_dim(mosaic_gpu.load(delta_s), p.shape, [1])
                add(0, (p * (dp * scale - delta)).astype(k_g.dtype), q_s)

            return tiles.accumulate(carry, gradients, stage)

        carry = lax.cond(visit.kind == EMPTY, lambda carry: carry, attend, carry)
        for barrier in done:
            plgpu.barrier_arrive(barrier)
        return carry

    def where(j, t):
        return visits[t].index, g * group + j

    wide = plgpu.BlockSpec((bq, None, d), lambda j, t: (*where(j, t), 0), transforms=tiles.transforms(d))
    thin = plgpu.BlockSpec((None, bq), lambda j, t: where(j, t)[::-1])
    loop = work.stream(step, compute, (group, visits.count), [wide, wide, thin, thin], blocks.stages_q)
    loop(q_g.at[b], do_g.at[b], lse_g.at[b], delta_g.at[b])
