"""Block-sparse attention on Hopper (sm_90a): a Mosaic GPU kernel that visits live tiles only."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.attention import hopper_backward
from kernels_pallas.attention import hopper_work as work
from kernels_pallas.attention.hopper_backward import backward
from kernels_pallas.attention.problem import Problem
from kernels_pallas.base2 import LOG2E
from kernels_pallas.block_mask import EMPTY, BlockMask
from kernels_pallas.device import Device
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "backward", "forward", "refuses", "shared_memory", "static_choice"]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the forward kernel.

    Attributes:
      block_k: keys of a tile, a multiple of 64.
      stages: tiles of keys, and of values, in shared memory at a time.
      take_turns: the two warpgroups alternate between the tensor cores and the softmax, instead of running as they happen to.
    """

    block_k: int
    stages: int
    take_turns: bool = True


def static_choice(problem: Problem, device: Device) -> Blocks:
    """What was measured, or else the widest tile that the registers hold, and stages for a copy or two ahead."""
    return tuned(Blocks(block_k=128, stages=2 if problem.head_size > 64 else 3), "attention", device, **problem.bucket)


def shared_memory(problem: Problem, blocks: Blocks) -> int:
    """Bytes of shared memory that the forward kernel's tiles take."""
    rows = work.WARPGROUPS * work.ROWS
    return 2 * problem.head_size * (rows + 2 * blocks.stages * blocks.block_k) + 4 * rows


