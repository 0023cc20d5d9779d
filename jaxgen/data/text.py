"""Text as bytes: files, the split, and batches of windows."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os
import zlib

import grain
import numpy as np
from jaxtyping import Int, UInt8

from jaxgen.data.shards import READ, check_shards, one_pass, share
from jaxgen.data.sources import check_split

__all__ = ["TextConfig", "decode_bytes", "encode_bytes", "read_text", "text_batches"]


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Which text, and how it becomes examples.

    Attributes:
      path: a text file, plain or `.gz`, several with commas between; or "python", the manual that Python brings along
        (`pydoc_data.topics`, half a million bytes of English).
      test_path: the held-out text; where it is empty, the last tenth of `path` is held out.
      length: tokens of an example that are predicted; an example has one more.
      seed: of order and offsets.

    Raises:
      ValueError: a field out of range.
    """

    path: str = "python"
    test_path: str = ""
    length: int = 128
    seed: int = 0

    def __post_init__(self):
        if not self.path:
            raise ValueError("data.path='': expected a file or 'python'")
        for name, least in (("length", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected at least {least}")


def read_text(config: TextConfig, split: str) -> UInt8[np.ndarray, "n"]:
    """All bytes of a split.

    Raises:
      ValueError: an unknown split, a file that cannot be read, or less text than one example.
    """
    check_split(split)
    if config.test_path:
        data = _read(config.path if split == "train" else config.test_path)
    else:
        data = _read(config.path)
        cut = len(data) - len(data) // 10
        data = data[:cut] if split == "train" else data[cut:]
    if len(data) < config.length + 1:
        raise ValueError(f"data.path={config.path!r}: {len(data)} bytes of {split} text; data.length={config.length} needs more")
    return data


@functools.lru_cache(maxsize=4)
def _read(path: str) -> UInt8[np.ndarray, "n"]:
    if path == "python":
        from pydoc_data.topics import topics

        return np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    parts = []
    for name in path.split(","):
        if not os.path.isfile(name):
            raise ValueError(f"data.path={name!r}: no such file")
        try:
            with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file:
                parts.append(np.frombuffer(file.read(), np.uint8))
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"data.path={name!r}: cannot be read ({error})") from error
    return np.concatenate(parts)


def text_batches(
    config: TextConfig, split: str, *, batch_size: int, train: bool, shard_index: int = 0, shard_count: int = 1
) -> grain.IterDataset:
    """One host's share of the batches {"tokens": int32 [b, length + 1]}.

    Training goes on for ever: one random order of windows after another, each window moved by a random offset below its length.
    Otherwise there is one pass over all whole windows, in order. As with images, global batches do not depend on the number of
    hosts, and iterators save and restore their place.

    Raises:
      ValueError: see `read_text`; a batch size that `shard_count` does not divide, or a shard index out of range.

    Example:
      >>> next(iter(text_batches(TextConfig(length=16), "train", batch_size=2, train=True)))["tokens"].shape
      (2, 17)
    """
    check_shards(batch_size, shard_index, shard_count)
    data, length = read_text(config, split), config.length
    windows = (len(data) - 1) // length
    ds = grain.MapDataset.range(windows)
    if train:
        ds = ds.shuffle(seed=config.seed).repeat().random_map(_Window(data, length), seed=config.seed)
    else:
        ds = one_pass(ds.map(_Window(data, length)), shard_count)
    ds = share(ds, batch_size, shard_index, shard_count).batch(batch_size // shard_count, drop_remainder=train)
    return ds.to_iter_dataset(READ)


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """Window i, moved by a random offset in training."""

    data: UInt8[np.ndarray, "n"]
    length: int

    def __call__(self, index: int, rng: np.random.Generator | None = None) -> dict[str, Int[np.ndarray, "l"]]:
        start = index * self.length
        if rng is not None:
            start = min(start + int(rng.integers(self.length)), len(self.data) - self.length - 1)
        return {"tokens": self.data[start : start + self.length + 1].astype(np.int32)}


def encode_bytes(texts: list[str | bytes]) -> tuple[Int[np.ndarray, "b p"], Int[np.ndarray, "b"]]:
    """(tokens, lengths) of prompts, left-aligned.

    Raises:
      ValueError: an empty prompt.
    """
    raw = [text.encode() if isinstance(text, str) else bytes(text) for text in texts]
    if not raw or not all(raw):
        raise ValueError(f"prompts {texts!r}: each needs at least one byte")
    tokens = np.zeros((len(raw), max(map(len, raw))), np.int32)
    for row, text in zip(tokens, raw):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return tokens, np.array([len(text) for text in raw], np.int32)


def decode_bytes(tokens: Int[np.ndarray, "b s"], lengths: Int[np.ndarray, "b"]) -> list[str]:
    """Texts of sampled bytes; what is no UTF-8 becomes U+FFFD."""
    return [bytes(row[:n].astype(np.uint8)).decode(errors="replace") for row, n in zip(np.asarray(tokens), np.asarray(lengths))]
