"""Which device kernels are chosen and built for: the one at hand, or one named for compiling or interpreting without it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["Device", "Partition", "current_device", "describe", "partitioned", "target"]

# What `jax.Device.device_kind` says, and the short name that tuning tables and limits use.
_TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}
_GPUS = {"H100": "h100", "H200": "h200", "A100": "a100", "B200": "b200", "L40": "l40", "L4": "l4", "4090": "rtx4090"}
_HOPPER = ("h100", "h200")


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh and the axes of it that split a kernel's work.

    Attributes:
      mesh: a `jax.sharding.Mesh`.
      batch: axes that split the batch.
      heads: axes that split the heads.
      sequence: axes that split positions outside attention; kernels get whole sequences, and heads over these axes, too.
    """

    mesh: Any
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    sequence: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Device:
    """What a kernel needs to know of the device it runs on.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: short name ("v5e", "h100", ...), or what the runtime calls it where there is none.
      capability: of NVIDIA GPUs, "9.0" for Hopper; "" elsewhere.
      interpret: run Pallas kernels of this device in their interpreters on the CPU (tests; slow).
      partition: how a kernel's batch and heads are spread over a mesh, from `partitioned`; None is one device.
    """

    platform: str
    kind: str
    capability: str = ""
    interpret: bool = False
    partition: Partition | None = None

    @property
    def hopper(self) -> bool:
        """Whether kernels for sm_90a run on it."""
        return self.platform == "gpu" and self.capability == "9.0"

    def __str__(self) -> str:
        return f"{self.platform} {self.kind}" + (" (interpreted)" if self.interpret else "")


_TARGET: contextvars.ContextVar[Device | None] = contextvars.ContextVar("kernels_pallas_target", default=None)
_PARTITION: contextvars.ContextVar[Partition | None] = contextvars.ContextVar("kernels_pallas_partition", default=None)


def current_device() -> Device:
    """The device of the enclosing `target`, or of the mesh of the enclosing `partitioned`, or JAX's default device."""
    partition, device = _PARTITION.get(), _TARGET.get()
    if device is None:
        device = describe(partition.mesh.devices.flat[0] if partition else _default_device())
    return dataclasses.replace(device, partition=partition)


def _default_device():
    import jax

    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return chosen if chosen is not None else jax.devices()[0]


def describe(device) -> Device:
    """The `Device` of a `jax.Device`, attached or described by a topology."""
    kind = device.device_kind
    if device.platform == "tpu":
        return Device("tpu", _TPUS.get(kind, kind))
    if device.platform in ("gpu", "cuda", "rocm"):
        short = next((name for part, name in _GPUS.items() if part in kind), kind)
        return Device("gpu", short, str(getattr(device, "compute_capability", "")))
    return Device(device.platform, device.platform)


@contextlib.contextmanager
def target(kind: str, *, interpret: bool = False) -> Iterator[Device]:
    """Chooses and builds kernels for `kind` instead of the device at hand, while functions are traced inside.

    For compiling ahead of time, and for tests. A function that was jitted and traced outside keeps its kernels.

    Args:
      kind: "cpu", a TPU ("v5e", "v5p", ...) or a GPU ("h100", "a100", ...).
      interpret: run the kernels in Pallas's interpreters on the CPU.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> with target("v5e") as device:
      ...     str(current_device())
      'tpu v5e'
    """
    if kind == "cpu":
        device = Device("cpu", "cpu")
    elif kind in _TPUS.values():
        device = Device("tpu", kind, interpret=interpret)
    elif kind in _GPUS.values():
        device = Device("gpu", kind, "9.0" if kind in _HOPPER else "", interpret=interpret)
    else:
        known = ["cpu", *dict.fromkeys(_TPUS.values()), *dict.fromkeys(_GPUS.values())]
        raise ValueError(f"kind={kind!r} is not one of {', '.join(known)}")
    token = _TARGET.set(device)
    try:
        yield device
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def partitioned(
    mesh,
    *,
    batch: Sequence[str] = ("data", "fsdp"),
    heads: Sequence[str] = ("tensor",),
    sequence: Sequence[str] = ("sequence",),
) -> Iterator[Partition]:
    """Spreads the kernels of functions that are traced inside over a mesh: batch and heads, never a sequence.

    The compiler can not split a Pallas kernel by itself, so each is wrapped in `jax.shard_map`. Axes that the mesh lacks are
    left out, and an axis that does not divide a size leaves it whole.

    Args:
      mesh: a `jax.sharding.Mesh` with automatic axes.
      batch: axes for the batch.
      heads: axes for the heads.
      sequence: axes over which positions are split outside the kernels (`jaxgen.nn.placement`); inside they split heads.

    Raises:
      ValueError: one axis in two of them.
    """
    if len({*batch, *heads, *sequence}) < len((*batch, *heads, *sequence)):
        raise ValueError(f"batch={tuple(batch)}, heads={tuple(heads)} and sequence={tuple(sequence)} share an axis")
    given = (batch, (*heads, *sequence), sequence)
    there = [tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1) for axes in given]
    token = _PARTITION.set(Partition(mesh, *there) if any(there) else None)
    try:
        yield _PARTITION.get()
    finally:
        _PARTITION.reset(token)
