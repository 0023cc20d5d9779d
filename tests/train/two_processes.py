"""One process of the runs in `test_distributed.py`: trains the toy recipe, evaluates it, and prints what it found.

python two_processes.py WORKDIR [coordinator number_of_processes number]
"""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import toy_recipe

from jaxgen import cli
from jaxgen.generators import check_labels
from jaxgen.recipe import Recipe
from jaxgen.recipes.evaluation import sample_outputs
from jaxgen.train import RunConfig, make_mesh, shard_batch, start_world, to_host, train
from jaxgen.train.mesh import batch_sharding, batch_share, path_name, replicate_batch


def main():
    workdir, *world = sys.argv[1:]
    if world:
        start_world(coordinator=world[0], num_processes=int(world[1]), process_id=int(world[2]), wait_s=60)

    def log(line):
        print(line, flush=True)
        time.sleep(float(os.environ.get("SLOW", 0)))

    found = run(workdir, make_mesh(os.environ.get("MESH")), log, bad=int(os.environ.get("BAD", -1)))
    print("found " + json.dumps(found), flush=True)


def run(workdir, mesh, log, bad=-1):
    """Trains, and returns what can be compared between runs."""
    first = toy_recipe.make_stage(
        "first",
        12,
        loss=toy_recipe.noisy_loss,
        ema=0.9,
        data=toy_recipe.shared_source(batch=16, bad=bad),
        eval_data=toy_recipe.shared_source(batch=12, repeat=False, size=36),
        eval_loss=toy_recipe.eval_loss,
    )
    second = toy_recipe.make_stage("second", 4, needs=("first",), data=toy_recipe.shared_source(batch=16))
    options = RunConfig(save_every=4, eval_every=12, log_every=1, log_every_s=0.0)
    done = train(toy_recipe.make_recipe(first, second), workdir, mesh=mesh, run=options, log=log)
    trained = {name: result.params for name, result in done.items()}
    params = to_host(trained)
    return {
        "share": list(batch_share(mesh)),
        "params": {path_name(path): x.tolist() for path, x in jax.tree_util.tree_leaves_with_path(params)},
        "eval": done["first"].metrics.get("loss"),
        "batch": batch_places(mesh),
        "tokens": tokens(trained, mesh),
    }


def tokens(params, mesh):
    """What a sampler draws that looks at its labels first; 14 rows in batches of 8."""

    def sample(params, key, labels):
        return {"tokens": draw(params["first"]["params"], key, check_labels(labels, 10))}

    recipe = Recipe(config=None, stages=(), sample=sample)
    out = sample_outputs(recipe, params, jax.random.key(3), np.arange(14) % 10, names=("tokens",), batch_size=8, mesh=mesh)
    return out["tokens"].tolist()


@jax.jit
def draw(params, key, labels):
    x = jnp.tanh(jax.nn.one_hot(labels % 4, 4) @ params["in"]["kernel"])
    return jax.random.categorical(key, x, shape=(20, len(labels))).T


def batch_places(mesh):
    """A batch that goes to the mesh and back: split, and whole."""
    index, count = batch_share(mesh)
    rows = np.arange(16.0).reshape(count, -1)[index]
    twice = jax.jit(lambda x: 2 * x, out_shardings=batch_sharding(mesh))(shard_batch(mesh, {"x": rows})["x"])
    whole = jax.jit(jnp.sort)(replicate_batch(mesh, rows[:3]))
    return {"twice": np.sort(to_host(twice)).tolist(), "whole": to_host(whole).tolist()}


if __name__ == "__main__":
    cli.run(main)
