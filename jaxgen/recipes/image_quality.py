"""Image quality at scale: samples made in sharded batches and read by InceptionV3 where they lie, never all held at once.

Each process collects statistics of the images on its own devices in a folder of its own below `folder`, and all are joined in
the end. A run that was interrupted goes on from those folders, with any number of processes: every image has a number, batch i
is always made with the same key and labels, and what was counted is not counted again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int, UInt8

from jaxgen import storage
from jaxgen.data import DataConfig, batches, make_source, to_uint8
from jaxgen.metrics import ImageStats, Reference, image_scores, npz_images, read_reference
from jaxgen.metrics.image_stats import STATE, npz_count
from jaxgen.recipes.sampling import sample_batch
from jaxgen.train import Progress, batch_sharding, make_mesh, replicated
from jaxgen.train.log import write_json

__all__ = ["Collector", "data_reference", "npz_reference", "observe", "sample_quality", "sample_statistics"]

# What generators are compared by: 50,000 samples, of which as many as ImageNet's published reference has for the manifolds.
KEEP, SPLIT = 10_000, 5000


def observe(network, variables: Any, images: Any, mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """What the scores read of images, computed where the images lie.

    Args:
      network: a module whose `apply(variables, images, method="observe")` takes uint8 pixels and returns "pool", "spatial" and
        "logits", such as `jaxgen.nn.inception.InceptionV3`.
      variables: its parameters, on the mesh.
      images: uint8, or floats in [-1, 1], which are rounded as they would be for a file.
      mesh: over which the images are split.
    """
    return _observe(network, None if mesh is None else batch_sharding(mesh), variables, images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _observe(network, sharding: NamedSharding | None, variables, images):
    images = images if images.dtype == jnp.uint8 else to_uint8(images)
    if sharding is not None:
        images = jax.lax.with_sharding_constraint(images, sharding)
    out = network.apply(variables, images, method="observe")
    return out if sharding is None else jax.lax.with_sharding_constraint(out, sharding)


class Collector:
    """Statistics of numbered images, of which each process counts those on its devices.

    Args:
      network, variables: see `observe`.
      count: images in all, numbered from 0.
      folder: where the statistics are kept, a place that all processes reach; `None` keeps them in memory.
      about: what has to be equal when a run goes on, as JSON has it.
      mesh: over which the images of a batch are split; `None` is one device.
      keep, split: see `ImageStats.empty`.
      save_every_s: seconds between saves.

    Raises:
      ValueError: the folder holds another run's statistics, or several processes have no folder.
    """

    def __init__(
        self,
        network,
        variables: Any,
        count: int,
        folder: str | os.PathLike | None,
        about: Mapping[str, Any],
        *,
        mesh: Mesh | None = None,
        keep: int = KEEP,
        split: int = SPLIT,
        save_every_s: float = 60.0,
    ):
        if folder is None and jax.process_count() > 1:
            raise ValueError(f"folder=None: {jax.process_count()} processes join their statistics in a folder")
        self.network, self.mesh, self.every, self.keep, self.split = network, mesh, save_every_s, keep, split
        self.variables = variables if mesh is None else jax.device_put(variables, replicated(mesh))
        self.folder = None if folder is None else storage.place(folder)
        self.own = None if folder is None else self.folder / f"part_{jax.process_index():05d}"
        self.stats: ImageStats | None = None
        self.done = np.zeros(count, bool)
        if self.folder is not None:
            _check_run(self.folder, {"count": count, "keep": keep, "split": split, **about})
            for path, stats in self._parts():
                self.done |= stats.seen(count)
                self.stats = stats if path == self.own else self.stats
        # Nobody may save before all have read.
        _wait("jaxgen_statistics_read")
        self.saved = time.monotonic()

    def _parts(self) -> Iterator[tuple[storage.Place, ImageStats]]:
        for path in sorted(self.folder.glob("part_*")):
            if (path / STATE).exists():
                yield path, ImageStats.load(path)

    def missing(self, index: Int[np.ndarray, "n"]) -> bool:
        """Whether any of these images has to be counted still; negative numbers are padding."""
        index = index[index >= 0]
        return bool((~self.done[index]).any())

    def add(self, images: Any, index: Int[np.ndarray, "n"]) -> None:
        """Counts images that were not counted yet.

        Args:
          images: [n, H, W, C], see `observe`; an array over all processes has the same rows in each.
          index: their numbers, negative ones for padding.
        """
        out = observe(self.network, self.variables, images, self.mesh)
        rows, values = _local_rows(out)
        index = np.asarray(index)[rows]
        new = (index >= 0) & ~self.done[index]
        if self.stats is None:
            widths = (values[name].shape[1] for name in ("pool", "spatial", "logits"))
            self.stats = ImageStats.empty(*widths, keep=self.keep, split=self.split)
        if new.any():
            self.stats = self.stats.update({name: x[new] for name, x in values.items()}, index[new])
        if self.own is not None and time.monotonic() - self.saved >= self.every:
            self.save()

    def save(self) -> None:
        """Writes what this process has."""
        if self.own is not None and self.stats is not None:
            self.stats.save(self.own)
        self.saved = time.monotonic()

    def finish(self) -> ImageStats:
        """The statistics of all processes together.

        Raises:
          ValueError: images that nobody counted.
        """
        self.save()
        _wait("jaxgen_statistics_written")
        parts = [self.stats] if self.folder is None else [stats for _, stats in self._parts()]
        stats = functools.reduce(ImageStats.merge, [part for part in parts if part is not None])
        lacking = np.flatnonzero(~stats.seen(len(self.done)))
        if lacking.size:
            raise ValueError(f"{lacking.size} of {len(self.done)} images were not counted, such as number {lacking[0]}")
        return stats


def _local_rows(out: Mapping[str, jax.Array]) -> tuple[Int[np.ndarray, "n"], dict[str, np.ndarray]]:
    """The rows that this process has the first copy of: their places in the global batch, and their values."""
    places, values = [], {}
    for name, x in out.items():
        shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        places = [np.arange(len(x))[shard.index[0]] for shard in shards]
        values[name] = np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(shard.data) for shard in shards)])
    return np.concatenate([np.zeros(0, int), *places]), values


def _check_run(folder: storage.Place, about: dict[str, Any]) -> None:
    """That `folder` is new, or holds a run like this one."""
    path = folder / "run.json"
    about = json.loads(json.dumps(about))
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: damaged ({error}); remove {folder} to start again") from error
        differ = [name for name in sorted({*before, *about}) if before.get(name) != about.get(name)]
        if differ:
            changes = ", ".join(f"{name} {before.get(name)} and not {about.get(name)}" for name in differ)
            raise ValueError(f"{folder} holds the statistics of another run ({changes}); give another folder")
    _wait("jaxgen_statistics_checked")
    if jax.process_index() == 0 and not path.exists():
        write_json(path, about)


def _wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def sample_statistics(
    recipe,
    params: Mapping[str, Any],
    key: jax.Array,
    labels: Int[np.ndarray, "n"],
    network,
    variables: Any,
    *,
    batch_size: int,
    folder: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    keep: int = KEEP,
    split: int = SPLIT,
    save_every_s: float = 60.0,
    log: Callable[[str], None] = lambda line: None,
) -> ImageStats:
    """Statistics of one sample for each label. The samples are those of `evaluation.sample_many` with equal batches.

    Args:
      recipe: its `sample` makes images.
      params: by stage, on the mesh.
      key: of the samples.
      labels: in an order that mixes the classes: the inception score is taken over runs of `split` of them.
      network, variables: what reads the samples, see `observe`.
      batch_size: samples made at a time, over all processes.
      folder, mesh, keep, split, save_every_s: see `Collector`.
      settings: of the sampler.
      about: what else has to be equal when the run goes on, such as the checkpoint's step.
      log: takes progress lines.

    Raises:
      ValueError: no labels, batches of less than 1, batches that the mesh does not divide, or see `Collector`.
    """
    labels, settings = np.asarray(labels), dict(settings or {})
    if batch_size < 1 or not len(labels):
        raise ValueError(f"{len(labels)} labels in batches of {batch_size}: expected at least 1 of each")
    about = {
        "batch_size": batch_size,
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "labels": labels.tolist(),
        "settings": settings,
        **(about or {}),
    }
    options = dict(mesh=mesh, keep=keep, split=split, save_every_s=save_every_s)
    collector = Collector(network, variables, len(labels), folder, about, **options)
    starts = range(0, len(labels), batch_size)
    progress = Progress("sampling", 0, len(starts), 5.0, log if jax.process_index() == 0 else lambda line: None)
    for number, start in enumerate(starts):
        index = np.arange(start, start + batch_size)
        index[index >= len(labels)] = -1
        if collector.missing(index):
            padded = np.resize(labels[start : start + batch_size], batch_size)
            out = sample_batch(recipe, params, jax.random.fold_in(key, number), padded, mesh=mesh, **settings)
            collector.add(out["images"], index)
        progress.update(number + 1, {"images": float(min(start + batch_size, len(labels)))})
    return collector.finish()


def sample_quality(
    recipe, params, key, network, variables, reference: Reference, *, num: int, batch_size: int, k: int = 3, **options
) -> dict[str, Any]:
    """FID and all else that `metrics.image_scores` finds, of samples spread evenly over the classes.

    Args:
      recipe: its configuration has `num_classes`.
      reference: of the real images: `metrics.read_reference`, `data_reference` or `npz_reference`.
      num: samples; 50,000 in papers. Distances of different numbers cannot be compared.
      k: see `metrics.image_scores`.
      options: and the other arguments, see `sample_statistics`.

    Example:
      >>> network, variables = jaxgen.interop.inception.load("pt_inception-2015-12-05-6726825d.pth")
      >>> reference = npz_reference("VIRTUAL_imagenet256_labeled.npz", network, variables)
      >>> sample_quality(recipe, params, jax.random.key(0), network, variables, reference, num=50_000, batch_size=256,
      ...                folder=workdir / "quality", mesh=mesh, settings={"cfg": 1.5})["fid"]
    """
    classes = recipe.config.num_classes
    if num < classes:
        raise ValueError(f"num={num}: at least one sample for each of the {classes} classes")
    # Classes take turns, so that each split of the inception score has all of them.
    labels = np.arange(num, dtype=np.int32) % classes
    stats = sample_statistics(recipe, params, key, labels, network, variables, batch_size=batch_size, **options)
    return image_scores(stats, reference, k=k)


def data_reference(
    data: DataConfig,
    network,
    variables: Any,
    *,
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 128,
    folder: str | os.PathLike | None = None,
    keep: int = KEEP,
    log: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The reference that a data set's own images make; each host reads its share of them, with its own devices.

    Images are cut to squares as they are for held-out data, without the margin of `data.mid_scale`. `Reference.save` keeps it.

    Args:
      data: the images.
      network, variables: what reads them, see `observe`.
      split: "train" or "test".
      limit: the first so many in the data's fixed order; all if left out.
      batch_size: images read at a time on each host; rounded up to a multiple of its devices.
      folder, keep: see `Collector`.
      log: takes progress lines.
    """
    data = dataclasses.replace(data, mid_scale=1.0)
    source = make_source(data, split)
    count = len(source) if limit is None else min(limit, len(source))
    host, hosts = jax.process_index(), jax.process_count()

    def numbered() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for batch in batches(source, data, batch_size=batch_size * hosts, train=False, shard_index=host, shard_count=hosts):
            images = batch["image"]
            index = start * hosts + host * len(images) + np.arange(len(images))
            yield images, np.where(index < count, index, -1)
            start += len(images)
            if start * hosts >= count:
                return

    about = {"data": str(data.path), "split": split, "image_size": data.image_size, "channels": data.channels, "seed": data.seed}
    return _reference(numbered(), count, network, variables, batch_size, folder, about, keep, log)


