"""Where activations lie on a mesh: rows over the batch's axes, heads over `tensor`, positions over `sequence`.

Parameters have their places from a table; left to itself the compiler then may keep them split and gather activations instead,
whose traffic and memory grow with the number of devices. So what flows through the blocks is placed here.

The `sequence` axis is the sequence parallelism of DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509, section 3): what
treats positions alike works on a part of them; before attention an all-to-all trades positions for heads, and after it back.
Attention itself, with any mask, is computed as ever. Outside `kernels_pallas.partitioned` nothing is done.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kernels_pallas import current_device
from kernels_pallas.device import Partition

__all__ = ["join_heads", "place_rows", "place_stream", "place_whole", "split_heads"]

Axes = tuple[str, ...]


def place_rows(x: Float[Array, "b *n"]) -> Float[Array, "b *n"]:
    """x with its rows over the axes of the batch, and the rest whole."""
    partition = _partition()
    return x if partition is None else _place(partition, x)


def place_whole(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x, a parameter, whole on every device: gathered once before a loop, whose every step would gather it."""
    partition = _partition()
    return x if partition is None else jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, P()))


def place_stream(x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    """x with its rows over the axes of the batch, and its positions over `sequence` where that divides their number."""
    partition = _partition()
    return x if partition is None else _place(partition, x, _sequence(partition, x))


def split_heads(*arrays: Float[Array, "b l h d"]) -> tuple[Float[Array, "b l h d"], ...]:
    """What attention gets: the arrays with whole sequences, and their heads over `tensor` and `sequence`.

    Raises:
      ValueError: positions are split, and these axes do not divide a number of heads.
    """
    return tuple(_trade(x, back=False) for x in arrays)


def join_heads(x: Float[Array, "b l h d"]) -> Float[Array, "b l h d"]:
    """What attention gave, with its positions over `sequence` again."""
    return _trade(x, back=True)


def _trade(x, *, back: bool):
    partition = _partition()
    if partition is None:
        return x
    sequence, heads = _sequence(partition, x), partition.heads
    others = tuple(axis for axis in heads if axis not in partition.sequence)
    if not sequence:
        return _place(partition, x, (), others if x.shape[2] % _ways(partition, others) == 0 else ())
    if x.shape[2] % _ways(partition, heads):
        raise ValueError(f"{x.shape[2]} heads cannot be split over {'*'.join(heads)}={_ways(partition, heads)} devices")
    # Both sides of the trade are named, or the compiler would find no all-to-all.
    sides = [(sequence, others), ((), heads)]
    for side in reversed(sides) if back else sides:
        x = _place(partition, x, *side)
    return x


def _partition() -> Partition | None:
    """The partition that functions are traced in, unless they are inside a `shard_map`."""
    return None if jax.sharding.get_abstract_mesh().manual_axes else current_device().partition


def _sequence(partition: Partition, x: Array) -> Axes:
    return () if x.shape[1] % _ways(partition, partition.sequence) else partition.sequence


def _ways(partition: Partition, axes: Axes) -> int:
    return math.prod(partition.mesh.shape[axis] for axis in axes)


def _place(partition: Partition, x: Array, *rest: Axes) -> Array:
    rows = () if x.shape[0] % _ways(partition, partition.batch) else partition.batch
    spec = P(*(axes or None for axes in (rows, *rest)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(partition.mesh, spec))
