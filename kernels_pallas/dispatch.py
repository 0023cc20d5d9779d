"""Choosing an implementation of an op for a problem and a device, and saying why."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

from kernels_pallas.device import Device, current_device
from kernels_pallas.lifting import lift

__all__ = ["Choice", "Implementation", "choose", "explain"]


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op, imported when it is first asked: `import kernels_pallas` loads no Pallas backend.

    Attributes:
      name: what `implementation=` calls it.
      where: dotted name of the module with the functions that compute it ("kernels_pallas.linear.xla"), or of an object in
        one ("kernels_pallas.attention.split:CUDNN"). It has `refuses(problem, device) -> why it cannot compute this
        problem there, or None`; the op knows its other functions.
      platforms: those it can run on; elsewhere it refuses without being imported.
      opaque: XLA does not see through it, so that `vmap` and meshes need `lift`.
    """

    name: str
    where: str
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    opaque: bool = False

    @property
    def backend(self) -> Any:
        """The module or object itself."""
        return pkgutil.resolve_name(self.where)

    def function(self, name: str, axes: str, device: Device, **static) -> Callable:
        """The backend's function `name` with static arguments and the device, lifted along `axes` where that is needed."""
        fn = functools.partial(getattr(self.backend, name), device=device, **static)
        return lift(fn, axes, device) if self.opaque else fn

    def refuses(self, problem: Any, device: Device) -> str | None:
        """Why it cannot compute `problem` on `device`, or None."""
        if device.platform not in self.platforms:
            return f"it is for {' and '.join(self.platforms)}"
        return self.backend.refuses(problem, device)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was picked for one call of an op, and why.

    Attributes:
      op: the op's name.
      problem: shapes, dtypes and options of the call.
      device: that it was picked for.
      implementation: the name of the one picked.
      forced: whether the caller asked for it by name.
      refused: (name, reason) of those that were preferred but cannot compute it.
    """

    op: str
    problem: Any
    device: Device
    implementation: str
    forced: bool
    refused: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        why = "asked for" if self.forced else "first that can"
        lines = [f"{self.op} on {self.device}: {self.implementation} ({why}) for {self.problem}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused])


_RECORD: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("kernels_pallas_record", default=None)


def choose(
    op: str, implementations: Sequence[Implementation], problem: Any, requested: str | None = None
) -> tuple[Implementation, Device]:
    """The first of `implementations` that can compute `problem` on the current device, or the one requested.

    Raises:
      ValueError: a requested one that does not exist or cannot compute it, with the reason.
    """
    device, refused = current_device(), []
    names = [implementation.name for implementation in implementations]
    if requested is not None and requested not in names:
        raise ValueError(f"{op}: implementation={requested!r} is not one of {', '.join(names)}")
    for implementation in implementations:
        if requested not in (None, implementation.name):
            continue
        reason = implementation.refuses(problem, device)
        if reason is None:
            record = _RECORD.get()
            if record is not None:
                record.append(Choice(op, problem, device, implementation.name, requested is not None, tuple(refused)))
            return implementation, device
        if requested is not None:
            raise ValueError(f"{op}: implementation={requested!r} cannot run on {device}: {reason}; problem: {problem}")
        refused.append((implementation.name, reason))
    raise ValueError(f"{op}: nothing can run on {device}: {'; '.join(f'{n}: {r}' for n, r in refused)}; problem: {problem}")


def explain(fn: Callable, *args, **kwargs) -> tuple[Choice, ...]:
    """Which implementation every op inside `fn(*args, **kwargs)` picks, without computing anything.

    Args:
      fn: an op of this package, or any function that calls some (a model's `apply`). What was already traced under
        `jax.jit` is not traced again and stays unseen.
      *args: arrays, `jax.ShapeDtypeStruct`s, or static values such as a `BlockMask`.
      **kwargs: static values.

    Returns:
      A `Choice` a call, in order; `str(choice)` is for reading.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from kernels_pallas import block_sparse_attention
      >>> q = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
      >>> print(explain(block_sparse_attention, q, q, q, mask)[0])    # doctest: +SKIP
    """
    import jax

    leaves, tree = jax.tree.flatten(args)
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def call(arrays):
        arrays = iter(arrays)
        merged = [next(arrays) if array else leaf for leaf, array in zip(leaves, is_array)]
        return fn(*jax.tree.unflatten(tree, merged), **kwargs)

    record: list[Choice] = []
    token = _RECORD.set(record)
    try:
        jax.eval_shape(call, [x for x, array in zip(leaves, is_array) if array])
    finally:
        _RECORD.reset(token)
    return tuple(record)
