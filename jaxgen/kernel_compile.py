"""Compiling kernels to machine code for devices that are not attached, and reading the compilers' reports."""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import os
import re
import time
from pathlib import Path

import jax

from jaxgen.benchmark import topology_devices

__all__ = ["TARGETS", "Report", "Target", "compile_case", "device_sharding", "environment", "packages"]

# What XLA must know of an H100 to compile for it; figures from NVIDIA's data sheet and deviceQuery.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84942979072
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      kind: as `kernels_pallas.target` names it.
      platform: of the topology.
      topology: its name, for TPUs.
    """

    kind: str
    platform: str
    topology: str = ""


TARGETS = {
    "v5e": Target("v5e", "tpu", "v5e:2x2"),
    "v5p": Target("v5p", "tpu", "v5p:2x2x1"),
    "sm_90a": Target("h100", "cuda"),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a compiler said of one kernel.

    Attributes:
      kernel: its name.
      bundles: non-empty instruction bundles of a TPU kernel: a static measure of its loop bodies, not a time.
      registers: a thread of a GPU kernel.
      spills: bytes stored and loaded because registers ran out.
    """

    kernel: str
    bundles: int | None = None
    registers: int | None = None
    spills: int | None = None


def packages(target: Target) -> list[str]:
    """The compilers to install (`pip install --no-deps --target`), for the jax that is installed."""
    if target.platform == "tpu":
        wanted = [line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu")]
        return [wanted[0].split(";")[0].strip()]
    version = importlib.metadata.version("jax").split(".dev")[0]
    plugins = [f"{name}=={version}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")]
    return [*plugins, "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt"]


def environment(target: Target, site: Path | str, dump: Path | str) -> dict[str, str]:
    """Variables that a process must be started with to compile for `target`.

    Args:
      target: the device.
      site: folder with its packages.
      dump: empty folder for the compiler's files.
    """
    variables = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(site), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    if target.platform == "tpu":
        return variables | {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here opens a device, so several compilers may run
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4" if target.kind == "v5e" else "v5p-8",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        }
    return variables | {"MOSAIC_GPU_DUMP_TO": str(dump)}


def device_sharding(target: Target) -> jax.sharding.Sharding:
    """Where the arguments of a program for `target` lie: its first device."""
    from jax.experimental import topologies

    if target.platform == "tpu":
        devices = topology_devices(target.topology)
    else:
        options = {"target_config": _H100, "topology": "1x1x1"}
        devices = topologies.get_topology_desc(platform=target.platform, topology_name="", **options).devices
    return jax.sharding.SingleDeviceSharding(devices[0])


def compile_case(fn, args, target: Target, placed: jax.sharding.Sharding, dump: Path | str) -> tuple[list[Report], dict]:
    """Compiles `fn` for shapes `args` on `target`.

    Args:
      fn: calls kernels; traced inside `kernels_pallas.target`.
      args: a tuple of pytrees of `jax.ShapeDtypeStruct`.
      target: the device.
      placed: from `device_sharding`.
      dump: the folder given to `environment`; it is emptied.

    Returns:
      (a report a kernel, {"seconds", "temp_MB"}).
    """
    from kernels_pallas import target as kernels_for

    for path in glob.glob(f"{dump}/*"):
        os.remove(path)
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), args)
    start = time.perf_counter()
    with kernels_for(target.kind):
        compiled = jax.jit(fn).lower(*args).compile()
    memory = compiled.memory_analysis()
    facts = {"seconds": time.perf_counter() - start, "temp_MB": memory.temp_size_in_bytes / 2**20 if memory else None}
    reports = _tpu_reports(dump) if target.platform == "tpu" else _gpu_reports(dump)
    return reports, facts


def _tpu_reports(dump) -> list[Report]:
    found = []
    for path in sorted(glob.glob(f"{dump}/*-schedule-analysis_final_bundles.txt")):
        name = re.match(r"\d+-(.+)-\d+-schedule-analysis", os.path.basename(path))[1]
        text = Path(path).read_text()
        if name != "TLP" and "tpu_custom_call" in text:
            bundles = int(re.search(r"non empty scheduled bundles: (\d+)", text)[1])
            found.append(Report(re.sub(r"\.\d+$", "", name), bundles=bundles))
    return sorted(found, key=lambda report: report.kernel)


def _gpu_reports(dump) -> list[Report]:
    found = []
    for path in sorted(glob.glob(f"{dump}/*.ptxas")):
        text = Path(path).read_text()
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
        registers = max(map(int, re.findall(r"Used (\d+) registers", text)), default=None)
        name = re.search(r"entry function '(\w+)'", text)[1].removesuffix("_mosaic_gpu_kernel")
        found.append(Report(name, registers=registers, spills=spills))
    return sorted(found, key=lambda report: report.kernel)
