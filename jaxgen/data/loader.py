"""From a data configuration to batches: which data, in which order, on which host."""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags
from jaxtyping import Array, Float

from jaxgen.data.captions import Captioned
from jaxgen.data.folder import folder, leave_out_unreadable, stamp
from jaxgen.data.shard_set import ShardSource, find_shards, shard_source
from jaxgen.data.shards import READ, check_shards, one_pass, share
from jaxgen.data.sources import ArraySource, EncodedSource, Example, Source, check_split, decode, digits, npz
from jaxgen.data.transforms import Preprocess, pixels
from jaxgen.data.world import World
from jaxgen.data.world_scene import WorldConfig

__all__ = ["DataConfig", "Pictures", "batches", "image_batches", "info", "make_source", "read_image", "stream"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they become examples.

    Attributes:
      path: "digits" for scikit-learn's handwritten digits, "world" for coloured shapes (one in each picture, drawn at
        `image_size`, see `world.World`), an `.npz` file (see `sources.npz`), shards (tar, parquet or ArrayRecord files: one, a
        pattern with `*`, or a folder of them, see `shard_set.shard_source`), or a folder of images (see `folder.folder`; one
        that is called digits is "./digits").
      image_size: side of the squares that a model sees; 0 keeps images as they are, which must then have one size (the world's
        is 32).
      channels: 1 or 3; images are converted.
      flip: mirror half of the training images.
      mid_scale: the shorter side is resized to round(mid_scale * image_size) before the crop, which is random in
        training and central otherwise. VAR was trained with 1.125.
      skip_bad: leave out damaged shards, and images that cannot be decoded; otherwise the first one met is an error.
      seed: of order, crops and flips.
      workers: processes that make batches; 0 makes them in this process. The batches are the same.
      captions: bytes of a caption; 0 does without. Batches then have "caption", too: what an npz file's `caption` or `name` says,
        a text or `metadata.jsonl` beside images in folders, a text in shards, or the world (see `captions.Captioned`).
        Mirrored images keep theirs.
      cut_captions: longer ones lose their end; otherwise they are an error.
      tokens: a token cache of these images (see `token_cache.write_tokens`), in its folders `train` and `test`: generators are
        trained from it. Empty encodes the images in every step.

    Raises:
      ValueError: a field out of range.
    """

    path: str = "digits"
    image_size: int = 0
    channels: int = 3
    flip: bool = False
    mid_scale: float = 1.0
    skip_bad: bool = False
    seed: int = 0
    workers: int = 0
    captions: int = 0
    cut_captions: bool = False
    tokens: str = ""

    def __post_init__(self):
        def check(field: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"data.{field}={getattr(self, field)!r}: must be {expected}")

        check("path", isinstance(self.path, str) and bool(self.path), "a path, 'digits' or 'world'")
        check("tokens", isinstance(self.tokens, str), "a path")
        for field in ("image_size", "seed", "workers", "captions"):
            check(field, _is_int(getattr(self, field)) and getattr(self, field) >= 0, "an integer >= 0")
        check("channels", _is_int(self.channels) and self.channels in (1, 3), "1 or 3")
        for field in ("flip", "skip_bad", "cut_captions"):
            check(field, isinstance(getattr(self, field), bool), "true or false")
        scale = self.mid_scale
        check("mid_scale", isinstance(scale, int | float) and math.isfinite(scale) and scale >= 1, "a number >= 1")
        check("mid_scale", self.image_size > 0 or scale == 1, "1 without data.image_size")

    def or_drawn(self) -> DataConfig:
        """This, or the world's pictures where there is nothing at the path: for what needs shapes alone."""
        if self.path in ("digits", "world") or os.path.exists(self.path) or find_shards(self.path) is not None:
            return self
        return dataclasses.replace(self, path="world")


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


class Pictures(Protocol):
    """What stages of images train on, if it is not a `DataConfig`: clips, or their frames.

    Attributes:
      channels: of a picture.
      tokens: "", see `DataConfig`.
    """

    channels: int
    tokens: str

    def batches(self, split: str, *, batch_size: int, train: bool, shard_index: int, shard_count: int) -> grain.IterDataset:
        """{"image": uint8 [b, ..., H, W, C], "label": int32 [b]}; arguments as in `batches`."""


