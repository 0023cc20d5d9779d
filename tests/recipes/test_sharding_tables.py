"""Every system's sharding tables, on the shapes of its published size: nothing large lies whole on each device."""

import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxgen import cli
from jaxgen.data import DataConfig
from jaxgen.train.mesh import AXES, path_name, shardings

MESH = AbstractMesh((1, 8, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
LARGE = 10e6  # bytes
BY_CHOICE = ("1/features",)  # RDM's database: each image is compared with all of it

CONFIGS = Path(__file__).parents[2] / "configs"
MODULES = {path.stem: cli.load_config_file(str(path)) for path in sorted(CONFIGS.glob("*.py")) if path.stem != "__init__"}
PUBLISHED = [name for name, module in MODULES.items() if "paper" in getattr(module, "VARIANTS", ())]
# Those with tables of their own for what few systems have.
QUICK = ("d_ar", "falcon", "gsd", "jpeg_lm", "marlin", "multi_token", "spec_vlm", "token_shuffle")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED])
def test_nothing_large_is_whole_on_every_device(name):
    recipe = MODULES[name].get_config("paper")
    if isinstance(recipe.config.data, DataConfig):
        recipe = recipe.override(["data.path=world"])
    known, whole = {}, []
    for stage in recipe.stages:
        frozen = {need: known[need] for need in stage.needs}
        made = jax.eval_shape(stage.init, jax.random.key(0), frozen)
        known[stage.name], _ = made
        places = jax.tree.leaves(shardings(MESH, made, stage.rules))
        for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(made), places, strict=True):
            convolves = leaf.ndim == 4 and leaf.shape[0] == leaf.shape[1]  # small kernels of many channels
            if place.shard_shape(leaf.shape) == leaf.shape and not (convolves or path_name(path) in BY_CHOICE):
                size = math.prod(leaf.shape) * leaf.dtype.itemsize
                whole += [f"{stage.name}: {path_name(path)} {leaf.shape}"] if size > LARGE else []
    assert not whole