def npz_reference(
    path: str | os.PathLike,
    network,
    variables: Any,
    *,
    batch_size: int = 128,
    folder: str | os.PathLike | None = None,
    keep: int = KEEP,
    log: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The reference in an npz file of guided-diffusion or pytorch-fid: its statistics, and features of the images beside them.

    Published statistics are of more images than the file holds; those it holds serve precision and recall. Without statistics,
    the images' own are taken.

    Raises:
      ValueError: the file has neither statistics nor images.
    """
    images = npz_count(path)
    if not images:
        return read_reference(path)

    def numbered() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        start = 0
        for part in npz_images(path, batch_size):
            index = start + np.arange(len(part))
            # All hosts read the file; each keeps its own batches.
            yield part, np.where(index // batch_size % jax.process_count() == jax.process_index(), index, -1)
            start += len(part)

    about = {"reference": str(path)}
    own = _reference(numbered(), images, network, variables, batch_size, folder, about, keep, log)
    with np.load(path) as file:
        has_statistics = "mu" in file.files
    return dataclasses.replace(read_reference(path), features=own.features) if has_statistics else own


def _reference(
    parts: Iterable[tuple[UInt8[np.ndarray, "b H W c"], np.ndarray]],
    count: int,
    network,
    variables: Any,
    batch_size: int,
    folder: str | os.PathLike | None,
    about: Mapping[str, Any],
    keep: int,
    log: Callable[[str], None],
) -> Reference:
    """Statistics of this host's numbered images and the other hosts'."""
    mesh = make_mesh(devices=jax.local_devices())
    size = -(-batch_size // len(jax.local_devices())) * len(jax.local_devices())
    collector = Collector(network, variables, count, folder, about, mesh=mesh, keep=keep)
    total = -(-count // (batch_size * jax.process_count()))
    progress = Progress("reference", 0, total, 5.0, log if jax.process_index() == 0 else lambda line: None)
    for number, (images, index) in enumerate(parts):
        if collector.missing(index):
            padding = [(0, size - len(images)), *[(0, 0)] * 3]
            collector.add(np.pad(images, padding), np.pad(index, (0, size - len(index)), constant_values=-1))
        progress.update(number + 1, {"images": float(min((number + 1) * batch_size * jax.process_count(), count))})
    return collector.finish().reference()
