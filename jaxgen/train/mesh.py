"""Meshes of devices, and where arrays live on them.

Four axes: `data` (replicas), `fsdp` (the batch and the parameters are both split over it), `tensor` (only parameters) and
`sequence` (only activations: positions, and heads inside attention; see `jaxgen.nn.placement`). A parameter's place comes from
a table of path patterns, never from metadata on the parameter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = [
    "AXES",
    "batch_parts",
    "batch_share",
    "batch_sharding",
    "check_split",
    "compile_pattern",
    "make_mesh",
    "parse_mesh",
    "path_name",
    "replicate_batch",
    "replicated",
    "shard_batch",
    "shardings",
    "spread",
]

AXES = ("data", "fsdp", "tensor", "sequence")

PyTree = Any


def parse_mesh(spec: str) -> dict[str, int]:
    """`"data=2,fsdp=4"` as `{"data": 2, "fsdp": 4}`.

    Raises:
      ValueError: an entry that is not `axis=size`, an unknown or repeated axis, or a size below 1.
    """
    sizes = {}
    for part in spec.split(","):
        name, sep, size = (text.strip() for text in part.partition("="))
        if not sep or not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh {spec!r}: {part!r} is not axis=size")
        if name not in AXES:
            raise ValueError(f"mesh {spec!r}: unknown axis {name!r}; known: {', '.join(AXES)}")
        if name in sizes:
            raise ValueError(f"mesh {spec!r}: axis {name!r} is given twice")
        sizes[name] = int(size)
    return sizes


def make_mesh(spec: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the axes `data`, `fsdp`, `tensor` and `sequence`.

    Args:
      spec: sizes as `parse_mesh` reads them; axes not named have size 1. `None` puts every device on `data`.
      devices: the devices to use.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or see `parse_mesh`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": len(devices)} if spec is None else parse_mesh(spec)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh {spec!r} needs {math.prod(shape)} devices, there are {len(devices)}")
    # Auto, since Linen's modules are not written for jax's explicit axes.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def path_name(path: tuple) -> str:
    """A tree path as text, such as `params/blocks/attn/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(mesh: Mesh, tree: PyTree, rules: Iterable[tuple[str, P]]) -> PyTree:
    """A `NamedSharding` for every leaf of `tree`.

    Args:
      mesh: the devices.
      tree: anything whose leaves have a `shape`.
      rules: `(pattern, PartitionSpec)` pairs. A pattern is searched for in the leaf's path (`re.search`), the first that is
        found decides, and leaves that match none are replicated. An axis that the mesh lacks, or has with size 1, splits
        nothing.

    Raises:
      ValueError: a pattern that is no regular expression, a spec with more entries than the leaf has dimensions, with an unknown
        axis, or with an axis that does not divide its dimension; the leaf's path and shape are named.

    Example:
      >>> tree = {"dense": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}
      >>> shardings(make_mesh(), tree, [("kernel$", P(None, "fsdp"))])["dense"]["kernel"].spec
      P(None, None)
    """
    rules = tuple((compile_pattern(pattern), spec) for pattern, spec in rules)

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for pattern, spec in rules if pattern.search(name)), P())
        return NamedSharding(mesh, _fit(mesh, name, leaf.shape, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def compile_pattern(pattern: str, where: str = "shard pattern ") -> re.Pattern:
    """What a shard pattern is searched with.

    Raises:
      ValueError: it is no regular expression; `where` comes first.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}{pattern!r} is no regular expression ({error})") from error


def _fit(mesh: Mesh, name: str, shape: tuple[int, ...], spec: P) -> P:
    """`spec` without the axes that split nothing on `mesh`, checked against `shape`."""
    if len(spec) > len(shape):
        raise ValueError(f"{name}: {spec} has more entries than shape {shape} has dimensions")
    entries = []
    for dim, entry in zip(shape, spec):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        for axis in axes:
            if axis not in AXES and axis not in mesh.shape:
                raise ValueError(f"{name}: {spec} has the unknown axis {axis!r}; known: {', '.join(mesh.axis_names)}")
        axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        size = math.prod(mesh.shape[axis] for axis in axes)
        if dim % size:
            raise ValueError(f"{name}: shape {shape} has a dimension {dim} that {'*'.join(axes)}={size} does not divide")
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*entries)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)))


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is split into: the devices along `data` and `fsdp`."""
    return mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)


def check_split(mesh: Mesh, size: int, *, accumulate: int = 1, where: str = "") -> None:
    """That a batch of so many examples can be split into micro-batches and over the mesh.

    Raises:
      ValueError: it cannot; `where` comes first.
    """
    if size % (accumulate * batch_parts(mesh)):
        micro = f"into accumulate={accumulate} micro-batches " if accumulate > 1 else ""
        raise ValueError(f"{where}a batch of {size} examples cannot be split {micro}over data*fsdp={batch_parts(mesh)} devices")


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """`(index, count)`: which part of each batch this process feeds, and how many parts there are.

    Processes that hold different rows of a batch feed different parts; where `tensor` spans processes, those that hold the
    same rows feed the same part.

    Raises:
      ValueError: the rows of two processes overlap without being the same.
    """
    shares = _shares(mesh)
    return sorted(set(shares.values())).index(shares[jax.process_index()]), len(set(shares.values()))


def _shares(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """Process -> the places along `data` and `fsdp` that its devices have."""
    rows = np.moveaxis(mesh.devices, [mesh.axis_names.index(axis) for axis in ("data", "fsdp") if axis in mesh.shape], [0, 1])
    rows = rows.reshape(batch_parts(mesh), -1)
    places: dict[int, set[int]] = {}
    for place, devices in enumerate(rows):
        for device in devices:
            places.setdefault(device.process_index, set()).add(place)
    shares = {process: tuple(sorted(places)) for process, places in places.items()}
    kinds = set(shares.values())
    if sum(map(len, kinds)) != len(rows) or len({len(kind) for kind in kinds}) > 1:
        raise ValueError(f"mesh {dict(mesh.shape)}: processes hold overlapping parts of a batch: {shares}")
    return shares


def shard_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """This process's part of a batch (see `batch_share`), as arrays over the whole mesh.

    Args:
      mesh: the devices.
      batch: arrays `[b, ...]` on the host, b the same in every process; the global batch has as many times b examples as
        there are parts.

    Raises:
      ValueError: the arrays differ in b, or the devices along `data` and `fsdp` do not divide the global batch.
    """
    sharding = batch_sharding(mesh)
    sizes = {path_name(path): np.shape(x)[:1] for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise ValueError(f"the arrays of a batch differ in their leading axis: {sizes}")
    count = batch_share(mesh)[1]
    size = next(iter(sizes.values()))[0] * count
    check_split(mesh, size)

    def place(x):
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:]))

    return jax.tree.map(place, batch)


def spread(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """A batch [b, ...] that every process has whole, split over the mesh as `shard_batch` would.

    Raises:
      ValueError: the devices along `data` and `fsdp` do not divide b.
    """
    x = np.asarray(x)
    check_split(mesh, len(x))
    return jax.make_array_from_callback(x.shape, batch_sharding(mesh), lambda index: x[index])


def replicate_batch(mesh: Mesh, batch: PyTree) -> PyTree:
    """The whole batch on every device, from each process's part `[b, ...]` of it, b of any size but the same everywhere."""
    if jax.process_count() > 1:
        shares = _shares(mesh)
        first = [min(p for p in shares if shares[p] == share) for share in sorted(set(shares.values()))]
        parts = multihost_utils.process_allgather(batch)
        batch = jax.tree.map(lambda x: np.concatenate(np.asarray(x)[first]), parts)
    return jax.device_put(batch, replicated(mesh))
