"""Compiling a recipe's training steps and its sampler for devices that need not be attached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgen.benchmark import compile_report
from jaxgen.recipe import Recipe, Stage
from jaxgen.train import TrainState, abstract_state, batch_sharding, make_mesh, make_step, replicated
from jaxgen.train.mesh import batch_parts
from kernels_pallas.device import describe, target

__all__ = ["UpdateProgram", "compile_recipe", "update_program"]

PyTree = Any


class UpdateProgram(NamedTuple):
    """A stage's update, ready to be lowered for devices that need not be attached.

    Attributes:
      update: of `jaxgen.train.make_step`.
      inputs: the shapes, dtypes and places of its arguments: training state, batch, frozen parameters.
    """

    update: Callable[..., Any]
    inputs: tuple[TrainState, PyTree, dict[str, PyTree]]

    @property
    def weights(self) -> PyTree:
        """What later stages get of this one."""
        return self.inputs[0].weights


def update_program(stage: Stage, mesh: Mesh, known: Mapping[str, PyTree], *, reduce_dtype: str | None = None) -> UpdateProgram:
    """The update of a stage with its own batches; one device's share of a batch is read, for its shapes.

    Args:
      stage: to be trained.
      mesh: its devices.
      known: `UpdateProgram.weights` of the earlier stages, by name.
      reduce_dtype: as in `jaxgen.train.RunConfig`; stages with a state that changes in training do not follow.

    Raises:
      ValueError: see `jaxgen.train.make_step`.
    """
    parts, split = batch_parts(mesh), batch_sharding(mesh)
    share = next(iter(stage.data(0, parts)))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * parts, *x.shape[1:]), x.dtype, sharding=split), share)
    frozen = {name: known[name] for name in stage.needs}
    state = abstract_state(stage, mesh, frozen)
    update = make_step(stage, mesh, frozen, reduce_dtype=reduce_dtype, log=lambda line: None)
    return UpdateProgram(update, (state, batch, frozen))


def compile_recipe(recipe: Recipe, devices: Sequence[Any], *, batch: int = 2) -> Iterator[dict]:
    """A row for each stage's update and for the sampler: compile seconds, MB and TFLOP as in `compile_report`, or the error.

    Kernels are those of the devices' kind. Updates are compiled with the recipe's own batches, spread over the devices where
    they divide; the sampler for one device.

    Args:
      recipe: of any modality; its data is read for the shapes of a batch.
      devices: attached, or of a topology (`jaxgen.benchmark.topology_devices`).
      batch: rows of the sampler.
    """
    known = {}
    for stage in recipe.stages:
        examples = next(iter(stage.data(0, 1)))
        fits = all(len(x) % len(devices) == 0 for x in examples.values())
        mesh = make_mesh(f"data={len(devices)}", devices) if fits else make_mesh("data=1", devices[:1])
        # Stages may lie on meshes of their own here.
        program = update_program(stage, mesh, {name: _place(tree, replicated(mesh)) for name, tree in known.items()})
        known[stage.name] = program.weights
        if stage.steps:
            yield {"what": f"update of {stage.name}", "devices": mesh.size} | _report(program.update, *program.inputs)
    yield {"what": "sampler", "devices": 1} | _sampler(recipe, known, devices[0], batch)


def _sampler(recipe: Recipe, params, device, batch: int) -> dict:
    mesh = make_mesh("data=1", [device])
    asked = [b"To be, or"] * batch if recipe.modality == "text" else np.arange(batch, dtype=np.int32) % 2
    asked = asked if recipe.prompts is None else recipe.prompts(["a caption"] * batch)
    key = _place(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    with target(describe(device).kind):
        return _report(lambda params, key: recipe.sample(params, key, asked), _place(params, replicated(mesh)), key)


def _report(fn, *args) -> dict:
    try:
        return compile_report(fn, *args)[1]
    except Exception as error:  # a compiler raises many kinds, and the other rows are wanted
        return {"not compiled": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def _place(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
