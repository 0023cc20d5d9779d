"""Causal linear attention on Hopper (sm_90a): a thread block keeps 64 columns of one head's state in registers.

Columns of the state go with columns of the values and know nothing of each other, so a head is spread over dv / 64 blocks,
which read its queries and keys through the L2 cache. Sums are float32 and so is the state; operands of products are bfloat16, as
the tensor cores take them. A query reads a copy of the state rounded to bfloat16 (2^-9 of an entry); the state is never rounded.

A decay a channel is `hopper_channel`'s, which leaves what is parallel over chunks to XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.device import Device
from kernels_pallas.linear import hopper_backward, hopper_channel
from kernels_pallas.linear import hopper_chunks as chunks
from kernels_pallas.linear.hopper_chunks import CHUNK, Blocks, static_choice
from kernels_pallas.linear.problem import Problem

__all__ = ["Blocks", "backward", "forward", "refuses", "static_choice"]

Array = jax.Array


def refuses(problem: Problem, device: Device) -> str | None:
    """Why these kernels cannot compute `problem` on `device`, or None."""
    if (reason := mosaic_gpu.refuses(device)) is not None:
        return reason
    if not problem.causal:
        return f"block_size={problem.block_size}: blocks that see themselves are bound by bytes, and XLA does them in one pass"
    if problem.dtype != "bfloat16":
        return f"dtype {problem.dtype} is not bfloat16, whose products are fast and whose range is the state's"
    for name, size, sizes in (("dk", problem.key_size, (64, 128)), ("dv", problem.value_size, (64, 128, 192, 256))):
        if size not in sizes:
            return f"{name}={size} is not {', '.join(map(str, sizes[:-1]))} or {sizes[-1]}"
    if max(problem.batch, problem.heads) > 65535:
        return f"the grid holds a batch and heads of at most 65535, not {problem.batch} and {problem.heads}"
    return None


def forward(
    q: Array, k: Array, v: Array, log_decay: Array | None, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv]; arguments as in `xla.forward`."""
    if problem.decay == "channel":
        return hopper_channel.forward(q, k, v, log_decay, state, problem=problem, device=device)
    b, t, h, dk = q.shape
    blocks = static_choice(problem, device)
    q, k, v = tiles.pad_length(q, k, v)
    square = chunks.tile(CHUNK, CHUNK, q.dtype)
    out = chunks.launch(
        "linear_forward",
        lambda refs: _block(refs, blocks),
        device,
        inputs={"q": q, "k": k, "v": v, "decay": None if log_decay is None else chunks.decay_rows(log_decay), "state": state},
        outputs={"o": (v.shape, v.dtype), "last": (state.shape, jnp.float32)},
        scratch={"rounded": chunks.tile(dk, CHUNK, q.dtype), "decayed": square, "out": square} | chunks.stage(q.dtype, device),
        grid={"b": b, "h": h, "j": v.shape[3] // CHUNK},
    )
    return out["o"][:, :t], out["last"]


def backward(*arrays: Array, problem: Problem, device: Device) -> tuple[Array, Array, Array, Array | None, Array]:
    """Cotangents of q, k, v, log_decay and state; arguments as in `xla.backward`."""
    module = hopper_channel if problem.decay == "channel" else hopper_backward
    return module.backward(*arrays, problem=problem, device=device)


def _block(refs: dict, blocks: Blocks):
    """One thread block: all chunks of one head, for 64 columns of its values and its state."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    columns, dk = pl.ds(j * CHUNK, CHUNK), refs["q"].shape[3]
    decay = [] if refs["decay"] is None else [refs["decay"].at[b, h]]
    rounded_s, stage = refs["rounded"], refs.get("stage")

    def step(ids, q_s, k_s, v_s, *rest):
        *decay_s, state = rest
        decay_s = decay_s[0] if decay_s else None
        rounded_s[...] = state.astype(rounded_s.dtype)
        plgpu.commit_smem()

        def weighted(products):
            return (products * chunks.weights(decay_s)).astype(v_s.dtype)

        scores, o = chunks.two_products(q_s, k_s.T, q_s, rounded_s, weighted)
        if decay_s is not None:
            o = o * chunks.along(decay_s, chunks.START, 0)
        (o,) = tiles.accumulate((o,), lambda add: add(0, scores, v_s), stage)
        chunks.store(o, refs["out"], refs["o"].at[b, pl.ds(ids[0] * CHUNK, CHUNK), h, columns])
        return chunks.advance(state, k_s, v_s, decay_s, chunks.END, refs["decayed"], stage)

    last = plgpu.emit_pipeline(
        step,
        grid=(pl.cdiv(refs["q"].shape[1], CHUNK),),
        in_specs=[chunks.spec(dk, lambda i: (i, 0)), chunks.spec(dk, lambda i: (i, 0)), chunks.spec(CHUNK, lambda i: (i, j))]
        + chunks.decay_specs(refs["decay"], lambda i: i),
        max_concurrent_steps=blocks.stages,
        init_carry=mosaic_gpu.load(refs["state"].at[b, h, :, columns]),
    )(*(refs[name].at[b, :, h] for name in "qkv"), *decay)
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies
    refs["last"][b, h, :, columns] = last
