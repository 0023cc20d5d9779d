"""A training that is killed at fifty random moments ends as the undisturbed one, bit for bit."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_recipe

from jaxgen.train import RunConfig, load_params, make_mesh, train

KILLS, STEPS = 50, 400


def run(workdir, pause=0.0):
    """Trains what is left; a pause after each line makes it last."""

    def log(line):
        time.sleep(pause)

    first, second = (
        toy_recipe.make_stage(name, STEPS, loss=toy_recipe.noisy_loss, ema=0.9, needs=needs)
        for name, needs in (("first", ()), ("second", ("first",)))
    )
    options = RunConfig(save_every=3, log_every=1, log_every_s=0.0)
    train(toy_recipe.make_recipe(first, second), workdir, mesh=make_mesh(None, jax.devices()[:1]), run=options, log=log)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # fifty processes
def test_fifty_kills(tmp_path):
    run(tmp_path / "straight")
    # Children of a process that has imported everything, but started no device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxgen.train", "toy_recipe"])
    draw, kills = random.Random(0), 0
    while kills < KILLS:
        child = context.Process(target=run, args=(tmp_path / "killed", 0.02))
        child.start()
        before = progress(tmp_path / "killed")
        child.join(draw.uniform(0.2, 3.0))
        if child.exitcode is None and draw.random() < 0.8:
            wait_for_progress(child, tmp_path / "killed", before)
            child.join(draw.uniform(0.0, 0.2))
        assert child.exitcode is None, f"ended by itself after {kills} kills with exit code {child.exitcode}"
        child.kill()
        child.join()
        kills += 1
    run(tmp_path / "killed")
    for stage in ("first", "second"):
        whole, broken = (load_params(tmp_path / name, stage)[0] for name in ("straight", "killed"))
        jax.tree.map(np.testing.assert_array_equal, whole, broken)
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")
    assert len(rows(tmp_path / "killed")) == 2 * STEPS


def progress(workdir):
    """The checkpoints there are."""
    return {path for path in Path(workdir).glob("checkpoints/*/*") if path.name.isdigit()}


def wait_for_progress(child, workdir, before):
    """Until the child has saved something, so that the kills cover the whole run."""
    end = time.monotonic() + 60
    while progress(workdir) <= before and child.exitcode is None and time.monotonic() < end:
        time.sleep(0.01)


