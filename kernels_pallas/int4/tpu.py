"""Products with 4-bit weights for TPUs: words are unpacked in VMEM, two weights at a time, into bfloat16.

A nibble u = q + 8 shifted to bits 3..6 of a half word, or'ed with the bits of 16.0, is the bfloat16 16 + u: the exponent is
that of 16 and the nibble fills the top of the mantissa. So a shift, an and, and an or make two weights of one word, with no
conversion; the constant 24 = 16 + 8 goes out with the sum of x over the group, and scales multiply sums instead of weights:

    y = sum over groups of scale (x (q + 24) - 24 sum(x))
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.device import Device
from kernels_pallas.int4.pieces import pieces
from kernels_pallas.int4.problem import Problem
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "forward", "refuses", "static_choice"]

_OFFSET = 24.0
_MASK, _SIXTEEN = 0x00780078, 0x41804180  # both halves of a word
_SUBLANES = 16  # rows of a bfloat16 register


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of a grid step.

    Attributes:
      m: rows of x.
      n: columns of w.
      k: rows of w, at most; the problem's step is the largest that divides its k.
    """

    m: int
    n: int
    k: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """The fewest bundles of compiled v5e schedules at k = n = 8192."""
    blocks = Blocks(m=64, n=512, k=2048) if problem.m <= 64 else Blocks(m=256, n=512, k=1024)
    return tuned(blocks, "int4", device, **problem.bucket)


def refuses(problem: Problem, device: Device) -> str | None:
    """Why this kernel cannot compute `problem` on `device`."""
    if problem.layout != "kn":
        return f"words have layout {problem.layout!r}; relayout(packed, 'kn')"
    if problem.tile < _SUBLANES:
        return f"tile={problem.tile} for k={problem.k}, group={problem.group} is below a register's {_SUBLANES} rows"
    if _step(problem, device) is None:
        return f"k={problem.k} has no step in whole groups of {problem.group} and whole blocks of {problem.block}"
    return None


def _step(problem: Problem, device: Device) -> int | None:
    return problem.step(static_choice(problem, device).k, 128)


def forward(x, words, scales, *, problem: Problem, device: Device):
    """y [m, n] of x [m, k], words [k / 8, n] and scales [k / group, n]."""
    blocks, bk = static_choice(problem, device), _step(problem, device)
    (m, k), n = x.shape, words.shape[-1]
    parts = pieces(x)
    rows = parts.reshape(-1, k)
    bm, bn = min(blocks.m, -len(rows) % _SUBLANES + len(rows)), min(blocks.n, n)
    rows = jnp.pad(rows, ((0, -len(rows) % bm), (0, 0)))
    per_step = max(1, bk // problem.group)
    scales = scales.reshape(-1, per_step, n)
    # The number of steps is no `pl.num_programs`: jax 0.11.2 keeps a kernel's trace for other grids with the same blocks.
    y = pl.pallas_call(
        functools.partial(_body, problem=problem, steps=k // bk),
        grid=(len(rows) // bm, pl.cdiv(n, bn), k // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda m, n, k: (m, k)),
            pl.BlockSpec((bk // 8, bn), lambda m, n, k: (k, n)),
            pl.BlockSpec((1, per_step, bn), lambda m, n, k: (lax.div(k * bk, problem.group * per_step), 0, n)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        out_shape=jax.ShapeDtypeStruct((len(rows), n), jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(rows) * k * n, transcendentals=0, bytes_accessed=words.nbytes + scales.nbytes + rows.nbytes
        ),
        interpret=device.interpret,
        name="int4_matmul",
    )(rows, words, scales)
    return y[: len(parts) * m].reshape(len(parts), m, n).sum(0, dtype=jnp.float32).astype(x.dtype)


def _body(x_ref, words_ref, scales_ref, y_ref, total_ref, *, problem: Problem, steps: int):
    """One step: `span` rows of w at a time are unpacked, multiplied and scaled."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    tile, span, total = problem.tile, problem.span, total_ref[...]
    for start in range(0, x_ref.shape[1], problem.block):
        words = words_ref[start // 8 : (start + problem.block) // 8]
        for first in range(0, problem.block, span):
            weights = [_unpack(words, j) for j in range(first // tile, (first + span) // tile)]
            x = x_ref[:, start + first : start + first + span]
            sums = jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True)
            y = jnp.dot(x, jnp.concatenate(weights), preferred_element_type=jnp.float32) - _OFFSET * sums
            row = (start + first) // problem.group if scales_ref.shape[1] > 1 else 0
            total += y * scales_ref[0, row : row + 1].astype(jnp.float32)
    total_ref[...] = total

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        y_ref[...] = total_ref[...].astype(y_ref.dtype)


def _unpack(words, j: int):
    """q + 24 of the j-th tile of a block: bfloat16 [tile, n] of words [tile / 2, n]."""
    shift = 4 * j - 3
    moved = words << 3 if j == 0 else lax.shift_right_logical(words, jnp.full_like(words, shift))
    return pltpu.bitcast((moved & _MASK) | _SIXTEEN, jnp.bfloat16)
