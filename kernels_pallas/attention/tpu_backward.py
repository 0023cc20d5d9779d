"""Gradients of block-sparse attention on a TPU: one pass over columns of blocks, and one over rows where dq does not fit.

With p = exp(scale q k^T - lse): dv = p^T do, ds = p (do v^T - delta), dk = scale ds^T q, dq = scale ds k
(Dao et al., 2022, appendix B.2), where delta comes in with the gradient of the log-sum-exp taken off.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import Problem
from kernels_pallas.attention.tpu_blocks import (
    LANES,
    STEP_BYTES,
    Blocks,
    allowed,
    by_head,
    dq_bytes,
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

__all__ = ["backward"]

# Axes that a product sums over: a b, a b^T, a^T b.
_NN, _NT, _TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def backward(q, k, v, lse, do, delta, *, mask: BlockMask, scale: float, device: Device, blocks: Blocks | None = None):
    """Gradients of q, k and v.

    Args:
      q: [b, sq, h, d].
      k: [b, sk, g, d].
      v: [b, sk, g, d].
      lse: float32 [b, sq, h], of the forward pass.
      do: [b, sq, h, d].
      delta: float32 [b, sq, h], sum(do o) - dlse.
      mask: (sq, sk).
      scale: of the products.
      device: that the kernels are built for.
      blocks: instead of the static choice.

    Returns:
      dq, dk and dv, of the shapes and dtypes of q, k and v. dk and dv are sums over the heads of a group.
    """
    blocks = blocks or static_choice(Problem.of(q, k, mask, scale), device)
    # A query that sees no key has only masked scores, so that any finite number will do; in base 2, see the kernels.
    lse = jnp.where(lse == -jnp.inf, 0.0, lse * LOG2E)
    arrays = [by_head(x) for x in (q, k, v, do.astype(q.dtype))] + [by_head(x)[:, :, None] for x in (lse, delta)]
    how = dict(mask=mask, scale=scale, device=device)
    dq, dk, dv = _over_columns(*arrays, **how, block=blocks.columns, with_dq=blocks.rows is None)
    if dq is None:
        dq = _over_rows(*arrays, **how, block=blocks.rows)
    return tuple(by_head(dx[:, :, : x.shape[1]]).astype(x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))


def _padded(arrays, block):
    q, k, v, do, lse, delta = arrays
    return [padded(x, size) for x, size in ((q, block[0]), (k, block[1]), (v, block[1]), (do, block[0]))] + [
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % block[0]))) for x in (lse, delta)
    ]


def _over_rows(*arrays, mask, scale, device, block):
    """dq [b, h, sq', d]; the grid is that of the forward pass."""
    q, k, v, do, lse, delta = _padded(arrays, block)
    (b, h, _, d), g, (block_q, block_k) = q.shape, k.shape[1], block
    items = worklist(mask, block)
    q_meta, k_meta = metadata(mask, block)

    def row(i, j, n, items):
        return i, j, unpack(items[n])[0], 0

    def row_vector(i, j, n, items):
        return i, j, 0, unpack(items[n])[0]

    def column(i, j, n, items):
        return i, lax.div(j, jnp.int32(h // g)), unpack(items[n])[1], 0

    return pl.pallas_call(
        functools.partial(_row_kernel, kinds=frozenset((items & 3).tolist()), pred=mask.pred, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, h, items.size),
            in_specs=[
                pl.BlockSpec((None, None, block_q, d), row),
                pl.BlockSpec((None, None, block_k, d), column),
                pl.BlockSpec((None, None, block_k, d), column),
                pl.BlockSpec((None, None, block_q, d), row),
                pl.BlockSpec((None, None, 1, block_q), row_vector),
                pl.BlockSpec((None, None, 1, block_q), row_vector),
                pl.BlockSpec((block_q, len(q_meta)), lambda i, j, n, items: (unpack(items[n])[0], 0)),
                pl.BlockSpec((len(k_meta), block_k), lambda i, j, n, items: (0, unpack(items[n])[1])),
            ],
            out_specs=pl.BlockSpec((None, None, block_q, d), row),
            scratch_shapes=[
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, LANES), jnp.float32),
                pltpu.VMEM((block_q, d), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="block_sparse_attention_dq",
        interpret=device.interpret,
    )(jnp.asarray(items), q, k, v, do, lse, delta, jnp.asarray(q_meta.T), jnp.asarray(k_meta))


def _row_kernel(
    items, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, q_meta, k_meta, dq_ref, lse_s, delta_s, acc_ref, *, kinds, pred, scale
):
    """One block of one head; scores are [queries, keys], and lse and delta are turned to columns once a row of blocks."""
    _, _, first, last, kind = unpack(items[pl.program_id(2)])
    dot = functools.partial(lax.dot_general, precision=precision(q_ref.dtype), preferred_element_type=jnp.float32)

    @pl.when(first == 1)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for column, row in ((lse_s, lse_ref), (delta_s, delta_ref)):
            column[...] = jnp.broadcast_to(row[...], (LANES, row.shape[1])).T

    def step(partial):
        k = k_ref[...]
        s = dot(q_ref[...], k, _NT) * (scale * LOG2E)
        if partial:
            of_q = [q_meta[:, i : i + 1] for i in range(q_meta.shape[1])]
            of_k = [k_meta[i : i + 1, :] for i in range(k_meta.shape[0])]
            s = jnp.where(allowed(pred, of_q, of_k, s.shape), s, -jnp.inf)
        p = jnp.exp2(s - spread(lse_s[...], s.shape[1]))
        ds = p * (dot(do_ref[...], v_ref[...], _NT) - spread(delta_s[...], s.shape[1]))
        acc_ref[...] += dot(ds.astype(k.dtype), k, _NN)

    for present in sorted(kinds - {EMPTY}):
        pl.when(kind == present)(functools.partial(step, present == PARTIAL))

    @pl.when(last == 1)
    def _():
        dq_ref[...] = (acc_ref[...] * scale).astype(dq_ref.dtype)


def _over_columns(*arrays, mask, scale, device, block, with_dq):
    """dq [b, h, sq', d] or None, dk and dv [b, g, sk', d].

    The grid is (b, g, live blocks, heads of a group), so that a block of dk and dv is summed over its group before it is
    written. dq is summed over columns, which are far apart: all of it, for one group, stays in fast memory.
    """
    q, k, v, do, lse, delta = _padded(arrays, block)
    (b, h, sq, d), g, (block_q, block_k) = q.shape, k.shape[1], block
    group = h // g
    items = worklist(mask, block, columns=True)
    q_meta, k_meta = metadata(mask, block)

    def row(i, j, n, r, items):
        return i, j * group + r, unpack(items[n])[1], 0

    def row_vector(i, j, n, r, items):
        return i, j * group + r, 0, unpack(items[n])[1]

    def column(i, j, n, r, items):
        return i, j, unpack(items[n])[0], 0

    out_specs = [pl.BlockSpec((None, None, block_k, d), column)] * 2
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    scratch = [pltpu.VMEM((block_k, d), jnp.float32)] * 2
    limit = None
    if with_dq:
        out_specs.append(pl.BlockSpec((None, group, sq, d), lambda i, j, n, r, items: (i, j, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct(q.shape, q.dtype))
        scratch.append(pltpu.VMEM((group, sq, d), jnp.float32))
        limit = dq_bytes(group, sq, d, q.dtype.name) + STEP_BYTES
    static = dict(kinds=frozenset((items & 3).tolist()), pred=mask.pred, scale=scale, with_dq=with_dq)
    dk, dv, *dq = pl.pallas_call(
        functools.partial(_column_kernel, **static, steps=items.size, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, g, items.size, group),
            in_specs=[
                pl.BlockSpec((None, None, block_q, d), row),
                pl.BlockSpec((None, None, block_k, d), column),
                pl.BlockSpec((None, None, block_k, d), column),
                pl.BlockSpec((None, None, block_q, d), row),
                pl.BlockSpec((None, None, 1, block_q), row_vector),
                pl.BlockSpec((None, None, 1, block_q), row_vector),
                pl.BlockSpec((len(q_meta), block_q), lambda i, j, n, r, items: (0, unpack(items[n])[1])),
                pl.BlockSpec((block_k, len(k_meta)), lambda i, j, n, r, items: (unpack(items[n])[0], 0)),
            ],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=limit
        ),
        name="block_sparse_attention_dq_dk_dv" if with_dq else "block_sparse_attention_dk_dv",
        interpret=device.interpret,
    )(jnp.asarray(items), q, k, v, do, lse, delta, jnp.asarray(q_meta), jnp.asarray(k_meta.T))
    return dq[0] if with_dq else None, dk, dv


def _column_kernel(
    items,
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    q_meta,
    k_meta,
    dk_ref,
    dv_ref,
    *refs,
    kinds,
    pred,
    scale,
    with_dq,
    steps,
    group,
):
    """One block of one head; scores are [keys, queries], so that no product needs them turned except that of dq.

    The grid's sizes, `steps` and `group`, are given: jax 0.11.2 keeps the trace of a kernel for other grids with the same blocks,
    with what `pl.num_programs` was.
    """
    dq_ref, dk_s, dv_s, dq_s = refs if with_dq else (None, *refs, None)
    n, r = pl.program_id(2), pl.program_id(3)
    _, minor, first, last, kind = unpack(items[n])
    last_of_group = r == group - 1
    dot = functools.partial(lax.dot_general, precision=precision(q_ref.dtype), preferred_element_type=jnp.float32)
    block_q = q_ref.shape[0]

    def rows(i):
        return pl.ds(pl.multiple_of(i * block_q, block_q), block_q)

    def over_dq(visit):
        """`visit(head, rows)` for all of dq, in a loop: unrolled it would be most of the kernel's code."""

        def body(i, _):
            for head in range(dq_s.shape[0]):
                visit(head, rows(i))

        lax.fori_loop(0, dq_s.shape[1] // block_q, body, None)

    if with_dq:

        def clear(head, at):
            dq_s[head, at, :] = jnp.zeros((block_q, dq_s.shape[2]), jnp.float32)

        pl.when((n == 0) & (r == 0))(lambda: over_dq(clear))

    @pl.when((first == 1) & (r == 0))
    def _():
        dk_s[...] = jnp.zeros_like(dk_s)
        dv_s[...] = jnp.zeros_like(dv_s)

    def step(partial):
        q, k, do = q_ref[...], k_ref[...], do_ref[...]
        s = dot(k, q, _NT) * (scale * LOG2E)
        if partial:
            of_q = [q_meta[i : i + 1, :] for i in range(q_meta.shape[0])]
            of_k = [k_meta[:, i : i + 1] for i in range(k_meta.shape[1])]
            s = jnp.where(allowed(pred, of_q, of_k, s.shape), s, -jnp.inf)
        p = jnp.exp2(s - lse_ref[...])
        dv_s[...] += dot(p.astype(do.dtype), do, _NN)
        ds = (p * (dot(v_ref[...], do, _NT) - delta_ref[...])).astype(q.dtype)
        dk_s[...] += dot(ds, q, _NN)
        if with_dq:
            dq_s[r, rows(minor), :] += dot(ds, k, _TN)

    for present in sorted(kinds - {EMPTY}):
        pl.when(kind == present)(functools.partial(step, present == PARTIAL))

    @pl.when((last == 1) & last_of_group)
    def _():
        dk_ref[...] = (dk_s[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_s[...].astype(dv_ref.dtype)

    if with_dq:

        def write(head, at):
            dq_ref[head, at, :] = (dq_s[head, at, :] * scale).astype(dq_ref.dtype)

        pl.when((n == steps - 1) & last_of_group)(lambda: over_dq(write))
