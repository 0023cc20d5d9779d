"""A training that is killed at fifty random moments ends as the undisturbed one, bit for bit."""

import json
import multiprocessing
import os
import random
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest
import toy_recipe

from jaxgen.train import RunConfig, load_params, make_mesh, train
from jaxgen.train.reading import steps

KILLS, STEPS, STAGES = 50, 150, ("first", "second")


def run(workdir, log=lambda line: None):
    """Trains what is left."""
    first, second = (
        toy_recipe.make_stage(name, STEPS, loss=toy_recipe.noisy_loss, ema=0.9, needs=needs)
        for name, needs in zip(STAGES, ((), ("first",)))
    )
    options = RunConfig(save_every=3, log_every=1, log_every_s=0.0)
    train(toy_recipe.make_recipe(first, second), workdir, mesh=make_mesh(None, jax.devices()[:1]), run=options, log=log)


def live(workdir, updates, delay, after):
    """Trains until SIGKILL comes: `delay` seconds after so many updates, or `after` seconds from now if that is earlier.

    The signal is the process's own, so that a busy machine changes little of when in a training it comes.
    """
    jax.config.update("jax_disable_most_optimizations", True)  # as in the test's own process
    seen = 0

    def log(line):
        nonlocal seen
        seen += bool(re.match(rf"\w+ \d+/{STEPS}  loss", line))
        if seen == updates:
            die_in(delay)
        time.sleep(0.01 if seen < updates + 8 else 60)  # the run never gets to its end

    die_in(after)
    run(workdir, log)


def die_in(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def done(workdir):
    """Updates of all stages that are in checkpoints."""
    return sum(max(steps(workdir / "checkpoints" / stage), default=0) for stage in STAGES)


@pytest.mark.slow  # fifty processes
def test_fifty_kills(tmp_path, quick_compiles):
    run(tmp_path / "straight")
    # Children of a process that has imported everything, but started no device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxgen.train", "toy_recipe"])
    draw, killed, begun = random.Random(0), tmp_path / "killed", []
    for left in range(KILLS, 0, -1):
        begun.append(done(killed))
        # Some die while they start. The others are spread over what is left of the run.
        updates = 1 + int(draw.uniform(0, 2) * (2 * STEPS - 12 - begun[-1]) / (left + 1))
        after = draw.uniform(0.1, 2.0) if draw.random() < 0.2 else 120.0
        child = context.Process(target=live, args=(killed, updates, draw.uniform(0, 0.05), after))
        child.start()
        child.join(180)
        assert child.exitcode == -signal.SIGKILL, f"after {KILLS - left} kills: {child.exitcode}"
    assert len(set(begun)) > KILLS // 3 and begun[-1] > STEPS, begun  # they came in all parts of the run
    run(killed)
    for stage in STAGES:
        whole, broken = (load_params(tmp_path / name, stage)[0] for name in ("straight", "killed"))
        jax.tree.map(np.testing.assert_array_equal, whole, broken)
    assert rows(killed) == rows(tmp_path / "straight")
    assert len(rows(killed)) == 2 * STEPS
