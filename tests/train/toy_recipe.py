"""A recipe that trains in milliseconds: a small regression network, then a second stage that needs the first.

`main` trains it slowly in the directory given, until it is killed.
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

from jaxgen.data.shards import share
from jaxgen.recipe import Recipe, Stage
from jaxgen.train import Interrupted, RunConfig, train

RULES = ((r"in/kernel$", P(None, "fsdp")), (r"out/kernel$", P("fsdp")))


def example(index, bad=None):
    x = np.random.default_rng(int(index)).normal(size=4).astype(np.float32)
    y = np.float32(np.nan) if index == bad else np.sin(x.sum(dtype=np.float32))
    return {"x": x, "y": y}


def source(size=64, batch=8, shuffle=True, repeat=True, bad=None):
    """`data` of a Stage."""

    def data(shard_index, shard_count):
        examples = grain.MapDataset.range(shard_index, size, shard_count)
        examples = examples.shuffle(seed=7) if shuffle else examples
        examples = examples.map(lambda i: example(i, bad))
        examples = examples.repeat() if repeat else examples
        return examples.batch(batch).to_iter_dataset()

    return data


def shared_source(size=64, batch=8, repeat=True, bad=None):
    """`data` of a Stage whose global batches are the same for any number of hosts."""

    def data(shard_index, shard_count):
        examples = grain.MapDataset.range(size).shuffle(seed=7)
        examples = examples.repeat() if repeat else examples
        examples = share(examples, batch, shard_index, shard_count).map(lambda i: example(i, bad))
        return examples.batch(batch // shard_count).to_iter_dataset()

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
    return error, ({"target": jnp.mean(target)}, {"seen": state["seen"] + len(target)})


def noisy_loss(params, state, batch, key, step, frozen):
    noise = jax.random.uniform(key, batch["y"].shape)
    return loss(params, state, {**batch, "y": batch["y"] + 0.1 * noise}, key, step, frozen)


def eval_loss(params, state, batch, key, frozen):
    return {"loss": jnp.mean((predict(params["params"], batch["x"]) - batch["y"]) ** 2)}


def make_stage(name="first", steps=20, **fields):
    fields = {"init": init, "loss": loss, "optimizer": optax.sgd(0.1, momentum=0.9), "data": source(), "rules": RULES} | fields
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


def two_stages():
    return make_recipe(
        make_stage("first", 8, loss=noisy_loss, ema=0.9),
        make_stage("second", 30, loss=noisy_loss, needs=("first",)),
    )


def main(workdir):
    def log(line):
        print(line, flush=True)
        time.sleep(0.1)

    try:
        train(two_stages(), workdir, run=RunConfig(save_every=1, log_every=1, log_every_s=0.0), log=log)
    except Interrupted as stop:
        print(stop, flush=True)
        sys.exit(stop.exit_code)
