"""State dicts from and to files: `.pth`, `.pt`, `.bin`, `.ckpt`, `.safetensors` and Hugging Face folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgen.interop import torch_pickle

__all__ = ["read_checkpoint", "read_state_dict", "write_safetensors"]

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Everything a checkpoint holds: nested dicts of arrays, and the configuration or counters beside them.

    Args:
      path: a `.pth`, `.pt`, `.bin`, `.ckpt`, `.pth.tar` or `.safetensors` file, a `*.index.json` of shards, or a folder
        that holds one of the names Hugging Face gives them.

    Returns:
      The saved dict. Arrays are read-only where they are views of the file.

    Raises:
      ValueError: naming the file, if it is missing, of an unknown kind, truncated, or not a dict.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        present = [name for name in _FOLDER_FILES if os.path.isfile(os.path.join(path, name))]
        if not present:
            raise ValueError(f"{path}: the folder holds none of {', '.join(_FOLDER_FILES)}")
        return read_checkpoint(os.path.join(path, present[0]))
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    if path.endswith(".index.json"):
        return _read_shards(path)
    if path.endswith(".safetensors"):
        return _read_safetensors(path)
    if not path.endswith(_TORCH_SUFFIXES):
        raise ValueError(f"{path}: unknown extension; known: {', '.join((*_TORCH_SUFFIXES, '.safetensors'))}")
    tree = torch_pickle.load(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a dict of parameters")
    return tree


def read_state_dict(path: str | os.PathLike, key: str | Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The parameters in a checkpoint, by their published names.

    Args:
      path: as for `read_checkpoint`.
      key: where the state dict lies inside the saved dict: a key, or the keys to follow from the outside in; `None` if
        the file is the state dict itself. What lies beside it (arguments, optimizer, counters) is dropped.

    Returns:
      Name -> array, in the order of the file.

    Raises:
      ValueError: what `read_checkpoint` raises; a key that is not there (the keys that are there are listed); something
        in the chosen dict that is not a tensor; no tensors at all.

    Example:
      >>> read_state_dict("kl16.ckpt", key="model")["quant_conv.bias"].shape
      (32,)
    """
    tree = read_checkpoint(path)
    trail = (key,) if isinstance(key, str) else tuple(key or ())
    for depth, name in enumerate(trail):
        if not isinstance(tree, dict) or name not in tree:
            inside = f"[{']['.join(repr(k) for k in trail[:depth])}]" if depth else ""
            raise ValueError(f"{os.fspath(path)}: no key {name!r} in the checkpoint{inside}; {_describe(tree)}")
        tree = tree[name]
    other = [k for k, v in tree.items() if not isinstance(v, np.ndarray)] if isinstance(tree, dict) else [trail[-1]]
    if other or not tree:
        where = f" under {'.'.join(trail)!r}" if trail else ""
        found = f"other things: {_listed(other)}" if other else "nothing"
        raise ValueError(f"{os.fspath(path)}: expected tensors{where}, found {found}; {_describe(tree)}")
    return tree


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes a state dict as safetensors: first beside `path`, then moved there, so that `path` is never half a file.

    Args:
      path: ends in `.safetensors`; its folder exists.
      tensors: name -> array (numpy or jax), of any strides.
      metadata: strings for the header. PyTorch's loaders expect none; transformers wants `{"format": "pt"}`.

    Raises:
      ValueError: another extension, or the file could not be written (no such folder, full disk); an older file at
        `path` is intact.
    """
    import safetensors.numpy

    path = os.fspath(path)
    if not path.endswith(".safetensors"):
        raise ValueError(f"{path}: the name has to end in .safetensors")
    # The library writes an array's memory as it lies, so strides have to be ironed out first.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
        safetensors.numpy.save_file(contiguous, temporary, metadata=metadata)
        os.chmod(temporary, mode)  # what a new file gets here; newer versions of the library make it private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: could not be written ({error})") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: truncated or damaged safetensors file ({error})") from error


def _read_shards(path: str) -> dict[str, np.ndarray]:
    """The tensors of all the shards that an index file names, which must be the tensors it lists."""
    try:
        with open(path, encoding="utf-8") as file:
            shard_of = json.load(file)["weight_map"]
        shards = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of shards ({type(error).__name__}: {error})") from error
    out: dict[str, np.ndarray] = {}
    for shard in shards:
        if shard != os.path.basename(shard) or shard.endswith(".index.json"):
            raise ValueError(f"{path}: shard {shard!r} is not the name of a file in the same folder")
        out.update(read_checkpoint(os.path.join(os.path.dirname(path), shard)))
    if set(out) != set(shard_of):
        missing, extra = sorted(set(shard_of) - set(out)), sorted(set(out) - set(shard_of))
        raise ValueError(f"{path}: not in the shards: [{_listed(missing)}]; not in the index: [{_listed(extra)}]")
    return out


def _describe(tree: Any) -> str:
    """What a reader could have asked for instead."""
    if not isinstance(tree, dict):
        return f"it is a {type(tree).__name__}"
    inner = [name for name, value in tree.items() if isinstance(value, dict)]
    return f"its dicts: {_listed(inner)}" if inner else f"its keys: {_listed(list(tree))}"


def _listed(names: Sequence[Any], limit: int = 8) -> str:
    text = ", ".join(repr(n) for n in names[:limit])
    return f"{text} and {len(names) - limit} more" if len(names) > limit else text
