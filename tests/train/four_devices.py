"""What `test_four_devices.py` runs with four CPU devices; prints one JSON object."""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P
from toy_recipe import RULES, example, init, make_recipe, make_stage, predict, shared_source, source

from jaxgen.collectives import collectives
from jaxgen.plan import CHIPS, Devices, plan_updates
from jaxgen.train import (
    Checkpoints,
    RunConfig,
    abstract_state,
    batch_sharding,
    evaluate,
    init_state,
    load_params,
    make_mesh,
    make_step,
    shard_batch,
    shardings,
    train,
)

results = {}
devices = jax.devices()
meshes = {
    "four": make_mesh("data=2,fsdp=2"),
    "fsdp": make_mesh("fsdp=4"),
    "tensor": make_mesh("data=2,tensor=2"),
    "two": make_mesh("fsdp=2", devices[:2]),
    "one": make_mesh(None, devices[:1]),
    "data": make_mesh("data=4"),
}
rules = (("^params/in/kernel$", P(None, ("fsdp", "tensor"))), *RULES)


def error(call):
    try:
        call()
    except ValueError as e:
        return str(e)
    return None


def run(ts, step, mesh, batches):
    losses = []
    for batch in batches:
        ts, metrics = step(ts, shard_batch(mesh, batch), {})
        losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return ts, losses


def host(tree):
    return jax.tree.map(np.array, (tree.params, tree.ema, tree.opt_state))


