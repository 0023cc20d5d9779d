"""A data set's tokens, encoded once with a frozen tokenizer: generators are then trained without it.

A cache is a folder of `index.json`, which says how it was made, and of shards of `per_shard` examples: `tokens-00000.npy`
[n, views, ...], `views-00000.npy` [n, views, 3] (top, left, flip: what of each image was seen), `labels-00000.npy` [n] and, where
captions are asked for, `captions-00000.npy` [n, bytes]. Shards are mapped, not read, and every one is written by one host and has
its name only when it is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from jaxgen.data.captions import Captioned
from jaxgen.data.loader import DataConfig, stream
from jaxgen.data.sources import Source
from jaxgen.data.transforms import Preprocess
from jaxgen.storage import on_disk

__all__ = ["TokenSource", "digest", "token_batches", "write_tokens"]

INDEX, VERSION = "index.json", 1


def digest(params: Any) -> str:
    """A number in hexadecimals that changes when a parameter does: of names, shapes, types and values.

    Args:
      params: a tree of arrays that this host has whole.
    """
    found = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, x in sorted((jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(x)) for path, x in leaves):
        found.update(f"{path} {x.dtype} {x.shape};".encode())
        found.update(x.tobytes())
    return found.hexdigest()


def write_tokens(
    folder: str | os.PathLike,
    source: Source,
    config: DataConfig,
    encode: Callable[[np.ndarray], Any],
    *,
    tokenizer: str,
    train: bool,
    vocab: int = 0,
    views: int = 1,
    batch_size: int = 64,
    per_shard: int = 4096,
    process_index: int = 0,
    process_count: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Encodes what is not yet encoded of this host's share: every `process_count`-th shard.

    View v of example i is always the same crop and flip: they are drawn from (config.seed, i, v).

    Args:
      folder: of the cache; the same for all hosts.
      source: the images.
      config: how they are prepared: `image_size`, `channels`, and in training `mid_scale` and `flip`; `captions` of them.
      encode: uint8 [batch_size, H, W, C] to tokens [batch_size, ...], integers or floats.
      tokenizer: `digest` of what `encode` encodes with.
      train: crop and flip at random, as training does, or see the middle once.
      vocab: tokens are below this, and take 2 bytes where that is enough; 0 keeps `encode`'s type.
      views: crops and flips of each image; training sees one of them at a time.
      batch_size: images encoded at a time; the last batch of a shard is filled up, so that nothing is recompiled.
      per_shard: examples in a shard. Not more than what may be lost by an interruption.
      process_index, process_count: this host, and how many there are. They may change when the work goes on.
      log: takes a line every few seconds.

    Raises:
      ValueError: a folder in a bucket, numbers out of range, several views without random crops or flips, a folder with a cache
        that was made otherwise, or tokens that are not below `vocab`.
    """
    fields = ("channels", "image_size", "mid_scale", "flip")
    preprocess = Preprocess(train=train, **{field: getattr(config, field) for field in fields})
    for name, value in (("views", views), ("batch_size", batch_size), ("per_shard", per_shard)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must be in [0, process_count={process_count})")
    if views > 1 and not preprocess.random:
        raise ValueError(f"views={views}: without random crops or flips all of them are the same")
    captions = dict(captions=config.captions) if config.captions else {}
    source = Captioned(source, config.captions, config.cut_captions) if captions else source
    about = captions | {
        "version": VERSION,
        "tokenizer": tokenizer,
        "vocab": vocab,
        "examples": len(source),
        "num_classes": source.num_classes,
        "class_names": list(source.class_names) if source.class_names else None,
        "views": views,
        "per_shard": per_shard,
        "seed": config.seed,
        "transform": dataclasses.asdict(preprocess),
    }
    folder = on_disk(folder, "a token cache")
    folder.mkdir(parents=True, exist_ok=True)
    _plan(folder, about, write=process_index == 0)
    shards = range(process_index, -(-len(source) // per_shard), process_count)
    last, writer = time.monotonic(), _Writer(source, preprocess, encode, about, batch_size)
    for done, number in enumerate(shards):
        if not _name(folder, "tokens", number).exists():
            writer.write(folder, number)
        if time.monotonic() - last > 5 or number == shards[-1]:
            last = time.monotonic()
            log(f"encoded {done + 1} of {len(shards)} shards of {per_shard} images")


def _plan(folder: Path, about: dict[str, Any], *, write: bool) -> None:
    """That the cache in `folder` is one like this, or new."""
    path = folder / INDEX
    if path.exists():
        before = _read_index(folder)
        differ = [name for name in sorted({*before, *about}) if before.get(name) != about.get(name)]
        if differ:
            changes = ", ".join(f"{name} {before.get(name)} and not {about.get(name)}" for name in differ)
            raise ValueError(f"{folder} holds another cache ({changes}); give another folder")
    elif write:
        temporary = path.with_name(f"{INDEX}.tmp")
        temporary.write_text(json.dumps(about, indent=2) + "\n")
        os.replace(temporary, path)


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / INDEX).read_text())
    except OSError as error:
        raise ValueError(f"{folder}: no token cache ({INDEX}: {error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{folder / INDEX}: damaged ({error})") from error
    if about.get("version") != VERSION:
        raise ValueError(f"{folder}: a token cache of version {about.get('version')}; this program reads version {VERSION}")
    return about


def _name(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.npy"


@dataclasses.dataclass(frozen=True, eq=False)
class _Writer:
    """Encodes shards."""

    source: Source
    preprocess: Preprocess
    encode: Callable[[np.ndarray], Any]
    about: dict[str, Any]
    batch_size: int

    def write(self, folder: Path, number: int) -> None:
        """One shard; its tokens get their name last, and only then does it count."""
        views, per_shard = self.about["views"], self.about["per_shard"]
        examples = range(number * per_shard, min((number + 1) * per_shard, len(self.source)))
        places = [(i, v) for i in examples for v in range(views)]
        tokens, seen, beside = [], [], {"labels": []} | ({"captions": []} if "captions" in self.about else {})
        for start in range(0, len(places), self.batch_size):
            batch = [self._look(i, v) for i, v in places[start : start + self.batch_size]]
            images = np.stack([example["image"] for example, _ in batch])
            filled = np.concatenate([images, np.repeat(images[-1:], self.batch_size - len(images), axis=0)])
            tokens.append(self._checked(np.asarray(self.encode(filled))[: len(batch)]))
            seen += [view for _, view in batch]
            for name, values in beside.items():
                values += [example[name.removesuffix("s")] for example, _ in batch]
        n = len(examples)
        joined = np.concatenate(tokens)
        for name, values in beside.items():
            _save(_name(folder, name, number), np.array(values, np.int32 if name == "labels" else np.uint8)[::views])
        _save(_name(folder, "views", number), np.array(seen, np.int32).reshape(n, views, 3))
        _save(_name(folder, "tokens", number), joined.reshape(n, views, *joined.shape[1:]))

    def _look(self, example: int, view: int):
        rng = np.random.default_rng([self.about["seed"], example, view]) if self.preprocess.random else None
        return self.preprocess.look(self.source[example], rng)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        vocab = self.about["vocab"]
        if not vocab:
            return tokens
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab:
            low, high = tokens.min(), tokens.max()
            raise ValueError(f"tokens {tokens.dtype} from {low} to {high}: expected integers below vocab={vocab}")
        return tokens.astype(np.uint16 if vocab <= 2**16 else np.int32)


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSource:
    """Random access to a cache: `source[i]` has "tokens" [views, ...], "view" [views, 3] (top, left, flip), "label" and, where
    there are captions, "caption" [bytes].

    Args:
      folder: of a cache of which all shards are there.
      tokenizer: `digest` of the tokenizer that the tokens are to be decoded with; None does not ask.

    Raises:
      ValueError: no cache, one in a bucket, shards that are missing, or one that was made with another tokenizer.
    """

    folder: str
    tokenizer: str | None = None

    def __post_init__(self):
        folder, about = self._folder, self._about
        if self.tokenizer not in (None, about["tokenizer"]):
            theirs, ours = about["tokenizer"][:12], self.tokenizer[:12]
            raise ValueError(f"{self.folder} holds tokens of a tokenizer {theirs}, and not of this one, {ours}: encode again")
        shards = -(-about["examples"] // about["per_shard"])
        missing = [i for i in range(shards) if not _name(folder, "tokens", i).exists()]
        if missing:
            first = missing[0]
            raise ValueError(f"{self.folder}: {len(missing)} of {shards} shards are missing, such as {first}; go on encoding")
        # Read here: numpy reads headers with `ast`, which threads of Python 3.11 must not do at the same time.
        _ = self._layout

    @functools.cached_property
    def _layout(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of an example's arrays, which are the same in all shards."""
        found = {}
        for kind in self._kinds:
            path = _name(self._folder, kind, 0)
            try:
                array = np.load(path, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{path}: damaged ({error}); remove it and go on encoding") from error
            found[kind] = array.dtype, array.shape[1:]
        return found

    @property
    def captions(self) -> int:
        """Bytes of a caption; 0 where there are none."""
        return self._about.get("captions", 0)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("tokens", "views", "labels", *(("captions",) if self.captions else ()))

    @functools.cached_property
    def _folder(self) -> Path:
        return on_disk(self.folder, "a token cache")

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        return _read_index(self._folder)

    @property
    def num_classes(self) -> int:
        return self._about["num_classes"]

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self._about["class_names"]
        return tuple(names) if names else None

    @property
    def views(self) -> int:
        """Of each example."""
        return self._about["views"]

    def __len__(self) -> int:
        return self._about["examples"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = divmod(index, self._about["per_shard"])
        parts = {kind: self._array(kind, shard)[row] for kind in self._kinds}
        example = {"tokens": parts["tokens"], "view": parts["views"], "label": int(parts["labels"])}
        return example | ({"caption": np.asarray(parts["captions"])} if self.captions else {})

    def name(self, index: int) -> str:
        return f"{self.folder}[{index}]"

    def _array(self, kind: str, shard: int) -> np.ndarray:
        dtype, shape = self._layout[kind]
        rows = min(self._about["per_shard"], len(self) - shard * self._about["per_shard"])
        return _mapped(str(_name(self._folder, kind, shard)), dtype, (rows, *shape))


@functools.lru_cache(maxsize=256)
def _mapped(path: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A shard's array behind its header, whose size is a multiple of 64; what is not looked at is not read."""
    try:
        offset = os.path.getsize(path) - dtype.itemsize * int(np.prod(shape))
        if offset < 64 or offset % 64:
            raise ValueError(f"expected {dtype} {shape}")
        return np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it and go on encoding") from error


def token_batches(
    source: TokenSource,
    *,
    batch_size: int,
    train: bool,
    seed: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
    workers: int = 0,
) -> grain.IterDataset:
    """One host's share of the batches {"tokens": [b, ...], "view": int32 [b, 3], "label": int32 [b]}, as `loader.batches`.

    In training each example shows a view drawn at random, otherwise its first. Integer tokens are int32.
    """
    share = dict(batch_size=batch_size, train=train, shard_index=shard_index, shard_count=shard_count)
    random = train and source.views > 1
    return stream(source, _one_view, random=random, seed=seed, workers=workers, **share)


def _one_view(example: dict[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
    view = 0 if rng is None else int(rng.integers(len(example["tokens"])))
    tokens = np.asarray(example["tokens"][view])
    tokens = tokens.astype(np.int32) if tokens.dtype.kind in "iu" else tokens
    return {**example, "tokens": tokens, "view": np.asarray(example["view"][view])}
