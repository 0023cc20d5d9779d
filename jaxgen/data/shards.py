"""How hosts share examples, the same for every kind of data."""

from __future__ import annotations

import math

import grain

__all__ = ["READ", "check_shards", "one_pass", "share"]

# One thread feeds a device that computes; the second hides the wait for a disk. More only contend for Python's lock.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def check_shards(batch_size: int, shard_index: int, shard_count: int) -> None:
    """That hosts can share batches.

    Raises:
      ValueError: a global batch size that `shard_count` does not divide, or a shard index out of range.
    """
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index}: must be in [0, shard_count={shard_count})")
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(f"batch_size={batch_size}: must be a positive multiple of the {shard_count} hosts")


def one_pass(ds: grain.MapDataset, shard_count: int) -> grain.MapDataset:
    """Every example once, and the first ones again until all of `shard_count` hosts get equally many."""
    padded = len(ds) + -len(ds) % shard_count
    return ds if padded == len(ds) else ds.repeat(math.ceil(padded / len(ds)), reseed_each_epoch=False)[:padded]


def share(ds: grain.MapDataset, batch_size: int, shard_index: int, shard_count: int) -> grain.MapDataset:
    """One host's examples: of each global batch the rows that its devices hold, in order.

    So the batches of all hosts, one after the other, are the batch of a single one, row by row: what is drawn for a row in
    training does not depend on the number of hosts either.

    Args:
      ds: the examples of all hosts.
      batch_size: global.
      shard_index: this host's number.
      shard_count: number of hosts; divides `batch_size` and, if `ds` ends, its length.
    """
    return ds if shard_count == 1 else _Share(ds, batch_size, shard_index, shard_count)


class _Share(grain.MapDataset):
    def __init__(self, parent: grain.MapDataset, batch_size: int, shard_index: int, shard_count: int):
        super().__init__(parent)
        self._batch, self._index, self._count = batch_size, shard_index, shard_count

    def __len__(self) -> int:
        return len(self._parent) // self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._batch // self._count)
        # The last batch of one pass may be smaller.
        size = min(self._batch, len(self._parent) - batch * self._batch) // self._count
        return self._parent[batch * self._batch + self._index * size + row]
