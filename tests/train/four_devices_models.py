"""What `test_four_devices_models.py` runs with four CPU devices; prints one JSON object."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import cspd, llamagen, var
from jaxgen import config as config_lib
from jaxgen.collectives import array_shapes, collectives
from jaxgen.nn.lstm import LSTM
from jaxgen.recipe_compile import update_program
from jaxgen.recipes.feature_drafting import RULES
from jaxgen.train import init_state, make_mesh, make_step, replicated, shard_batch, shardings, spread
from kernels_pallas import partitioned

jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than running

VOCAB, BATCH = 160, 8
TINY = (
    "tokenizer.ch=4",
    "tokenizer.groups=2",
    f"tokenizer.vocab={VOCAB}",
    "model.width=32",
    "model.heads=4",
    "model.scan_layers=false",
    "model.remat=false",
    "model.depth=1",
    f"model_train.batch_size={BATCH}",
    "model_train.optim.warmup_steps=0",
)
MESHES = ("data=1", "data=2,tensor=2", "data=2,sequence=2", "tensor=2,sequence=2")


def build(system, grids, *edits):
    config = config_lib.override(system.get_config("smoke").config, (*TINY, f"tokenizer.patch_nums={grids}", *edits))
    return config, *(stage for stage in config.recipe().stages if stage.name in ("tokenizer", "generator"))


def run(system, grids):
    config, tokenizer, generator = build(system, grids)
    length = config.build_generator().order.length
    rng = np.random.default_rng(0)
    batch = {"label": rng.integers(0, 10, BATCH), "tokens": rng.integers(0, VOCAB, (BATCH, length))}
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    params, _ = jax.jit(lambda key: tokenizer.init(key, {}))(jax.random.key(1))
    found = {"all": BATCH * length * VOCAB}
    for spec in MESHES:
        mesh = make_mesh(spec, jax.devices()[: 1 if spec == "data=1" else 4])
        placed = {"tokenizer": jax.device_put(params, replicated(mesh))}
        ts, data = init_state(generator, jax.random.key(2), mesh, placed), shard_batch(mesh, batch)
        step = make_step(generator, mesh, placed).lower(ts, data, placed).compile()
        ts, metrics = step(ts, data, placed)
        _, after = step(ts, data, placed)
        told = [float(m[name]) for m in (metrics, after) for name in ("loss", "grad_norm")]
        shapes = array_shapes(step.as_text())
        logits = max((math.prod(shape) for shape in shapes if len(shape) > 1 and shape[-1] == VOCAB), default=0)
        found[spec] = {"told": told, "collectives": list(collectives(step.as_text())), "logits": logits}
    return found


def traffic(stages, devices):
    """Bytes on one device of the collectives of the last stage's update."""
    mesh, known = make_mesh(f"fsdp={devices}", jax.devices()[:devices]), {}
    for stage in stages:
        program = update_program(stage, mesh, known)
        known[stage.name] = program.weights
    return sum(t.bytes for t in collectives(program.update.lower(*program.inputs).compile().as_text()).values())


def scanned(system, grids):
    """The stages of a generator of scanned blocks, with four rows for each device."""

    def stages(devices):
        sizes = (f"model_train.batch_size={4 * devices}", f"tokenizer_train.batch_size={devices}")
        return build(system, grids, *sizes, "model.scan_layers=true", "model.depth=2")[1:]

    return stages


def alone(system, *edits):
    """A generator that needs no other stage, with four rows for each device."""

    def stages(devices):
        edited = config_lib.override(system.get_config("smoke").config, (*edits, f"model_train.batch_size={4 * devices}"))
        return [edited.recipe().stage("generator")]

    return stages


def recurrence(length):
    """An LSTM's gradients on one device and on four, and the number of collectives."""
    module, x, state = LSTM(16), jnp.ones((BATCH, length, 8)), (jnp.zeros((BATCH, 16)),) * 2
    params = module.init(jax.random.key(0), x, state)

    def norm(params, x):
        with partitioned(mesh):
            return optax.global_norm(jax.grad(lambda params: jnp.square(module.apply(params, x, state)[1]).sum())(params))

    found = {}
    for spec in ("fsdp=1", "fsdp=4"):
        mesh = make_mesh(spec, jax.devices()[: int(spec[-1])])
        tree = {"lstm_0": params["params"]}
        placed = {"params": jax.device_put(tree, shardings(mesh, tree, RULES))["lstm_0"]}
        step = jax.jit(norm, out_shardings=replicated(mesh)).lower(placed, spread(mesh, x)).compile()
        count = sum(traffic.count for traffic in collectives(step.as_text()).values())
        found[spec] = {"norm": float(step(placed, spread(mesh, x))), "count": count}
    return found


systems = {"var": (var, (1, 3, 4)), "llamagen": (llamagen, (4,))}
found = {name: run(*system) for name, system in systems.items()}
scaled = {name: scanned(*system) for name, system in systems.items()}
scaled["cspd"] = alone(cspd, "model.head_width=64", "model_train.repeats=4", "model_train.optim.warmup_steps=0")
found["traffic"] = {name: [traffic(stages(n), n) for n in (2, 4)] for name, stages in scaled.items()}
found["recurrence"] = [recurrence(length) for length in (4, 16)]
json.dump(found, sys.stdout)
