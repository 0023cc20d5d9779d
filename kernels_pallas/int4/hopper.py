"""Products with 4-bit weights for Hopper (after MARLIN, Frantar et al. 2024, arXiv 2408.11743): y^T = w^T x^T.

The weights are the left operand of `wgmma`, which takes it from registers: a tile of words is loaded in the layout of that
operand, and every nibble of it, a shift, a mask and a subtraction later, *is* such an operand, with no exchange between
threads. Scales multiply the sums of a group instead of weights. x is the right operand, so few rows waste nothing. Where
columns alone do not fill the device, blocks share k and their sums are added afterwards.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.device import Device
from kernels_pallas.int4.pack import ROW_MULTIPLE
from kernels_pallas.int4.pieces import pieces
from kernels_pallas.int4.problem import Problem, power
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "forward", "refuses", "static_choice"]

_WG = ROW_MULTIPLE  # columns of w that a warpgroup multiplies: the rows of a wgmma
_MULTIPROCESSORS = 132
_PIPELINE = 200 << 10  # bytes of shared memory for steps in flight, out of 227 KiB
_TWO_23 = 0x4B000000  # the bits of 2^23, whose mantissa counts ones


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a block.

    Attributes:
      m: rows of x (float32 has three rows of bfloat16 pieces for one).
      k: rows of w in a step, at most.
      warpgroups: that multiply, each its own 64 columns of w.
      stages: steps in flight.
      blocks: that the split of k aims at.
    """

    m: int
    k: int
    warpgroups: int
    stages: int
    blocks: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """A block a multiprocessor, with as many bytes in flight as its shared memory holds."""
    rows = problem.m * (3 if problem.dtype == "float32" else 1)
    m = min(128, max(8, power(rows)))
    k, warpgroups = 512 if m <= 32 else 256, 2
    stage = 2 * m * k + warpgroups * _WG * k // 2  # bytes of x and of words
    blocks = Blocks(m=m, k=k, warpgroups=warpgroups, stages=_PIPELINE // stage, blocks=_MULTIPROCESSORS)
    return tuned(blocks, "int4", device, **problem.bucket)


def refuses(problem: Problem, device: Device) -> str | None:
    """Why this kernel cannot compute `problem` on `device`."""
    if (reason := mosaic_gpu.refuses(device)) is not None:
        return reason
    if problem.layout != "nk":
        return f"words have layout {problem.layout!r}; relayout(packed, 'nk')"
    if problem.tile < 32:
        return f"tile={problem.tile} for k={problem.k}, group={problem.group} is below the 32 rows of two products"
    if _step(problem, device) is None:
        return f"k={problem.k} has no step in whole groups of {problem.group} and whole blocks of {problem.block}"
    return None


def _step(problem: Problem, device: Device) -> int | None:
    return problem.step(static_choice(problem, device).k, 64)


def forward(x, words, scales, *, problem: Problem, device: Device):
    """y [m, n'] of x [m, k], words [n', k / 8] and scales [k / group, n']."""
    blocks, bk = static_choice(problem, device), _step(problem, device)
    columns, extra = words.shape[0], -words.shape[0] % _WG
    if extra:  # a shard whose columns are no whole warpgroups
        words, scales = jnp.pad(words, ((0, extra), (0, 0))), jnp.pad(scales, ((0, 0), (0, extra)))
    (m, k), n, tile = x.shape, words.shape[0], problem.tile
    parts = pieces(x) if x.dtype == jnp.float32 else x[None]
    rows = parts.reshape(-1, k)
    bm = min(blocks.m, max(8, power(len(rows))))
    rows = jnp.pad(rows, ((0, -len(rows) % bm), (0, 0)))
    # The halves of a word are even and odd rows of w: x's columns follow, even ones first in every tile.
    rows = jnp.swapaxes(rows.reshape(len(rows), -1, tile // 2, 2), 2, 3).reshape(rows.shape)
    warpgroups = blocks.warpgroups if n % (blocks.warpgroups * _WG) == 0 else 1
    tiles = n // (warpgroups * _WG) * (len(rows) // bm)
    steps = k // bk
    splits = next(s for s in range(min(steps, max(1, blocks.blocks // tiles)), 0, -1) if steps % s == 0)
    sums = _call(problem, device, blocks, rows, words, scales, bm, bk, warpgroups, splits)
    y = sums.sum(0)[:, : len(parts) * m].reshape(n, len(parts), m).sum(1)
    return y[:columns].T.astype(x.dtype)


def _call(problem, device, blocks, rows, words, scales, bm, bk, warpgroups, splits):
    """float32 [splits, n', rows]: w^T x^T over each split of k."""
    n, (m, k), dtype = words.shape[0], rows.shape, rows.dtype
    bn, steps = warpgroups * _WG, k // bk // splits
    per_step = max(1, bk // problem.group)
    half, width = problem.tile // 2, min(bm, 64)

    def body(x_g, words_g, scales_g, y_g, y_s, w_s=None):
        column, split, row = lax.axis_index("n"), lax.axis_index("s"), lax.axis_index("m")
        wg = lax.axis_index("wg")
        mine = pl.ds(wg * _WG, _WG)

        def compute(pipeline):
            total = pipeline(jnp.zeros((_WG, bm), jnp.float32))
            for start in range(0, bm, width):
                y_s[wg] = lax.slice(total, (0, start), (_WG, start + width))
                plgpu.commit_smem()
                here = y_g.at[split, pl.ds(column * bn + wg * _WG, _WG), pl.ds(row * bm + start, width)]
                plgpu.copy_smem_to_gmem(y_s.at[wg], here)
                plgpu.wait_smem_to_gmem(0)

        def step(_, x_s, words_s, scales_s, total):
            tile_words = words_s[mine]
            for start in range(0, bk, problem.span):
                shares = pl.run_scoped(functools.partial(span, tile_words, start, x_s), plgpu.ACC((_WG, bm), jnp.float32))
                scale = scales_s[start // problem.group if per_step > 1 else 0, mine].astype(jnp.float32)
                total = total + shares * lax.broadcast_in_dim(scale, total.shape, [0])
            return total

        def span(tile_words, start, x_s, acc):
            """Rows start .. start + span of w, without their scale."""
            for first in range(start, start + problem.span, half):
                block, within = divmod(first, problem.block)
                j, h = divmod(within // half, 2)
                part = lax.slice(tile_words, (0, block * half), (_WG, (block + 1) * half))
                w = _unpack(part, 4 * j + 16 * h).astype(dtype)
                if w_s is not None:  # the interpreter takes operands from shared memory only
                    w_s[wg] = w
                    plgpu.commit_smem()
                    w = w_s.at[wg]
                plgpu.wgmma(acc, w, x_s.at[:, pl.ds(first, half)].T)
                if w_s is not None:
                    plgpu.wgmma_wait(0)
            return acc[...]

        first = split * steps
        plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=40,
            in_specs=[
                plgpu.BlockSpec((bm, bk), lambda t: (row, first + t), transforms=_swizzled(half, dtype)),
                plgpu.BlockSpec((bn, bk // 8), lambda t: (column, first + t), transforms=_swizzled(bk // 8, jnp.int32)),
                plgpu.BlockSpec((per_step, bn), lambda t: (lax.div((first + t) * bk, problem.group * per_step), column)),
            ],
            max_concurrent_steps=min(blocks.stages, steps),
            wg_axis="wg",
            num_compute_wgs=warpgroups,
            compute_context=compute,
        )(x_g, words_g, scales_g)

    scratch = [plgpu.SMEM((warpgroups, _WG, width), jnp.float32)]
    if device.interpret:
        scratch.append(plgpu.SMEM((warpgroups, _WG, half), dtype, transforms=_swizzled(half, dtype)))
    call = mosaic_gpu.kernel(
        body,
        device,
        name="int4_matmul",
        out_type=jax.ShapeDtypeStruct((splits, n, m), jnp.float32),
        scratch_types=scratch,
        grid=(n // bn, splits, m // bm),
        grid_names=("n", "s", "m"),
        threads=warpgroups + 1,
    )
    return call(rows, words, scales)


def _swizzled(columns: int, dtype):
    """The widest swizzle that rows of so many elements fill."""
    size = jnp.dtype(dtype).itemsize
    width = next(width for width in (128, 64, 32) if columns * size % width == 0)
    return plgpu.TilingTransform((8, width // size)), plgpu.SwizzleTransform(width)


def _unpack(words, bit: int):
    """q of the nibbles at `bit`, float32.

    Or'ed into the mantissa of 2^23 a nibble at bit p counts 2^p: the float is 2^23 + 2^p u, which one multiply-add takes to
    u - 8. Nibbles too high for the mantissa are shifted down first.
    """
    if bit >= 20:
        words, bit = lax.shift_right_logical(words, jnp.full_like(words, 12)), bit - 12
    counted = lax.bitcast_convert_type((words & (15 << bit)) | _TWO_23, jnp.float32)
    return counted * 2.0**-bit - (2.0 ** (23 - bit) + 8.0)
