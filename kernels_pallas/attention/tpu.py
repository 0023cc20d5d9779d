"""Block-sparse attention as a TPU kernel: a worklist of live blocks, softmax in one pass (Dao et al., 2022, algorithm 1)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import Problem
from kernels_pallas.attention.tpu_backward import backward
from kernels_pallas.attention.tpu_blocks import (
    LANES,
    Blocks,
    allowed,
    by_head,
    metadata,
    padded,
    precision,
    spread,
    static_choice,
    unpack,
    worklist,
)
from kernels_pallas.base2 import LOG2E
from kernels_pallas.block_mask import EMPTY, PARTIAL, BlockMask
from kernels_pallas.device import Device

__all__ = ["backward", "forward", "refuses"]

# Where the running maximum starts: finite, so that a masked score of -inf has weight 2^(-inf - m) = 0 and never NaN.
_LOWEST = -1e30
_MAX_HEAD_SIZE = 512
# Entries of a worklist: half of the 1 MiB of scalar memory.
_MAX_ITEMS = 1 << 17


def refuses(problem: Problem, device: Device) -> str | None:
    """Why this kernel cannot compute `problem` on `device`, or None."""
    if device.platform != "tpu":
        return "a kernel for TPUs"
    if problem.head_size > _MAX_HEAD_SIZE:
        return f"head size {problem.head_size} is more than {_MAX_HEAD_SIZE}"
    try:
        blocks = static_choice(problem, device)
        by_rows, by_columns = (worklist(problem.mask, block).size for block in (blocks.forward, blocks.columns))
    except ValueError as error:
        return str(error)
    if max(by_rows, by_columns) > _MAX_ITEMS:
        return f"{max(by_rows, by_columns)} live blocks are more than the {_MAX_ITEMS} that scalar memory holds"
    return None


def forward(q, k, v, *, mask: BlockMask, scale: float, device: Device, blocks: Blocks | None = None):
    """softmax(scale q k^T) v where `mask` allows, and the log-sum-exp.

    The grid is (b, h, live blocks); the worklist in scalar memory says which blocks of q and k a step has. In full blocks the
    predicate is not evaluated. float16 is computed as float32.

    Args:
      q: [b, sq, h, d].
      k: [b, sk, g, d].
      v: [b, sk, g, d].
      mask: (sq, sk).
      scale: of the products.
      device: that the kernel is built for.
      blocks: instead of the static choice.

    Returns:
      o [b, sq, h, d] in the dtype of q, and lse float32 [b, sq, h]; 0 and -inf for queries that see no key.
    """
    (b, sq, h, d), g = q.shape, k.shape[2]
    block_q, block_k = block = (blocks or static_choice(Problem.of(q, k, mask, scale), device)).forward
    items = worklist(mask, block)
    q_meta, k_meta = metadata(mask, block)
    qs, ks, vs = (padded(by_head(x), size) for x, size in ((q, block_q), (k, block_k), (v, block_k)))

    def row(i, j, n, items):
        return i, j, unpack(items[n])[0], 0

    def column(i, j, n, items):
        return i, lax.div(j, jnp.int32(h // g)), unpack(items[n])[1], 0

    o, lse = pl.pallas_call(
        functools.partial(_kernel, kinds=frozenset((items & 3).tolist()), pred=mask.pred, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, h, items.size),
            in_specs=[
                pl.BlockSpec((None, None, block_q, d), row),
                pl.BlockSpec((None, None, block_k, d), column),
                pl.BlockSpec((None, None, block_k, d), column),
                pl.BlockSpec((block_q, len(q_meta)), lambda i, j, n, items: (unpack(items[n])[0], 0)),
                pl.BlockSpec((len(k_meta), block_k), lambda i, j, n, items: (0, unpack(items[n])[1])),
            ],
            out_specs=[
                pl.BlockSpec((None, None, block_q, d), row),
                pl.BlockSpec((None, None, 1, block_q), lambda i, j, n, items: (i, j, 0, unpack(items[n])[0])),
            ],
            scratch_shapes=[
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, d), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(qs.shape, qs.dtype),
            jax.ShapeDtypeStruct((b, h, 1, qs.shape[2]), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="block_sparse_attention_forward",
        interpret=device.interpret,
    )(jnp.asarray(items), qs, ks, vs, jnp.asarray(q_meta.T), jnp.asarray(k_meta))
    return by_head(o[:, :, :sq]).astype(q.dtype), jnp.swapaxes(lse[:, :, 0, :sq], 1, 2)


def _kernel(items, q_ref, k_ref, v_ref, q_meta, k_meta, o_ref, lse_ref, m_ref, l_ref, acc_ref, *, kinds, pred, scale):
    """One block of one head. Scores are [queries, keys]; the maximum m and the sum l are equal along the lanes of a row."""
    _, _, first, last, kind = unpack(items[pl.program_id(2)])
    dot = functools.partial(lax.dot_general, precision=precision(q_ref.dtype), preferred_element_type=jnp.float32)

    @pl.when(first == 1)
    def _():
        m_ref[...] = jnp.full_like(m_ref, _LOWEST)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(partial):
        v = v_ref[...]
        s = dot(q_ref[...], k_ref[...], (((1,), (1,)), ((), ()))) * (scale * LOG2E)
        if partial:
            of_q = [q_meta[:, i : i + 1] for i in range(q_meta.shape[1])]
            of_k = [k_meta[i : i + 1, :] for i in range(k_meta.shape[0])]
            s = jnp.where(allowed(pred, of_q, of_k, s.shape), s, -jnp.inf)
        m_old = m_ref[...]
        m = jnp.maximum(m_old, s.max(axis=1)[:, None])
        p = jnp.exp2(s - spread(m, s.shape[1]))
        alpha = jnp.exp2(m_old - m)
        m_ref[...] = m
        l_ref[...] = alpha * l_ref[...] + p.sum(axis=1)[:, None]
        acc_ref[...] = spread(alpha, v.shape[1]) * acc_ref[...] + dot(p.astype(v.dtype), v, (((1,), (0,)), ((), ())))

    # What no block of this mask needs is not compiled.
    for present in sorted(kinds - {EMPTY}):
        pl.when(kind == present)(functools.partial(step, present == PARTIAL))

    @pl.when(last == 1)
    def _():
        dead = l_ref[...] == 0
        l = jnp.where(dead, 1.0, l_ref[...])
        o_ref[...] = (acc_ref[...] * spread(jnp.where(dead, 0.0, 1 / l), acc_ref.shape[1])).astype(o_ref.dtype)
        lse_ref[...] = jnp.where(dead, -jnp.inf, (m_ref[...] + jnp.log2(l)) / LOG2E).T[:1]
