"""How a mask becomes the grid of a TPU kernel: block sizes, the worklist of live blocks, metadata as tiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.attention.problem import Problem
from kernels_pallas.block_mask import EMPTY, FULL, PARTIAL, BlockMask
from kernels_pallas.device import Device
from kernels_pallas.tuning import tuned

__all__ = [
    "LANES",
    "STEP_BYTES",
    "Blocks",
    "allowed",
    "by_head",
    "dq_bytes",
    "metadata",
    "padded",
    "precision",
    "spread",
    "static_choice",
    "unpack",
    "worklist",
]

# Elements along the minor axis of a vector register, on every TPU.
LANES = 128
# Fast memory of a core, and what the tiles of one step take of it at most (float32, 512 x 512).
_VMEM_MIB = {"v5e": 128, "v5p": 64, "v6e": 128, "v7x": 64}
STEP_BYTES = 24 << 20
# An entry of a worklist is one int32, major block | minor block | first | last | kind, since scalar memory is small.
_INDEX_BITS = 14
_FINEST = 256
# Bundles of the schedules that libtpu 0.0.42.1 makes for v5e at head size 128 in bfloat16 (v5p's are within 4 %): a full step,
# a partial one with one row of metadata, and with two, what a row (column) of blocks adds, what any step adds. Where the
# matrix units need more cycles than there are bundles, their cycles.
_FORWARD = {(256, 512): (611, 701, 1046, 315, 54), (512, 512): (1137, 1528, 1894, 608, 54)}
_COLUMNS = {(512, 256): (1374, 1489, 1446, 105, 117), (512, 512): (2560, 2560, 2721, 204, 117)}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """(queries, keys) of a block in each kernel.

    Attributes:
      forward: the forward pass.
      columns: the backward pass over columns, which gives dk and dv.
      rows: the backward pass over rows, which gives dq; None where the pass over columns keeps all of dq in fast memory.
    """

    forward: tuple[int, int]
    columns: tuple[int, int]
    rows: tuple[int, int] | None


def static_choice(problem: Problem, device: Device) -> Blocks:
    """What was measured, or the blocks with the fewest bundles over the mask's plan; short sequences take smaller ones."""
    mask, group = problem.mask, problem.heads // problem.kv_heads

    def fitted(block):
        return tuple(min(size, -(-n // LANES) * LANES) for size, n in zip(block, mask.shape))

    columns = fitted(_cheapest(mask, _COLUMNS, edge_axis=1))
    held = dq_bytes(group, -(-mask.shape[0] // columns[0]) * columns[0], problem.head_size, problem.dtype)
    fits = held + STEP_BYTES <= _VMEM_MIB.get(device.kind, 0) << 20
    default = Blocks(fitted(_cheapest(mask, _FORWARD, edge_axis=0)), columns, None if fits else fitted((512, 512)))
    return tuned(default, "attention", device, **problem.bucket)


def _cheapest(mask: BlockMask, costs: dict[tuple[int, int], tuple[int, ...]], edge_axis: int) -> tuple[int, int]:
    def bundles(block):
        full, simple, compound, edge, step = costs[block]
        plan = _plan(mask, block)
        n_full, n_partial = (plan == FULL).sum(), (plan == PARTIAL).sum()
        partial = simple if mask.q_meta.shape[0] == 1 else compound
        return n_full * full + n_partial * partial + (n_full + n_partial) * step + plan.shape[edge_axis] * edge

    return min(costs, key=bundles)


def dq_bytes(group: int, sq: int, head_size: int, dtype: str) -> int:
    """Fast memory for dq [group, sq, head_size]: float32 sums and two buffers of the output; a row fills whole registers."""
    width = -(-head_size // LANES) * LANES
    return group * sq * width * (4 + 2 * (2 if dtype == "bfloat16" else 4))


def _plan(mask: BlockMask, block: tuple[int, int]) -> np.ndarray:
    """`mask.planned(block)`, from one fine plan for all the large blocks, since a plan takes time on long sequences."""
    if any(size % _FINEST for size in block):
        return mask.planned(block)
    fine = mask.planned((_FINEST, _FINEST))
    many = [size // _FINEST for size in block]

    def merge(of, what, fill):
        what = np.pad(what, [(0, -n % k) for n, k in zip(what.shape, many)], constant_values=fill)
        rows, columns = (n // k for n, k in zip(what.shape, many))
        return of(what.reshape(rows, many[0], columns, many[1]), axis=(1, 3))

    live, full = merge(np.any, fine != EMPTY, False), merge(np.all, fine == FULL, True)
    return np.where(full, FULL, np.where(live, PARTIAL, EMPTY))


def worklist(mask: BlockMask, block: tuple[int, int], *, columns: bool = False) -> np.ndarray:
    """The steps of a kernel: every live block, row after row (or column after column).

    A row in which nothing is alive has one step of kind EMPTY, which writes its zeros. Blocks that hold padded keys are
    PARTIAL; padded queries need no mask, since nothing of theirs is read.

    Returns:
      int32 [n], for `unpack`.

    Raises:
      ValueError: more blocks along a side than an entry can count.
    """
    plan = _plan(mask, block).astype(np.int64)
    if max(plan.shape) > 1 << _INDEX_BITS:
        raise ValueError(f"{plan.shape[0]} x {plan.shape[1]} blocks of {block}: at most {1 << _INDEX_BITS} a side")
    if mask.shape[1] % block[1]:
        plan[:, -1] = np.minimum(plan[:, -1], PARTIAL)
    plan = plan.T if columns else plan
    visited = plan != EMPTY
    visited[:, 0] |= ~visited.any(axis=1)
    major, minor = np.nonzero(visited)
    first = np.diff(major, prepend=-1) != 0
    last = np.diff(major, append=-1) != 0
    items = major << (_INDEX_BITS + 4) | minor << 4 | first.astype(int) << 3 | last.astype(int) << 2 | plan[major, minor]
    return items.astype(np.uint32).view(np.int32)


def unpack(item):
    """(row or column of blocks, block in it, whether it is the first there, the last, its kind) of a worklist's entry."""
    major = lax.shift_right_logical(item, jnp.int32(_INDEX_BITS + 4))
    return major, (item >> 4) & ((1 << _INDEX_BITS) - 1), (item >> 3) & 1, (item >> 2) & 1, item & 3


def metadata(mask: BlockMask, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Metadata for whole blocks, q [m, sq'] and k [m, sk'], with a last row of k that is 1 on real keys where some are padded."""
    q_meta, k_meta = mask.padded(block)
    return q_meta[:-1], k_meta if mask.shape[1] % block[1] else k_meta[:-1]


def allowed(pred: Callable, q: Sequence, k: Sequence, shape: tuple[int, int]):
    """bool `shape`: the mask of a tile.

    Args:
      pred: of the mask.
      q: rows of metadata, each [n, 1] or [1, n], as the queries lie in the tile.
      k: the same of keys; one more than `q` where keys are padded, see `metadata`.
      shape: of the tile.
    """
    # Spread before the predicate: a condition on queries alone would otherwise be a thin bool array, and Mosaic's
    # broadcasts of those have come and gone.
    q, k = ([jnp.broadcast_to(row, shape) for row in rows] for rows in (q, k))
    ok = pred(q, k[: len(q)])
    return ok & (k[-1] == 1) if len(k) > len(q) else ok


def spread(x, n: int):
    """x [r, 128], equal along each row, as [r, n]: whole registers are copied, where [r, 1] would be broadcast."""
    return jnp.tile(x, (1, -(-n // LANES)))[:, :n]


def by_head(x):
    """[b, s, h, ...] to [b, h, s, ...] and back; float16, which TPUs do not compute with, to float32."""
    x = x.astype(jnp.float32) if x.dtype == jnp.float16 else x
    return jnp.swapaxes(x, 1, 2)


def padded(x, size: int):
    """[b, h, s, ...] with zeros up to a multiple of `size` in s."""
    return jnp.pad(x, [(0, -n % size if axis == 2 else 0) for axis, n in enumerate(x.shape)])


def precision(dtype) -> lax.Precision:
    """Of a kernel's products: float32 stays float32, in six passes of bfloat16; never what a global setting says."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
