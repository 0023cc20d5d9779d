"""A recipe that trains in milliseconds: a small regression network, then a second stage that needs the first.

As a program it trains the recipe in the directory given, with slowed-down data, until it is killed.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxgen.recipe import Recipe, Stage
from jaxgen.train import Interrupted, RunConfig, train

RULES = ((r"in/kernel$", P(None, "fsdp")), (r"out/kernel$", P("fsdp")))


def example(index, pause=0.0, bad=None):
    time.sleep(pause)
    x = np.random.default_rng(int(index)).normal(size=4).astype(np.float32)
    y = np.float32(np.nan) if index == bad else np.sin(x.sum(dtype=np.float32))
    return {"x": x, "y": y}


def source(size=64, batch=8, shuffle=True, repeat=True, pause=0.0, bad=None):
    """`data` of a Stage."""

    def data(shard_index, shard_count):
        examples = grain.MapDataset.range(shard_index, size, shard_count)
        examples = examples.shuffle(seed=7) if shuffle else examples
        examples = examples.map(lambda i: example(i, pause, bad))
        examples = examples.repeat() if repeat else examples
        return examples.batch(batch).to_iter_dataset()

    return data


def predict(params, x):
    return (jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"])[:, 0]


def init(key, frozen):
    waves = np.cos(7.3 * np.arange(48, dtype=np.float32)) + 0.1 * jax.random.uniform(key)  # compiles faster than noise
    params = {
        "in": {"kernel": 0.5 * waves[:32].reshape(4, 8), "bias": jnp.zeros(8)},
        "out": {"kernel": 0.5 * waves[32:].reshape(8, 2)},
    }
    return {"params": params}, {"seen": jnp.zeros((), jnp.int32)}


def loss(params, state, batch, key, step, frozen):
    target = batch["y"]
    for other in frozen.values():
        target = target - predict(other["params"], batch["x"])
    error = jnp.mean((predict(params["params"], batch["x"]) - target) ** 2)
    return error, ({"draw": jax.random.uniform(key)}, {"seen": state["seen"] + len(target)})


def noisy_loss(params, state, batch, key, step, frozen):
    batch = {**batch, "x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)}
    return loss(params, state, batch, key, step, frozen)


def eval_loss(params, state, batch, key, frozen):
    return {"loss": jnp.mean((predict(params["params"], batch["x"]) - batch["y"]) ** 2)}


def make_stage(name="first", steps=20, **fields):
    fields = {"init": init, "loss": loss, "optimizer": optax.adamw(1e-2), "data": source(), "rules": RULES} | fields
    return Stage(name=name, steps=steps, **fields)


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 8
    steps: int = 20


@dataclasses.dataclass(frozen=True)
class Config:
    model: Inner = Inner()
    sizes: tuple[int, ...] = (1, 2)


def make_recipe(*stages, config=None):
    return Recipe(config=config or Config(), stages=stages or (make_stage(),), sample=None)


def two_stages(pause=0.0):
    data = source(pause=pause)
    return make_recipe(
        make_stage("first", 8, data=data, loss=noisy_loss, ema=0.9),
        make_stage("second", 30, data=data, loss=noisy_loss, needs=("first",)),
    )


if __name__ == "__main__":
    run = RunConfig(save_every=1, log_every=1, log_every_s=0.0)
    try:
        train(two_stages(pause=0.004), sys.argv[1], run=run, log=lambda line: print(line, flush=True))
    except Interrupted as stop:
        print(stop, flush=True)
        sys.exit(stop.exit_code)
