"""Pallas's Mosaic GPU backend under one set of names for jax 0.10.2 to 0.12."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.device import Device

__all__ = ["can_interpret", "kernel", "load", "refuses"]

_VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])


def load(ref):
    """Global memory to registers, element by element: for the few values that no copy engine brings."""
    index = ((),) if _VERSION < (0, 11) else ()
    return plgpu.load(ref, *index, optimized=False)


def can_interpret() -> bool:
    """Whether this jax interprets warp-specialised kernels on a CPU."""
    return _VERSION >= (0, 11)


def refuses(device: Device) -> str | None:
    """Why no kernel for Hopper can run on `device`, or None."""
    if not device.hopper:
        return "it needs a Hopper GPU (H100, H200)"
    if device.interpret and not can_interpret():
        return f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; 0.11 can"
    return None


def kernel(
    body: Callable, device: Device, *, name: str, out_type, scratch_types, grid, grid_names, threads: int = 1, **params
) -> Callable:
    """`plgpu.kernel` with warpgroup semantics; interpreted where the device says so.

    Args:
      body: the kernel, over references to inputs, outputs and scratch.
      device: that it is built for.
      name: of the kernel, in profiles and compilers' reports.
      out_type: shapes and dtypes of the outputs.
      scratch_types: shared memory and barriers.
      grid: blocks along each of `grid_names`.
      grid_names: axes for `jax.lax.axis_index`.
      threads: warpgroups a block; the axis of several is "wg".
      **params: of `plgpu.CompilerParams`.

    Raises:
      ValueError: interpretation where this jax has none.
    """
    # A block of one warpgroup has no axis of them: Pallas's simple pipeline asks for that.
    extra = {"num_threads": threads, "thread_name": "wg"} if threads > 1 else {}
    if device.interpret:
        if not can_interpret():
            raise ValueError(f"jax {jax.__version__} does not interpret Mosaic GPU kernels; 0.11 does")
        extra["interpret"] = plgpu.InterpretGPUParams()
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=grid_names,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **params),
        **extra,
    )