def make_source(config: DataConfig, split: str) -> Source:
    """The images that `config.path` names.

    Args:
      config: `path` and `skip_bad` are used, and `image_size` where pictures are drawn.
      split: "train" or "test". Data without a test part has some of each class held out, the same ones in every run.

    Raises:
      ValueError: an unknown split, nothing at the path, or data that cannot be used (see `npz` and `folder`).

    Example:
      >>> len(make_source(DataConfig(path="digits"), "train"))
      1498
    """
    check_split(split)
    path = config.path
    if path == "digits":
        return digits(split)
    if path == "world":
        side = config.image_size or WorldConfig.height
        return World(WorldConfig(height=side, width=side), split)
    found = find_shards(path)
    if found is not None:
        return _shards(path, split, config.skip_bad, tuple(stamp(name) for name in found[1]))
    if os.path.isdir(path):
        source = folder(path, split)
        return leave_out_unreadable(source) if config.skip_bad else source
    if not os.path.exists(path):
        raise ValueError(f"data.path={path!r}: no such file or folder")
    if not path.lower().endswith(".npz"):
        raise ValueError(f"data.path={path!r}: neither an .npz file, nor shards, nor a folder")
    return _npz(path, split, config.skip_bad, stamp(path))


# A run opens its data once for each stage; they share one copy while the file stays as it is.
@functools.lru_cache(maxsize=2)
def _npz(path: str, split: str, skip_bad: bool, stamp: tuple[int, int]) -> ArraySource | EncodedSource:
    source = npz(path, split)
    return leave_out_unreadable(source) if skip_bad and isinstance(source, EncodedSource) else source


@functools.lru_cache(maxsize=2)
def _shards(path: str, split: str, skip_bad: bool, stamps: tuple[tuple[int, int], ...]) -> ShardSource:
    source = shard_source(path, split, skip_bad=skip_bad)
    return leave_out_unreadable(source) if skip_bad else source


def info(config: DataConfig) -> dict[str, Any]:
    """What a model must know of its data.

    Returns:
      `num_classes`, `class_names` (a tuple or None), `image_shape` (H, W, C) as in a batch, and the numbers of images
      `n_train` and `n_test`.

    Raises:
      ValueError: as `make_source`.
    """
    train, test = make_source(config, "train"), make_source(config, "test")
    size = (config.image_size,) * 2 if config.image_size else train[0]["image"].shape[:2]
    return {
        "num_classes": train.num_classes,
        "class_names": train.class_names,
        "image_shape": (*size, config.channels),
        "n_train": len(train),
        "n_test": len(test),
    }


