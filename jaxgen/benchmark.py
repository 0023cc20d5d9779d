"""Measuring compiled functions: compile time, memory, FLOPs, warm seconds; on a device, or compiled for one that is not there."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

__all__ = ["compile_report", "measure", "topology_devices"]


def compile_report(fn: Callable, *args, **jit_options) -> tuple[Any, dict]:
    """Compiles `fn` for its arguments (arrays or `ShapeDtypeStruct`) and reports what the compiler says.

    Returns:
      (the compiled function, {"compile_s", "argument_MB", "temp_MB", "output_MB", "compiled_TFLOP"}). XLA counts a loop's body
      once, so compiled_TFLOP of a scanned model is a lower bound.
    """
    start = time.perf_counter()
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn, **jit_options)
    compiled = jitted.lower(*args).compile()
    report = {"compile_s": round(time.perf_counter() - start, 2)}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    if memory is not None:
        for name in ("argument", "temp", "output"):
            report[f"{name}_MB"] = round(getattr(memory, f"{name}_size_in_bytes") / 1e6, 1)
    report["compiled_TFLOP"] = round(cost.get("flops", float("nan")) / 1e12, 4)
    return compiled, report


def measure(fn: Callable, *args, repeats: int = 5) -> dict:
    """Median seconds of `fn(*args)` over warm calls, and the peak memory of the process or device so far in MB."""
    jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - start)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "repeats": repeats,
        "peak_MB": round(peak / 1e6, 1),
        "device": device.device_kind,
    }


def topology_devices(name: str):
    """Devices of a TPU topology that is not attached, such as "v5e:2x2", to compile for. Needs libtpu.

    Raises:
      ValueError: libtpu is not installed, or it does not know the topology.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # the plugin raises many kinds
        raise ValueError(f"topology {name!r}: {' '.join(str(error).split())[:300]} (is libtpu installed?)") from error
