"""Reads what `torch.save` writes, without PyTorch and without running anything that the file asks for.

A checkpoint is a pickle whose tensors point at raw storages. Since PyTorch 1.6 both lie in an uncompressed zip archive
(`<name>/data.pkl`, `<name>/data/0`, ...); before, they followed each other in one file, which is how the torchvision
and LPIPS weights are still published. A pickle is a program: this one may build tensors and plain containers, and the
first name outside that list stops the reading. The storages are mapped, not read, so a large file costs memory only
for what is used.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["load"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class _Refused(ValueError):
    """The file asks for something that is not a tensor or a plain container."""


class _Storage(NamedTuple):
    key: str
    kind: str  # a key of _STORAGES
    numel: int
    start: int = 0  # in elements, of a legacy view on the storage `key`


class _Tensor(NamedTuple):
    """A tensor whose storage has not been found yet; sizes and offsets in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state):
        """Parameters of PyTorch 0.x carry (requires_grad, volatile, hooks); none of it matters here."""
        if not (isinstance(state, tuple) and len(state) == 3):
            raise _Refused("a tensor with a state of its own")


class _Ordered(dict):
    """Stands in for an OrderedDict."""

    def __setstate__(self, state):
        """State dicts hang version numbers (`_metadata`) on the OrderedDict; they are not part of its items."""


class _Namespace(dict):
    """Stands in for an argparse.Namespace."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise _Refused("an argparse.Namespace whose state is not a dict")
        self.update(state)


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=(), metadata=None) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _Refused(f"a tensor over a {type(storage).__name__}")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _parameter(data, requires_grad=True, hooks=(), state=None) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise _Refused(f"a parameter over a {type(data).__name__}")
    return data


def _device(*parts) -> str:
    return ":".join(str(p) for p in parts)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Ordered,
    ("argparse", "Namespace"): _Namespace,
    ("torch", "Size"): tuple,
    ("torch", "device"): _device,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,  # its name in pickles of protocol 2
    # Types of storage and element are strings here: a string can neither be called nor changed by the pickle.
    **{(module, name): name for module in ("torch", "torch.cuda") for name in _STORAGES},
    **{("torch", name): name for name in _DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """An unpickler for which every name outside `_ALLOWED` is an error; `kinds` collects the storages it met."""

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")  # for files that Python 2 wrote
        self.kinds: dict[str, str] = {}

    def find_class(self, module: str, name: str):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Refused(f"{module}.{name}") from None

    def persistent_load(self, pid) -> _Storage:
        tag, kind, key, _, numel, *view = pid
        if tag != "storage" or kind not in _STORAGES:
            raise _Refused(f"a persistent {tag!r} object of type {kind!r}")
        self.kinds[key] = kind
        if view and view[0] is not None:
            _, start, numel = view[0]
            return _Storage(key, kind, numel, start)
        return _Storage(key, kind, numel)


def load(path: str | os.PathLike) -> Any:
    """The object that was saved at `path`, with numpy arrays for tensors.

    Tensors become read-only views of the mapped file, with the strides and dtype (bfloat16 included) they were saved
    with; tensors that shared a storage still do. `OrderedDict` and `argparse.Namespace` become `dict`, `torch.Size`
    a tuple, dtypes and devices strings.

    Args:
      path: a file written by `torch.save`, in the zip format or in the one before PyTorch 1.6.

    Returns:
      Containers, numbers, strings and arrays.

    Raises:
      ValueError: naming the file, if it is missing, truncated, not a checkpoint, or if its pickle asks for anything but
        tensors and plain containers. Nothing of such a pickle is executed.

    Example:
      >>> load("var_d16.pth")["pos_start"].shape
      (1, 1, 1024)
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(16)
            file.seek(0)
            if head.startswith(b"PK\x03\x04"):
                return _load_zip(file)
            if head.startswith(b"\x80"):
                return _load_legacy(file)
    except _Refused as error:
        raise ValueError(
            f"{path}: refused, because its pickle asks for {error}; only tensors and plain containers are read"
        ) from error
    except Exception as error:  # damaged bytes are a random program and may fail in any way
        raise ValueError(f"{path}: truncated or damaged checkpoint ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path}: not a PyTorch checkpoint (it begins with {head!r})")


