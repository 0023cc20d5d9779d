"""Where activations lie on a mesh with a `sequence` axis: positions are split between attention layers, heads inside them.

This is the sequence parallelism of DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509, section 3): everything that treats
positions alike works on a part of them; before attention an all-to-all trades positions for heads, and after it back. Attention
itself, with any mask, is computed as ever. Without such an axis, and outside `kernels_pallas.partitioned`, nothing is done.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kernels_pallas import current_device
from kernels_pallas.device import Partition

__all__ = ["join_heads", "split_heads", "split_positions"]


def split_positions(x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """x with its positions over `sequence`, where that divides their number, and its rows over the axes of the batch."""
    partition = _partition(x.shape[1])
    if partition is None:
        return x
    return _place(partition, x, partition.sequence, None)


def split_heads(*arrays: Float[Array, "b l h d"]) -> tuple[Float[Array, "b l h d"], ...]:
    """What attention gets: the arrays with whole sequences, and their heads over `tensor` and `sequence`.

    Raises:
      ValueError: these axes do not divide a number of heads.
    """
    return tuple(_trade(x, back=False) for x in arrays)


def join_heads(x: Float[Array, "b l h d"]) -> Float[Array, "b l h d"]:
    """What attention gave, with its positions over `sequence` again."""
    return _trade(x, back=True)


def _trade(x, *, back: bool):
    partition = _partition(x.shape[1])
    if partition is None:
        return x
    ways = _ways(partition, partition.heads)
    if x.shape[2] % ways:
        raise ValueError(f"{x.shape[2]} heads cannot be split over {'*'.join(partition.heads)}={ways} devices")
    others = tuple(axis for axis in partition.heads if axis not in partition.sequence)
    # Both sides of the trade are named, or the compiler would find no all-to-all.
    sides = [(partition.sequence, others or None, None), (None, partition.heads, None)]
    for side in reversed(sides) if back else sides:
        x = _place(partition, x, *side)
    return x


def _partition(length: int) -> Partition | None:
    """The partition that functions are traced in, if it splits sequences of this length and nobody does so by hand."""
    partition = current_device().partition
    if partition is None or not partition.sequence or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    return None if length % _ways(partition, partition.sequence) else partition


def _ways(partition: Partition, axes: tuple[str, ...]) -> int:
    return math.prod(partition.mesh.shape[axis] for axis in axes)


def _place(partition: Partition, x: Array, *rest: tuple[str, ...] | None) -> Array:
    rows = None if x.shape[0] % _ways(partition, partition.batch) else partition.batch or None
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, P(rows, *rest)))