def refuses(problem: Problem, device: Device) -> str | None:
    """Why these kernels cannot compute `problem` on `device`, or None."""
    if (reason := mosaic_gpu.refuses(device)) is not None:
        return reason
    if problem.dtype not in ("bfloat16", "float16"):
        return f"q, k and v must be bfloat16 or float16, which its tensor cores multiply, not {problem.dtype}"
    if problem.head_size not in (32, 64, 96, 128):
        return f"the head size must be 32, 64, 96 or 128, not {problem.head_size}"
    if problem.scale <= 0:
        return f"scale must be positive, since it is applied after the maximum, not {problem.scale}"
    if max(problem.batch, problem.heads) > 65535:
        return f"the grid holds a batch and heads of at most 65535, not {problem.batch} and {problem.heads}"
    for choice, total in ((static_choice, shared_memory), (hopper_backward.static_choice, hopper_backward.shared_memory)):
        blocks = choice(problem, device)
        size = total(problem, blocks)
        if size > work.SHARED_MEMORY:
            return f"{blocks} take {size} bytes of shared memory, of which there are {work.SHARED_MEMORY}"
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: BlockMask, scale: float, device: Device
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v over allowed keys, by online softmax (FlashAttention-2, arXiv:2307.08691, algorithm 1).

    Args:
      q: [b, sq, h, d].
      k: [b, sk, g, d], g divides h.
      v: [b, sk, g, d].
      mask: who may attend to whom, of shape (sq, sk).
      scale: of the products, positive.
      device: that the kernel is built for.

    Returns:
      o [b, sq, h, d] in q's dtype, and lse float32 [b, sq, h], the natural logarithm of the sum of exponentials; 0 and -inf
      for queries that may attend to nothing.
    """
    b, sq, h, d = q.shape
    blocks = static_choice(Problem.of(q, k, mask, scale), device)
    rows, bk = work.ROWS, blocks.block_k
    schedule = work.schedule(mask.planned((rows, bk)), ragged=mask.shape[1] % bk > 0)
    q_meta, k_meta = work.metadata(mask, (work.WARPGROUPS * rows, bk))
    q, k, v = tiles.pad_length(q, k, v)

    def block(*refs):
        _block(*refs, mask=mask, bits=scale * LOG2E, blocks=blocks)

    o, lse = work.launch(
        "attention_forward",
        block,
        device,
        arrays=(q, k, v, q_meta, k_meta, jnp.asarray(schedule)),
        outputs=[(q.shape, q.dtype), ((b, h, q_meta.shape[1]), jnp.float32)],
        scratch={
            "q": work.tile(rows, d, q.dtype),
            "lse": plgpu.SMEM((work.WARPGROUPS, rows), jnp.float32),
            "loaded": plgpu.Barrier(num_barriers=work.WARPGROUPS),
            "turn": plgpu.Barrier(num_arrivals=work.WARPGROUPS, num_barriers=1),
            **work.stage(bk, v.dtype, device),
        },
        # The tiles of one head run side by side and share its keys and values in the L2 cache, as do the heads of a group.
        grid={"b": b, "h": h, "i": len(schedule)},
    )
    return o[:, :sq], jnp.swapaxes(lse[:, :, :sq], 1, 2)


def _block(q_g, k_g, v_g, q_meta_g, k_meta_g, schedule_g, o_g, lse_g, scratch, *, mask, bits, blocks):
    """One thread block: 64 queries for each of two warpgroups, over the tiles of keys and values that either needs."""
    b, h, i, wg = (lax.axis_index(name) for name in ("b", "h", "i", "wg"))
    rows, bk, d = work.ROWS, blocks.block_k, q_g.shape[-1]
    g = lax.div(h, jnp.int32(q_g.shape[2] // k_g.shape[2]))
    visits = work.Visits(schedule_g, i, wg)
    own = pl.ds(visits.start, rows)
    q_s, lse_s, loaded = (scratch[name].at[wg] for name in ("q", "lse", "loaded"))
    stage = scratch["stage"].at[wg] if "stage" in scratch else None

    def turn():
        # Waits for the other warpgroup to come here too. Both do so twice a visit, on every path, and once around the loop,
        # and both have the same visits: neither waits for ever.
        if blocks.take_turns:
            plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["turn"])

    def compute(loop):
        plgpu.copy_gmem_to_smem(q_g.at[b, own, h], q_s, loaded)
        plgpu.barrier_wait(loaded)
        pl.when(wg == 1)(turn)  # the second warpgroup stays half a visit behind
        top = jnp.full((rows,), -jnp.inf, jnp.float32)
        acc, top, total = loop((jnp.zeros((rows, d), jnp.float32), top, jnp.zeros((rows,), jnp.float32)))
        pl.when(wg == 0)(turn)
        dead = total == 0.0
        total = jnp.where(dead, 1.0, total)
        # All products of this warpgroup, the only reader of its queries, have been waited for: the output takes their place.
        q_s[...] = (acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])).astype(q_g.dtype)
        lse_s[...] = jnp.where(dead, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
        plgpu.commit_smem()  # makes all threads' writes visible to the copy engine
        plgpu.copy_smem_to_gmem(q_s, o_g.at[b, own, h])
        plgpu.copy_smem_to_gmem(lse_s, lse_g.at[b, h, own])
        plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies

    def step(ids, k_s, v_s, k_done, v_done, carry):
        visit = visits[ids[0]]

        def attend(carry):
            acc, top, total = carry
            # While these products run, the other warpgroup may queue its own.
            s = tiles.product(q_s, k_s.T, issued=turn)
            plgpu.barrier_arrive(k_done)

            def ok():
                return work.allowed(mask, q_meta_g, k_meta_g, visits.start, visit.index * bk, (rows, bk))

            s = work.masked(s, visit.kind, ok)
            # `top` is in bits, like the exponents, so that scaling s and subtracting it is one instruction.
            new_top = jnp.maximum(top, s.max(axis=1) * bits)
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # nothing allowed so far: exp2(-inf - 0) = 0, not nan
            shrink = jnp.exp2(top - base)
            p = jnp.exp2(s * bits - lax.broadcast_in_dim(base, s.shape, [0]))
            acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
            weights = p.astype(v_g.dtype)
            turn()  # this softmax is done: the tensor cores are free when the other warpgroup's scores are
            total = total * shrink + p.sum(axis=1)
            (acc,) = tiles.accumulate((acc,), lambda add: add(0, weights, v_s), stage)
            plgpu.barrier_arrive(v_done)
            return acc, new_top, total

        def skip(carry):
            turn()
            plgpu.barrier_arrive(k_done)
            turn()
            plgpu.barrier_arrive(v_done)
            return carry

        return lax.cond(visit.kind == EMPTY, skip, attend, carry)

    spec = plgpu.BlockSpec((bk, d), lambda t: (visits[t].index, 0), transforms=tiles.transforms(d))
    work.stream(step, compute, (visits.count,), [spec, spec], blocks.stages)(k_g.at[b, :, g], v_g.at[b, :, g])