def _load_zip(file) -> Any:
    whole = np.memmap(file, np.uint8, "r")
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl in the archive, found {pickles}")
        root = pickles[0].removesuffix("data.pkl")
        swap = f"{root}byteorder" in members and archive.read(f"{root}byteorder") == b"big"
        tree = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        found: dict[str, np.ndarray] = {}

        def find(storage: _Storage) -> np.ndarray:
            if storage.key not in found:
                info = members[f"{root}data/{storage.key}"]
                if info.compress_type == zipfile.ZIP_STORED:
                    start = _content_start(whole, info)
                    data = whole[start : start + info.file_size]
                else:
                    data = np.frombuffer(archive.read(info), np.uint8)
                width = np.dtype(_STORAGES[storage.kind]).itemsize
                found[storage.key] = data.view(f"u{width}").byteswap().view(np.uint8) if swap else data
            return found[storage.key]

        return _fill(tree, find, {})


def _content_start(whole: np.ndarray, info: zipfile.ZipInfo) -> int:
    """First byte of a stored member: after 30 bytes of local header, and a name and padding whose lengths it gives."""
    header = whole[info.header_offset : info.header_offset + 30].tobytes()
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"no local header for {info.filename}")
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _load_legacy(file) -> Any:
    """Pickles (magic, protocol, system, object, storage keys), then per key an int64 count and the elements.

    Both are little-endian whatever the machine that wrote them.
    """
    magic = _Unpickler(file).load()
    if magic != _LEGACY_MAGIC:
        raise ValueError(f"a pickled {type(magic).__name__}, which torch.save does not begin with")
    _Unpickler(file).load()
    _Unpickler(file).load()
    reader = _Unpickler(file)
    tree = reader.load()
    keys = _Unpickler(file).load()
    position = file.tell()
    whole = np.memmap(file, np.uint8, "r")
    found: dict[str, np.ndarray] = {}
    for key in keys:
        count = int.from_bytes(whole[position : position + 8].tobytes(), "little")
        end = position + 8 + count * np.dtype(_STORAGES[reader.kinds[key]]).itemsize
        found[key] = whole[position + 8 : end]
        position = end
    return _fill(tree, lambda storage: found[storage.key], {})


def _fill(node: Any, find: Callable[[_Storage], np.ndarray], done: dict[int, Any]) -> Any:
    """`node` with arrays for tensors. `done` maps ids to results: what is referred to many times is expanded once."""
    if id(node) not in done:
        if isinstance(node, _Tensor):
            new = _array(node, find(node.storage))
        elif isinstance(node, dict):
            new = {key: _fill(value, find, done) for key, value in node.items()}
        elif isinstance(node, (list, tuple)):
            new = type(node)(_fill(value, find, done) for value in node)
        else:
            new = node
        done[id(node)] = new
    return done[id(node)]


def _array(tensor: _Tensor, data: np.ndarray) -> np.ndarray:
    """A view of the storage's bytes `data`, which must hold every element that the strides reach."""
    storage, offset, size, stride = tensor
    dtype = np.dtype(_STORAGES[storage.kind])
    if len(size) != len(stride) or min((*size, *stride, offset, storage.start), default=0) < 0:
        raise ValueError(f"a tensor of size {size}, stride {stride}, offset {offset}")
    reach = offset + sum((n - 1) * s for n, s in zip(size, stride)) + 1 if math.prod(size) else offset
    if reach > storage.numel or (storage.start + storage.numel) * dtype.itemsize > data.size:
        raise ValueError(f"storage {storage.key} holds {data.size} bytes, too few for a tensor of size {size}")
    array = np.ndarray(
        size,
        dtype,
        buffer=data,
        offset=(storage.start + offset) * dtype.itemsize,
        strides=[s * dtype.itemsize for s in stride],
    )
    array.flags.writeable = False
    return array
