"""Generators that are trained from a token cache, and the making of one with a recipe's frozen tokenizer."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxgen.data import DataConfig, Pictures, image_batches, make_source, pixels
from jaxgen.data.token_cache import TokenSource, digest, token_batches, write_tokens
from jaxgen.hosts import to_host
from jaxgen.recipe import modules
from jaxgen.train import batch_sharding, make_mesh, replicated

__all__ = ["cache_tokens", "check_codes", "check_no_cache", "code_batches", "codes"]


def cache_tokens(
    config: Any,
    params: Mapping[str, Any],
    folder: str | os.PathLike,
    *,
    splits: Sequence[str] = ("train", "test"),
    views: int = 1,
    batch_size: int = 64,
    per_shard: int = 4096,
    log: Callable[[str], None] = print,
) -> None:
    """Encodes a configuration's data into `folder/train` and `folder/test`; `data.tokens=folder` then trains from them.

    Every process encodes its share on its own devices. Called again, with any number of processes, it goes on.

    Args:
      config: has `data` and `build_tokenizer()`.
      params: by stage, with the tokenizer's.
      folder: see `token_cache.write_tokens`, for the other arguments, too.
      splits: which parts.
      views: of each training image; test images are seen once.

    Raises:
      ValueError: data that are not images, or see `write_tokens`.

    Example:
      >>> recipe, params = cli.open_workdir("runs/tokenizer")
      >>> cache_tokens(recipe.config, params, "imagenet_tokens", views=10, batch_size=256)
    """
    if not isinstance(config.data, DataConfig):
        raise ValueError(f"data of type {type(config.data).__name__}: tokens are cached of images alone")
    tokenizer, variables = config.build_tokenizer(), to_host(modules(params).get("tokenizer", {}))
    devices = jax.local_devices()
    mesh = make_mesh(devices=devices)
    batch_size = -(-batch_size // len(devices)) * len(devices)
    here = jax.device_put(variables, replicated(mesh))

    @jax.jit
    def encode(variables, images):
        return tokenizer.apply(variables, pixels(images), method="encode")

    name = digest(variables)
    for split in splits:
        write_tokens(
            os.path.join(folder, split),
            make_source(config.data, split),
            config.data,
            lambda images: encode(here, jax.device_put(images, batch_sharding(mesh))),
            tokenizer=name,
            train=split == "train",
            vocab=getattr(tokenizer, "vocab", 0),
            views=views if split == "train" else 1,
            batch_size=batch_size,
            per_shard=per_shard,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            log=functools.partial(_say, log, split),
        )


def _say(log: Callable[[str], None], split: str, line: str) -> None:
    if jax.process_index() == 0:
        log(f"{split}: {line}")


def code_batches(data: DataConfig | Pictures, batch_size: int, split: str, shard_index: int, shard_count: int):
    """Batches for a generator: of "tokens" and labels where `data.tokens` names a cache, of images and labels otherwise.

    Raises:
      ValueError: the cache is not there, not complete or without such captions, or see `image_batches`.
    """
    if not data.tokens:
        return image_batches(data, batch_size, split, shard_index, shard_count)
    shard = dict(shard_index=shard_index, shard_count=shard_count, workers=data.workers, seed=data.seed)
    source = TokenSource(os.path.join(data.tokens, split))
    if data.captions not in (0, source.captions):
        raise ValueError(f"data.captions={data.captions}: {source.folder} has captions of {source.captions} bytes; encode again")
    return token_batches(source, batch_size=batch_size, train=split == "train", **shard)


def codes(encode: Callable[[Any, Any], Any], variables: Any, batch: Mapping[str, Any]) -> Any:
    """The tokens of a batch of `code_batches`: the cache's, or `encode(variables, images in [-1, 1])`."""
    return batch["tokens"] if "tokens" in batch else encode(variables, pixels(batch["image"]))


def check_no_cache(data: DataConfig, why: str) -> None:
    """That `data.tokens` is empty.

    Raises:
      ValueError: it is not; `why` the system cannot train from a cache.
    """
    if data.tokens:
        raise ValueError(f"data.tokens={data.tokens!r}: {why}, so that it needs the images")


def check_codes(data: DataConfig, frozen: Mapping[str, Any]) -> None:
    """That the cache `data.tokens`, if there is one, was made with the tokenizer among the trained stages `frozen`.

    Raises:
      ValueError: it was made with another, or is not complete.
    """
    if data.tokens:
        name = digest(to_host(modules(frozen).get("tokenizer", {})))
        for split in ("train", "test"):
            TokenSource(os.path.join(data.tokens, split), tokenizer=name)
