"""Does a training fit devices that need not be attached? Memory, work and traffic of its updates, from the compiled programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxgen.benchmark import count_flops, topology_devices
from jaxgen.collectives import collectives
from jaxgen.recipe import Recipe
from jaxgen.recipe_compile import update_program
from jaxgen.train import make_mesh

__all__ = ["CHIPS", "Chip", "Devices", "parse_devices", "plan_updates", "proposals"]

PyTree = Any

# A program that fills a device to the last byte does not start: the runtime and the compiler's own buffers take some.
_USABLE = 0.95

# TPU topologies by number of chips, as Cloud TPU names them.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of device, in its maker's figures.

    Attributes:
      memory: bytes.
      tflops: bfloat16, dense, in 10^12 a second.
      topologies: of TPUs, by number of chips.
      cores: how many of what the name counts one chip is ("v5p-8" has 4 chips).
    """

    memory: float
    tflops: float
    topologies: dict[int, str] | None = None
    cores: int = 1


CHIPS = {
    "v4": Chip(32 * 2**30, 275, _CUBE, cores=2),
    "v5e": Chip(16 * 2**30, 197, _FLAT),
    "v5p": Chip(95 * 2**30, 459, _CUBE, cores=2),
    "v6e": Chip(32 * 2**30, 918, _FLAT),
    "a100": Chip(80e9, 312),
    "h100": Chip(80e9, 989),
    "h200": Chip(141e9, 989),
    "b200": Chip(180e9, 2250),
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a plan is made for.

    Attributes:
      name: such as "v5e-64".
      chip: what each of them is.
      count: how many.
    """

    name: str
    chip: Chip
    count: int

    def devices(self) -> Sequence[Any]:
        """Objects that programs can be compiled for: of the TPU's topology, or CPU devices in place of GPUs.

        Raises:
          ValueError: libtpu is missing, or this process has fewer CPU devices.
        """
        if self.chip.topologies:
            return topology_devices(f"{self.name.partition('-')[0]}:{self.chip.topologies[self.count]}")
        found = jax.devices("cpu")
        if len(found) < self.count:
            raise ValueError(f"--device {self.name}: this process has {len(found)} CPU devices to plan with, not {self.count}")
        return found[: self.count]


def parse_devices(name: str) -> Devices:
    """`"v5e-64"`, `"v5p-128"` (64 chips, as Cloud TPU counts cores), `"h100-8"`.

    Raises:
      ValueError: an unknown kind, no number, or a number of chips that no slice has.
    """
    kind, _, number = name.partition("-")
    chip = CHIPS.get(kind)
    if chip is None or not number.isdigit() or int(number) < 1:
        raise ValueError(f"--device {name!r}: expected KIND-NUMBER, KIND one of {', '.join(CHIPS)}")
    count, rest = divmod(int(number), chip.cores)
    if rest or (chip.topologies and count not in chip.topologies):
        sizes = ", ".join(f"{kind}-{n * chip.cores}" for n in chip.topologies)
        raise ValueError(f"--device {name!r}: there is no such slice; there are {sizes}")
    return Devices(name, chip, count)


def plan_updates(
    recipe: Recipe, devices: Devices, mesh: str | None = None, *, only: str = "", reduce_dtype: str | None = None
) -> Iterator[dict]:
    """A row for one update of each stage that is trained.

    Bytes are those of the fullest device, as its compiler laid them out; FLOP those of the traced program's matrix products,
    spread evenly; traffic the results of one device's collectives.

    Args:
      recipe: its data are read for the shapes of a batch.
      devices: to compile for.
      mesh: as `jaxgen.train.make_mesh` reads it; all devices on `data` by default.
      only: stages whose name contains this.
      reduce_dtype: as in `jaxgen.train.RunConfig`.

    Raises:
      ValueError: the mesh does not divide the devices, a batch or a parameter, or does not allow the `reduce_dtype`.
    """
    placed = make_mesh(mesh, devices.devices())
    known: dict[str, PyTree] = {}
    for stage in recipe.stages:
        program = update_program(stage, placed, known, reduce_dtype=reduce_dtype)
        known[stage.name] = program.weights
        if not stage.steps or only not in stage.name:
            continue
        state, batch, frozen = program.inputs
        compiled = program.update.lower(*program.inputs).compile()
        memory = compiled.memory_analysis()
        total = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
        )
        traffic = collectives(compiled.as_text())
        flops = count_flops(program.update, *program.inputs) / placed.size
        yield {
            "stage": stage.name,
            "device": devices.name,
            "mesh": ",".join(f"{axis}={n}" for axis, n in placed.shape.items() if n > 1) or "data=1",
            "batch": len(jax.tree.leaves(batch)[0]),
            "parameters_M": round(sum(x.size for x in jax.tree.leaves(state.params)) / 1e6, 1),
            "parameters_GB": _gigabytes((state.params, state.ema)),
            "optimizer_GB": _gigabytes(state.opt_state),
            "frozen_GB": _gigabytes(frozen),
            "temporary_GB": round(memory.temp_size_in_bytes / 1e9, 3),
            "total_GB": round(total / 1e9, 3),
            "memory_GB": round(devices.chip.memory / 1e9, 1),
            "fits": bool(total <= _USABLE * devices.chip.memory),
            "TFLOP": round(flops / 1e12, 3),
            "ms_at_peak": round(flops / devices.chip.tflops / 1e9, 1),
            "collectives": sum(t.count for t in traffic.values()),
            "traffic_GB": round(sum(t.bytes for t in traffic.values()) / 1e9, 3),
        }


def _gigabytes(tree: PyTree) -> float:
    """What one device holds of the arrays."""
    leaves = [x for x in jax.tree.leaves(tree) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    sizes = (x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    return round(sum(sizes) / 1e9, 3)


def proposals(
    recipe: Recipe,
    devices: Devices,
    *,
    only: str = "generator",
    plan: Callable[..., Iterator[dict]] = plan_updates,
) -> Iterator[tuple[str, list[str], list[dict]]]:
    """Settings that cost ever more time, compiled one after another, until one fits: `(mesh, edits, rows)` of each.

    First parameters are split over all devices, then blocks are computed again in the backward pass, then batches go through in
    2, 4, ... parts; at last the batch itself is halved.

    Args:
      recipe: its configuration has `model.remat`, and `model_train.accumulate` and `model_train.batch_size`, as far as they are
        to be tried.
      devices: as in `plan_updates`.
      only: the stages that have to fit.
      plan: for the tests.
    """
    mesh = f"fsdp={devices.count}"
    for edits in _ladder(recipe.config, devices.count):
        rows = list(plan(recipe.override(edits), devices, mesh, only=only))
        yield mesh, edits, rows
        if all(row["fits"] for row in rows):
            return


def _ladder(config: Any, count: int) -> Iterator[list[str]]:
    """Edits of the configuration, each list harder on time than the one before."""
    edits: list[str] = []
    yield edits
    if not getattr(config.model, "remat", True):
        edits = ["model.remat=true"]
        yield edits
    train = config.model_train
    parts, batch = train.accumulate, train.batch_size
    while batch % (2 * parts * count) == 0:
        parts *= 2
        yield [*edits, f"model_train.accumulate={parts}"]
    while batch % (2 * count) == 0:
        batch //= 2
        yield [*edits, f"model_train.batch_size={batch}", f"model_train.accumulate={max(1, batch // count)}"]
