"""What the Hopper kernels of linear attention share: tiles of a chunk, its decay, and products that overlap.

A chunk has as many tokens as a wgmma has rows, and all tiles are cut into as many columns, so that every accumulator of a
product between tokens, and of outputs, is [64, 64].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.device import Device
from kernels_pallas.linear import chunk
from kernels_pallas.linear.problem import Problem
from kernels_pallas.tuning import tuned

__all__ = [
    "CHUNK",
    "Blocks",
    "END",
    "START",
    "advance",
    "along",
    "decay_rows",
    "decay_specs",
    "launch",
    "spec",
    "stage",
    "static_choice",
    "store",
    "tile",
    "two_products",
    "weights",
]

Array = jax.Array
CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the kernels that go through the chunks of a head.

    Attributes:
      stages: chunks in shared memory at a time. With 2, two thread blocks fit into a multiprocessor at dk = 128, and one's
        products hide the other's waits.
    """

    stages: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """A measured choice, or else one from the sizes of shared memory and registers."""
    default = Blocks(stages=2)
    return tuned(default, "linear", device, dtype=problem.dtype, head_size=problem.key_size, length=problem.length)


# Rows of `decay_rows`, in the order of `chunk.Sums`.
COARSE, FINE, START, END = range(4)
_ROWS = 6


def decay_rows(log_decay: Array) -> Array:
    """[b, t, h] to the sums of chunks, [b, h, n, 6, c]; tokens after t do not decay.

    The coarse and the fine ones are there twice, to be spread along rows and along columns: equal loads become one, for whose
    result there is no layout that suits both.
    """
    b, t, h = log_decay.shape
    x = jnp.pad(log_decay, ((0, 0), (0, -t % CHUNK), (0, 0))).transpose(0, 2, 1)
    sums = chunk.sums(x.reshape(-1, CHUNK))
    return jnp.stack([*sums, sums.coarse, sums.fine], axis=1).reshape(b, h, -1, _ROWS, CHUNK)


def tile(rows: int, columns: int, dtype):
    """Shared memory for a tile that products read."""
    return plgpu.SMEM((rows, columns), dtype, transforms=tiles.transforms(columns))


def stage(dtype, device: Device) -> dict:
    """The scratch memory that `tiles.accumulate` needs where kernels are interpreted; none elsewhere."""
    return {"stage": tile(CHUNK, CHUNK, dtype)} if device.interpret else {}


def spec(columns: int, index: Callable) -> plgpu.BlockSpec:
    """A pipeline's block of one chunk's tokens, from [t, d]."""
    return plgpu.BlockSpec((CHUNK, columns), index, transforms=tiles.transforms(columns))


def launch(name: str, block: Callable, device: Device, inputs: dict, outputs: dict, scratch: dict, grid: dict) -> dict:
    """Runs `block(refs)` on one warpgroup a thread block; refs by name, and None for inputs that are None.

    Args:
      name: of the kernel.
      block: the kernel.
      device: that it is built for.
      inputs: arrays.
      outputs: (shape, dtype) each.
      scratch: shared memory and barriers.
      grid: blocks along named axes; the last varies fastest.
    """
    given = {name: x for name, x in inputs.items() if x is not None}

    def body(*refs):
        block({**dict.fromkeys(inputs), **dict(zip((*given, *outputs, *scratch), refs, strict=True))})

    kernel = mosaic_gpu.kernel(
        body,
        device,
        name=name,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs.values()],
        scratch_types=list(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        approx_math=True,
    )
    return dict(zip(outputs, kernel(*given.values())))


def along(decay, kind: int, axis: int) -> Array:
    """A kind of sums, [c, c] with its entries along `axis`; along columns COARSE and FINE only."""
    row = mosaic_gpu.load(decay.at[kind + 4 * axis])
    return lax.broadcast_in_dim(row, (CHUNK, CHUNK), [axis])


def weights(decay, *, transposed: bool = False) -> Array:
    """w of `chunk.Factors`, [c, c]: exp(b_i - b_j) where query i is not before key j, and else 0.

    Args:
      decay: reference to the chunk's rows [6, c], or None for 1 in place of the exponentials.
      transposed: keys are the rows.
    """
    i_axis, j_axis = (1, 0) if transposed else (0, 1)
    i, j = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis) for axis in (i_axis, j_axis))
    if decay is None:
        return jnp.where(i >= j, 1.0, 0.0)
    coarse, fine = (along(decay, kind, i_axis) - along(decay, kind, j_axis) for kind in (COARSE, FINE))
    return jnp.where(i >= j, jnp.exp(coarse + fine), 0.0)


def decay_specs(decay, index: Callable) -> list[plgpu.BlockSpec]:
    """A pipeline's block of the chunk's rows, from [n, 6, c]; none without decay."""
    return [] if decay is None else [plgpu.BlockSpec((None, _ROWS, CHUNK), lambda i: (index(i), 0, 0))]


def advance(state: Array, x_s, y_s, decay, kind: int, scaled_s, stage) -> Array:
    """exp(b_c) state + x^T (f y), in float32: the state after a chunk, or the cotangent of the state before it.

    Args:
      state: [dk, c], registers.
      x_s: keys, or queries; [c, dk].
      y_s: values, or gradients of outputs; [c, c].
      decay: rows of the chunk, or None for no decay.
      kind: which of them is f.
      scaled_s: [c, c] shared memory for f y.
      stage: as in `tiles.accumulate`.
    """
    y = y_s[...]
    if decay is not None:
        y = (y.astype(jnp.float32) * along(decay, kind, 0)).astype(y.dtype)
        state = state * decay[START, CHUNK - 1]
    scaled_s[...] = y
    plgpu.commit_smem()
    if stage is None:
        (state,) = tiles.accumulate((state,), lambda add: add(0, x_s.T, scaled_s))
    else:  # the interpreter has no accumulators that start from registers
        state = state + tiles.product(x_s.T, scaled_s)
    plgpu.commit_smem()  # all warps are done with the chunk's tiles: a pipeline may fill them again
    return state


def two_products(a, b, c, e, then: Callable[[Array], Array]) -> tuple[Array, Array]:
    """(then(a @ b), c @ e) of tiles in shared memory; the second product runs while `then` computes."""

    def run(first, second):
        plgpu.wgmma(first, a, b)
        plgpu.wgmma(second, c, e)
        # Products complete in order: when one is left, the first is there.
        done = then(plgpu.wgmma_accumulator_load(first, wait_n=1))
        return done, second[...]

    shapes = [(x.shape[0], y.shape[1]) for x, y in ((a, b), (c, e))]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def store(x: Array, staging, destination) -> None:
    """Copies registers to global memory by way of shared memory, once what was there before is on its way."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = x.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, destination)