def difference(a, b):
    return max(float(np.abs(np.subtract(x, y)).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def pieces(tree):
    """How many different parts each array is cut into."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        parts = x.sharding.devices_indices_map(x.shape).values()
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = len({str(part) for part in parts})
    return found


# The same updates on one device, on four, and on four with micro-batches.
stage = make_stage(ema=0.9, rules=rules, optimizer=optax.adamw(1e-2, eps=1e-3))
data = iter(source(batch=16)(0, 1))
batches = [next(data) for _ in range(4)]
steps = {name: make_step(stage, meshes[name], {}) for name in ("one", "two", "four")}
one, four = (init_state(stage, jax.random.key(1), meshes[name], {}) for name in ("one", "four"))
start = host(one)
results["init"] = difference(host(four), start)
ts = jax.device_put(jax.tree.map(jnp.copy, four), jax.tree.map(lambda x: x.sharding, four))
one, expected = run(one, steps["one"], meshes["one"], batches)
reference = host(one)
results["moved"] = difference(reference[0], start[0])
four, losses = run(four, steps["four"], meshes["four"], batches)
results["four"] = {"state": difference(host(four), reference), "losses": difference(losses, expected)}
micro = make_step(dataclasses.replace(stage, accumulate=2), meshes["four"], {})
ts, losses = run(ts, micro, meshes["four"], batches)
results["micro"] = {"state": difference(host(ts), reference), "losses": difference(losses, expected)}
results["pieces"] = {"four/real": pieces(four), "micro/real": pieces(ts)}
for name, mesh in meshes.items():
    results["pieces"][name] = pieces(abstract_state(stage, mesh, {}))

# A checkpoint of four devices goes on on one and on two.
with tempfile.TemporaryDirectory() as workdir:
    data = iter(source(batch=16)(0, 1))
    next(data)
    with Checkpoints(workdir, stage.name) as checkpoints:
        checkpoints.save(4, four, data)
        checkpoints.wait()
        saved, rest = host(four), [next(data), next(data)]
        _, expected = run(four, steps["four"], meshes["four"], rest)
        for name in ("one", "two"):
            again = iter(source(batch=16)(0, 1))
            restored = checkpoints.restore(abstract_state(stage, meshes[name], {}), again)
            found = {"state": difference(host(restored), saved), "pieces": pieces(restored)}
            _, losses = run(restored, steps[name], meshes[name], [next(again), next(again)])
            results[f"restore/{name}"] = {**found, "losses": difference(losses, expected)}
    params, _ = load_params(workdir, stage.name)
    results["load_params"] = {"pieces": pieces(params), "devices": len({x.device for x in jax.tree.leaves(params)})}
    params, _ = load_params(workdir, stage.name, shardings=lambda t: shardings(meshes["four"], t, rules))
    results["load_params/four"] = {"pieces": pieces(params)}

# The whole loop on a mesh, with evaluation on a number of examples that four does not divide.
recipe = make_recipe(
    make_stage("first", 3, eval_data=source(size=14, repeat=False), eval_loss=lambda p, s, b, k, f: {"loss": jnp.mean(b["y"])}),
    make_stage("second", 2, needs=("first",)),
)
with tempfile.TemporaryDirectory() as workdir:
    done = train(recipe, workdir, mesh=meshes["four"], run=RunConfig(eval_every=3), log=lambda line: None)
    again = train(recipe, workdir, mesh=meshes["fsdp"], run=RunConfig(eval_every=3), log=lambda line: None)
    results["train"] = {
        "eval": done["first"].metrics["loss"],
        "mean": float(np.mean([example(i)["y"] for i in range(14)])),
        "pieces": pieces(again["second"].params),
        "same": difference(done["second"].params, again["second"].params) == 0,
    }
results["evaluate/one"] = evaluate(recipe.stages[0], meshes["one"], done["first"].params, {}, {})["loss"]

# Plans: what an update moves between devices, and whether it fits.
chip = CHIPS["h100"]
recipe = make_recipe(make_stage(data=shared_source(batch=16), rules=rules, optimizer=optax.adamw(1e-2)))
results["plan"] = {spec: next(plan_updates(recipe, Devices("h100-4", chip, 4), spec)) for spec in ("data=4", "fsdp=4")}
# A stage with a state does not follow, see "reduced".
results["plan"]["reduced"] = next(plan_updates(recipe, Devices("h100-4", chip, 4), "data=4", reduce_dtype="float32"))
tiny = Devices("h100-4", dataclasses.replace(chip, memory=100), 4)
results["plan"]["tiny"] = next(plan_updates(recipe, tiny, "fsdp=4"))


def lowered(stage, mesh, **options):
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)), batches[0])
    return make_step(stage, mesh, {}, **options).lower(abstract_state(stage, mesh, {}), batch, {})


def traffic(stage, mesh):
    return collectives(lowered(stage, mesh).compile().as_text())


def reduced(stage, mesh, **options):
    """Types of the arrays that the partitioned program reduces, where a CPU's own reduces all in float32; and its traffic."""
    jax.config.update("jax_enable_compilation_cache", False)  # which knows programs, and nothing of how they came about
    compilation_cache.reset_cache()
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        compiled = lowered(stage, mesh, **options).compile(compiler_options=dump)
        text = "".join(path.read_text() for path in Path(folder).glob("*after_spmd-partitioning*"))
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    types = sorted(set(re.findall(r"= ([a-z]+\d+)\[\d[\d,]*\]\S* all-reduce\(", text)))
    return {"types": types, "traffic": collectives(compiled.as_text())}


results["traffic"] = {
    "data": traffic(stage, meshes["data"]),
    "data/micro": traffic(dataclasses.replace(stage, accumulate=2), meshes["data"]),
    "fsdp": traffic(stage, meshes["fsdp"]),
}


# Gradients of a computation in bfloat16, without a state and in two micro-batches: each device adds up its own.
def computed_in(dtype):
    def loss(params, state, batch, key, step, frozen):
        params = jax.tree.map(lambda x: x.astype(dtype), params["params"])
        error = predict(params, batch["x"].astype(dtype)).astype(jnp.float32) - batch["y"]
        return jnp.mean(error**2), ({}, state)

    def start(key, frozen):
        return init(key, frozen)[0], ()

    return make_stage(init=start, loss=loss, rules=rules, optimizer=optax.sgd(0.1), accumulate=2)


stateless, bfloat16 = computed_in(jnp.float32), computed_in(jnp.bfloat16)
results["reduced"] = {
    str(dtype): reduced(bfloat16, meshes["data"], reduce_dtype=dtype) for dtype in (None, "float32", "bfloat16")
}
recipe = make_recipe(dataclasses.replace(bfloat16, data=shared_source(batch=16)))
for dtype in (None, "float32"):
    row = next(plan_updates(recipe, Devices("h100-4", chip, 4), "data=4", reduce_dtype=dtype))
    results["reduced"][f"plan/{dtype}"] = row["collectives"]
for name, dtype in (("one", None), ("data", "float32"), ("data", "bfloat16")):
    ended, losses = run(
        init_state(stateless, jax.random.key(1), meshes[name], {}),
        make_step(stateless, meshes[name], {}, reduce_dtype=dtype),
        meshes[name],
        batches,
    )
    results["reduced"][f"{name}/{dtype}"] = {"params": [x.tolist() for x in jax.tree.leaves(host(ended)[0])], "losses": losses}
recipe = make_recipe(dataclasses.replace(stage, steps=1), dataclasses.replace(stateless, name="second", steps=1))
with tempfile.TemporaryDirectory() as workdir:
    lines = []
    train(recipe, workdir, mesh=meshes["data"], run=RunConfig(reduce_dtype="float32"), log=lines.append)
    results["reduced"]["said"] = [line for line in lines if "reduce_dtype" in line]

drawn = []


def drawing(params, state, batch, key, step, frozen):
    jax.debug.callback(lambda bits: drawn.append(int(bits)), jax.random.bits(key))
    return stateless.loss(params, state, batch, key, step, frozen)


noisy = dataclasses.replace(stateless, loss=drawing)
ended = init_state(noisy, jax.random.key(1), meshes["data"], {})
run(ended, make_step(noisy, meshes["data"], {}, reduce_dtype="float32"), meshes["data"], batches[:1])
jax.effects_barrier()
results["reduced"]["draws"] = [len(drawn), len(set(drawn))]

split = dataclasses.replace(stateless, rules=(("in/bias", P("data")),))
eighths = make_step(dataclasses.replace(stage, accumulate=8), meshes["four"], {})
results["errors"] = {
    "product": error(lambda: make_mesh("data=3")),
    "batch": error(lambda: shard_batch(meshes["four"], {"x": np.zeros((6, 2))})),
    "micro": error(lambda: run(ts, eighths, meshes["four"], batches)),
    "reduce/mesh": error(lambda: make_step(stateless, meshes["four"], {}, reduce_dtype="float32")),
    "reduce/train": error(lambda: train(recipe, "never", mesh=meshes["fsdp"], run=RunConfig(reduce_dtype="float32"))),
    "reduce/state": error(lambda: make_step(stage, meshes["data"], {}, reduce_dtype="float32")),
    "reduce/type": error(lambda: make_step(stateless, meshes["data"], {}, reduce_dtype="int8")),
    "reduce/rules": error(lambda: make_step(split, meshes["data"], {}, reduce_dtype="float32")),
    "dimension": error(lambda: abstract_state(make_stage(rules=(("out/kernel$", P(None, "fsdp")),)), meshes["fsdp"], {})),
}
json.dump(results, sys.stdout)