def batches(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    train: bool,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.IterDataset:
    """One host's share of the batches {"image": uint8 [b, H, W, C], "label": int32 [b]}, with `config.captions` also "caption",
    uint8 [b, captions].

    Training goes on for ever: one random order after another, cut into global batches, of which each host gets its rows
    (see `shards.share`). So the global batches, crops and flips included, are the same for any number of hosts.

    Otherwise there is one pass, in one random order, so that the first few batches are a fair sample; the last batch
    may be smaller. Several hosts must make equally many batches of equal sizes: if `shard_count` does not divide the
    number of examples, the order starts again, and at most shard_count - 1 examples come twice.

    Iterators have grain's `get_state` and `set_state` (a JSON-ready dict that does not depend on `config.workers`), and
    so can be saved with `grain.checkpoint.CheckpointSave`; they continue exactly. `close` ends their threads or
    processes.

    Args:
      source: the images.
      config: all but `path` and `skip_bad` are used.
      batch_size: global; a host's batches have `batch_size // shard_count` examples.
      train: endless and augmented, or one pass without augmentation.
      shard_index: this host's number.
      shard_count: number of hosts.

    Raises:
      ValueError: a batch size that `shard_count` does not divide, a shard index out of range, no examples; while
        iterating, an image that cannot be decoded, or, without `config.image_size`, one of another size than the first; with
        `config.captions` a source without them, and see `captions.caption_bytes`.

    Example:
      >>> config = DataConfig(path="digits", channels=1)
      >>> it = iter(batches(make_source(config, "train"), config, batch_size=8, train=True))
      >>> next(it)["image"].shape
      (8, 8, 8, 1)
    """
    fields = ("channels", "image_size", "mid_scale", "flip")
    preprocess = Preprocess(train=train, **{field: getattr(config, field) for field in fields})
    source = Captioned(source, config.captions, config.cut_captions) if config.captions else source
    source = source if config.image_size or not len(source) else _OneSize(source)
    part = dict(batch_size=batch_size, train=train, shard_index=shard_index, shard_count=shard_count)
    return stream(source, preprocess, random=preprocess.random, seed=config.seed, workers=config.workers, **part)


def image_batches(
    data: DataConfig | Pictures, batch_size: int, split: str, shard_index: int, shard_count: int, *, endless: bool | None = None
):
    """Batches of images and labels for a stage: endless ones of the training split, one pass over any other.

    Args:
      data: a configuration, or what makes its own batches.
      batch_size, shard_index, shard_count: see `batches`.
      split: "train" or "test".
      endless: whether they are, and augmented; None is as above.
    """
    part = dict(batch_size=batch_size, train=split == "train" if endless is None else endless)
    part |= dict(shard_index=shard_index, shard_count=shard_count)
    if isinstance(data, DataConfig):
        return batches(make_source(data, split), data, **part)
    return data.batches(split, **part)


def stream(
    source: Any,
    transform: Callable[..., dict[str, Any]],
    *,
    random: bool,
    seed: int,
    batch_size: int,
    train: bool,
    shard_index: int = 0,
    shard_count: int = 1,
    workers: int = 0,
) -> grain.IterDataset:
    """What `batches` does, of examples of any kind: dicts of arrays of equal shapes and of integers.

    Args:
      source: random access to examples.
      transform: of an example, and of a random generator where `random`.
      random: whether the transform is; its numbers come from the example's place in the global order.
      seed: of the order and the transform.
      workers: processes that make batches.

    Raises:
      ValueError: no examples, or see `batches`.
    """
    if not len(source):
        raise ValueError("the source has no images")
    check_shards(batch_size, shard_index, shard_count)

    order_seed, transform_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    ds = grain.MapDataset.source(source).shuffle(seed=order_seed)
    if train:
        ds = ds.repeat()
    else:
        ds = one_pass(ds, shard_count)
    ds = ds.random_map(transform, seed=transform_seed) if random else ds.map(transform)
    # After the random transforms: their numbers come from the place in the global order.
    ds = share(ds, batch_size, shard_index, shard_count)
    ds = ds.batch(batch_size // shard_count, drop_remainder=train, batch_fn=_stack)
    return _WorkerBatches(ds, workers) if workers else ds.to_iter_dataset(READ)


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    def join(values):
        return np.array(values, np.int32) if isinstance(values[0], int) else np.stack(values)

    return {name: join([example[name] for example in examples]) for name in examples[0]}


class _OneSize:
    """A source that says which image has another size than the first."""

    def __init__(self, source: Source):
        self._source = source
        self._size = source[0]["image"].shape[:2]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        size = example["image"].shape[:2]
        if size != self._size:
            first, name = self._source.name(0), self._source.name(index)
            raise ValueError(f"{name}: size {size} differs from {self._size} of {first}; set data.image_size")
        return example


class _WorkerBatches(grain.IterDataset):
    """Batches made by processes, in order.

    Grain's own iterator over processes has a state for each of them; this one counts batches, so that a checkpoint
    restores with another number of workers, or none.
    """

    def __init__(self, parent: grain.MapDataset, workers: int):
        super().__init__(parent)
        self._workers = workers

    def __iter__(self) -> _WorkerIterator:
        return _WorkerIterator(self._parent, self._workers)


# grain 0.2.18 asks for this flag's value even in programs that never parse absl flags, and fails (google/grain#1355).
PROFILING_FLAG = "grain_enable_multiprocess_worker_profiling"


def _give_default(flag: str) -> None:
    """Lets an absl flag that has not been parsed be read as its default."""
    if flag in flags.FLAGS and not flags.FLAGS.is_parsed():
        flags.FLAGS[flag].present = 1


class _WorkerIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.MapDataset, workers: int):
        super().__init__()
        self._map_parent, self._workers = parent, workers
        self._next, self._reader = 0, None

    def start_prefetch(self) -> None:
        if self._reader is None:
            _give_default(PROFILING_FLAG)
            ds = self._map_parent[self._next :].to_iter_dataset(READ)
            self._reader = iter(ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers)))
            # A program may end without `close`: before multiprocessing and grain take down what this still uses.
            self._close_reader = multiprocessing.util.Finalize(self, self._reader.close, exitpriority=10)

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._reader)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._next = state["next_index"]

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._reader is not None:
            self._close_reader()
            self._reader = None


def read_image(path: str, config: DataConfig) -> Float[Array, "H W C"]:
    """One image file, prepared as `config` prepares held-out images, in [-1, 1].

    Raises:
      ValueError: the file is missing or no image.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error.strerror}") from error
    preprocess = Preprocess(channels=config.channels, image_size=config.image_size)
    return pixels(preprocess({"image": decode(data, path), "label": 0})["image"])
