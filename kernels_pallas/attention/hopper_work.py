"""What the Hopper attention kernels share: tiles of their warpgroups, the mask on them, and who visits which."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.block_mask import EMPTY, PARTIAL, BlockMask
from kernels_pallas.device import Device
from kernels_pallas.hopper_tiles import transforms

__all__ = [
    "ROWS",
    "SHARED_MEMORY",
    "WARPGROUPS",
    "Visit",
    "Visits",
    "allowed",
    "launch",
    "masked",
    "metadata",
    "schedule",
    "stage",
    "stream",
    "tile",
]

# Rows of one wgmma, and so of a warpgroup's tile; a thread block has two such warpgroups, and one that only copies.
ROWS, WARPGROUPS = 64, 2
# What tiles may take of the 232448 bytes of shared memory that a thread block of sm_90 can have; the rest is for barriers.
SHARED_MEMORY = 232448 - 2048
# Registers a thread of the copying warpgroup. The other two share the rest: 240 each, without which d = 128 spills.
_MEMORY_REGISTERS = 32


def tile(rows: int, columns: int, dtype):
    """Shared memory for a tile of each computing warpgroup."""
    return plgpu.SMEM((WARPGROUPS, rows, columns), dtype, transforms=transforms(columns))


def stage(columns: int, dtype, device: Device) -> dict:
    """The scratch memory that `accumulate` needs where kernels are interpreted; none elsewhere."""
    return {"stage": tile(ROWS, columns, dtype)} if device.interpret else {}


def metadata(mask: BlockMask, block: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """int32 [m, ...] metadata of queries and keys for whole blocks, with zeros after the last token."""
    q, k = mask.padded(block)
    return jnp.asarray(q[:-1]), jnp.asarray(k[:-1])


def schedule(plan: np.ndarray, ragged: bool = False) -> np.ndarray:
    """What every thread block visits, from a plan of tiles of one warpgroup; read with `Visits`.

    Blocks with most to visit come first, so that none of them starts when the others are done.

    Args:
      plan: [n, m], EMPTY, PARTIAL or FULL.
      ragged: the last column stands for less than a whole tile, and must be masked.

    Returns:
      int32 [ceil(n / 2), 2 + w]: the pair of rows of the plan that is meant, the number of columns live in either, then for
      each of these the column and, in two lower bits a warpgroup, what its own tile is.
    """
    plan = np.pad(plan, ((0, -plan.shape[0] % WARPGROUPS), (0, 0)))
    if ragged:
        plan[:, -1] = np.minimum(plan[:, -1], PARTIAL)
    pairs = plan.reshape(-1, WARPGROUPS, plan.shape[1]).astype(np.int32)
    entries = np.arange(plan.shape[1]) << 2 * WARPGROUPS
    for w in range(WARPGROUPS):
        entries = entries | pairs[:, w] << 2 * w
    live = (pairs != EMPTY).any(axis=1)
    count = live.sum(axis=1)
    rows = np.zeros((len(pairs), 2 + max(1, count.max())), np.int32)
    for row, i in zip(rows, np.argsort(-count, kind="stable")):
        row[:2] = i, count[i]
        row[2 : 2 + count[i]] = entries[i, live[i]]
    return rows


class Visit(NamedTuple):
    """One tile of a visit list.

    Attributes:
      index: which tile.
      kind: EMPTY, PARTIAL or FULL for this warpgroup.
      zero: 0, but read from memory, so that the compiler does not know: addresses that it is added to are computed where they
        are used, not kept in registers around the loop.
    """

    index: jax.Array
    kind: jax.Array
    zero: jax.Array


class Visits:
    """A row of a schedule in global memory, as one warpgroup of a thread block reads it.

    Attributes:
      start: first row of the tile that this warpgroup owns.
      count: tiles to visit.
    """

    def __init__(self, schedule_g, row: jax.Array, warpgroup: jax.Array):
        self._ref, self._row, self._warpgroup = schedule_g, row, warpgroup
        self.start = (schedule_g[row, 0] * WARPGROUPS + warpgroup) * ROWS
        self.count = schedule_g[row, 1]

    def __getitem__(self, t: jax.Array) -> Visit:
        entry = self._ref[self._row, 2 + t]
        # No entry is negative, so its sign is the zero.
        zero = lax.shift_right_logical(entry, jnp.int32(31))
        return Visit(entry >> 2 * WARPGROUPS, (entry >> 2 * self._warpgroup) & 3, zero)


def allowed(mask: BlockMask, q_meta, k_meta, q_start, k_start, shape: tuple[int, int], *, transposed: bool = False) -> jax.Array:
    """bool `shape`: the mask on one tile, of queries and keys, or of keys and queries where `transposed`.

    Keys past the last are not allowed, whatever the predicate makes of their metadata. Queries past the last may be: their
    outputs are dropped, and in gradients their probabilities are 0.

    Args:
      mask: whose predicate is asked.
      q_meta: int32 [m, ...] reference in global memory, padded to whole tiles.
      k_meta: the same of keys.
      q_start: first query of the tile.
      k_start: first key of the tile.
      shape: of the tile.
      transposed: keys are the rows.
    """
    q_axis, k_axis = (1, 0) if transposed else (0, 1)

    def spread(meta, start, axis):
        def load(i):
            return lax.broadcast_in_dim(mosaic_gpu.load(meta.at[i, pl.ds(start, shape[axis])]), shape, [axis])

        return _Rows(load, tuple(range(meta.shape[0])))

    ok = mask.pred(spread(q_meta, q_start, q_axis), spread(k_meta, k_start, k_axis))
    if mask.shape[1] % shape[k_axis]:
        ok = ok & (lax.broadcasted_iota(jnp.int32, shape, k_axis) < mask.shape[1] - k_start)
    return ok


class _Rows:
    """Rows of metadata, loaded when the predicate asks: Mosaic searches in vain for the layout of one that nobody reads."""

    def __init__(self, load: Callable, rows: tuple[int, ...]):
        self._load, self._rows = load, rows

    def __getitem__(self, index: int | slice):
        return _Rows(self._load, self._rows[index]) if isinstance(index, slice) else self._load(self._rows[index])

    def __len__(self) -> int:
        return len(self._rows)


def masked(products: jax.Array, kind: jax.Array, ok: Callable[[], jax.Array]) -> jax.Array:
    """`products` of a full tile; of a partial one -inf where `ok()` says no, which only there is computed."""
    return lax.cond(kind == PARTIAL, lambda: jnp.where(ok(), products, -jnp.inf), lambda: products)


def stream(step: Callable, compute: Callable, grid: tuple, in_specs: list, stages: int) -> Callable:
    """A pipeline: one warpgroup copies tiles into shared memory, two run `compute`, and in its loop `step`, on them.

    The tiles of a visit have arrived when `step` is called. It must arrive once on the barrier of every input, in both
    warpgroups and on all paths, when its reads are complete: the copying warpgroup waits for that before it overwrites them.
    """
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=grid,
        in_specs=in_specs,
        max_concurrent_steps=stages,
        memory_registers=_MEMORY_REGISTERS,
        wg_axis="wg",
        num_compute_wgs=WARPGROUPS,
        manual_consumed_barriers=True,
        compute_context=compute,
    )


def launch(name: str, block: Callable, device: Device, arrays: tuple, outputs: list, scratch: dict, grid: dict[str, int]):
    """Runs `block(*inputs, *outputs, scratch)`, over references, in a grid of thread blocks; the last axis varies fastest."""

    def body(*refs):
        split = len(arrays) + len(outputs)
        block(*refs[:split], dict(zip(scratch, refs[split:])))

    kernel = mosaic_gpu.kernel(
        body,
        device,
        name=name,
        out_type=[jax.ShapeDtypeStruct(*output) for output in outputs],
        scratch_types=list(scratch.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        threads=WARPGROUPS + 1,
        approx_math=True,
    )
    return kernel(*arrays)
