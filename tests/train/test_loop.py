import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_recipe import Config, Inner, eval_loss, example, init, make_recipe, make_stage, noisy_loss, source, two_stages

from jaxgen.train import (
    Checkpoints,
    Interrupted,
    NonFiniteError,
    RunConfig,
    load_params,
    make_mesh,
    save_config,
    save_params,
    train,
)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(None, jax.devices()[:1])


def rows(workdir, stage=None):
    found = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if stage in (None, row["stage"])]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def quiet(line):
    pass


def interrupt_at(step, signum=signal.SIGTERM):
    """A log that sends a signal to this process once the progress reaches `step`."""
    sent = []

    def log(line):
        if not sent and f" {step}/" in line:
            sent.append(step)
            os.kill(os.getpid(), signum)

    return log


EACH = RunConfig(save_every=7, log_every=1, log_every_s=0.0)


def resumable():
    return make_recipe(make_stage("first", 20, loss=noisy_loss, optimizer=optax.adam(1e-2), ema=0.9, accumulate=2))


@pytest.mark.numeric
def test_resuming_is_bit_exact(tmp_path, mesh):
    straight = train(resumable(), tmp_path / "straight", mesh=mesh, run=EACH, log=quiet)["first"]
    with pytest.raises(Interrupted) as stop:
        train(resumable(), tmp_path / "resumed", mesh=mesh, run=EACH, log=interrupt_at(9))
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert "SIGTERM: saved stage 'first' at step 1" in str(stop.value)
    with Checkpoints(tmp_path / "resumed", "first") as checkpoints:
        assert 9 <= checkpoints.latest() < 20
        assert checkpoints.latest() % EACH.save_every  # saved because of the signal
    lines = []
    resumed = train(resumable(), tmp_path / "resumed", mesh=mesh, run=EACH, log=lines.append)["first"]
    assert lines[0].startswith("first goes on at step 1")
    same(resumed.params, straight.params)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "straight")
    assert [row["step"] for row in rows(tmp_path / "straight")] == list(range(1, 21))
    assert straight.step == 20 and straight.metrics["loss"] == rows(tmp_path / "straight")[-1]["loss"]
    same(load_params(tmp_path / "resumed", "first")[0], straight.params)
    assert {"loss", "grad_norm", "target"} <= straight.metrics.keys()


def test_going_back_to_an_older_checkpoint_repeats_its_rows(tmp_path, mesh):
    train(resumable(), tmp_path, mesh=mesh, run=EACH, log=quiet)
    before = rows(tmp_path)
    (tmp_path / "checkpoints/first/20").rename(tmp_path / "gone")
    train(resumable(), tmp_path, mesh=mesh, run=EACH, log=quiet)
    assert rows(tmp_path) == before


def test_more_steps_go_on_from_the_end(tmp_path, mesh):
    def recipe(steps):
        return make_recipe(make_stage("first", steps), config=Config(Inner(steps=steps)))

    train(recipe(4), tmp_path, mesh=mesh, run=EACH, log=quiet)
    longer = train(recipe(9), tmp_path, mesh=mesh, run=EACH, log=quiet)["first"]
    assert longer.step == 9 and [row["step"] for row in rows(tmp_path)] == list(range(1, 10))
    assert json.loads((tmp_path / "config.json").read_text())["model"]["steps"] == 9


def test_stages_run_in_order_and_finished_ones_are_loaded(tmp_path, mesh):
    lines = []
    done = train(two_stages(), tmp_path, mesh=mesh, run=EACH, log=lines.append)
    assert [row["stage"] for row in rows(tmp_path)] == ["first"] * 8 + ["second"] * 30
    assert any("compiling" in line for line in lines) and any(line.startswith("second 30/30  loss") for line in lines)
    lines.clear()
    again = train(two_stages(), tmp_path, mesh=mesh, run=EACH, log=lines.append)
    assert lines == ["first is trained: step 8", "second is trained: step 30"]
    for name in ("first", "second"):
        same(again[name].params, done[name].params)
    assert (tmp_path / "config.json").exists()


def test_later_stages_receive_the_average(tmp_path, mesh):
    def copied(key, frozen):
        return jax.tree.map(jnp.copy, frozen["first"]), {"seen": jnp.zeros((), jnp.int32)}

    first = make_stage("first", 3, ema=0.9)
    second = make_stage("second", 1, init=copied, optimizer=optax.sgd(0.0), needs=("first",))
    done = train(make_recipe(first, second), tmp_path, mesh=mesh, run=EACH, log=quiet)
    same(done["second"].params, load_params(tmp_path, "first")[0])
    batch = next(iter(source()(0, 1)))
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), done["first"].params["params"])
    predicted = (np.tanh(batch["x"] @ p["in"]["kernel"] + p["in"]["bias"]) @ p["out"]["kernel"])[:, 0]
    expected = np.mean((predicted - (batch["y"] - predicted)) ** 2)  # of the target less the frozen prediction
    assert rows(tmp_path, "second")[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_signals_in_a_second_stage_and_killed_processes(tmp_path, mesh, compile_cache):
    """Kills a training process twice, terminates it once, finishes here: the result is that of an uninterrupted run."""
    env = os.environ | compile_cache | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}

    def start_and_signal(signum, stage, step):
        command = [sys.executable, "-c", f"import toy_recipe; toy_recipe.main('{tmp_path}/killed')"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = []
        try:
            for line in process.stdout:
                output.append(line)
                words = line.split()
                if words[0] == stage and words[1].split("/")[0].isdigit() and int(words[1].split("/")[0]) >= step:
                    process.send_signal(signum)
                    break
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode not in (0, 1), "".join(output) + rest
        return process.returncode, "".join(output) + rest

    # Every update is saved, and a save waits for the one before: at the line of update 3, that of update 1 is complete.
    code, _ = start_and_signal(signal.SIGKILL, "first", 3)
    assert code == -signal.SIGKILL
    saved = load_params(tmp_path / "killed", "first")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved[0]))
    code, output = start_and_signal(signal.SIGKILL, "second", 4)
    assert code == -signal.SIGKILL and "first goes on at step" in output
    load_params(tmp_path / "killed", "second")
    code, output = start_and_signal(signal.SIGTERM, "second", 9)
    assert code == 143 and "SIGTERM: saved stage 'second' at step" in output, output
    assert "second goes on at step" in output and "Traceback" not in output

    finished = train(two_stages(), tmp_path / "killed", mesh=mesh, run=EACH, log=quiet)
    straight = train(two_stages(), tmp_path / "straight", mesh=mesh, run=EACH, log=quiet)
    same(finished["second"].params, straight["second"].params)
    assert rows(tmp_path / "killed") == rows(tmp_path / "straight")


def test_ctrl_c_saves_and_handlers_are_restored(tmp_path, mesh):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stop:
        train(resumable(), tmp_path, mesh=mesh, run=EACH, log=interrupt_at(5, signal.SIGINT))
    assert stop.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, mesh):
    bad = 37
    stage = make_stage("first", 100, data=source(shuffle=False, bad=bad, batch=4), ema=0.5)
    broken_step = bad // 4 + 1
    with pytest.raises(NonFiniteError) as error:
        train(make_recipe(stage), tmp_path, mesh=mesh, run=dataclasses.replace(EACH, save_every=3), log=quiet)
    assert isinstance(error.value, FloatingPointError)
    assert f"stage 'first' step {broken_step}: loss nan" in str(error.value)
    assert f"the last good checkpoint is step 9 in {tmp_path}" in str(error.value)
    assert rows(tmp_path)[-1]["step"] == broken_step and rows(tmp_path)[-1]["loss"] is None
    with Checkpoints(tmp_path, "first") as checkpoints:
        assert checkpoints.latest() == 9
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(load_params(tmp_path, "first")))


def test_evaluation_is_the_mean_over_examples_and_picks_the_best(tmp_path, mesh):
    traces = []

    def counting(*args):
        traces.append(1)
        return eval_loss(*args)

    held_out = source(size=11, batch=4, repeat=False, shuffle=False)
    evaluated = make_stage("first", 12, eval_data=held_out, eval_loss=counting, ema=0.5)
    run = dataclasses.replace(EACH, save_every=100, eval_every=2, keep=1)
    lines = []
    done = train(make_recipe(evaluated), tmp_path, mesh=mesh, run=run, log=lines.append)["first"]
    evals = {row["step"]: row["eval/loss"] for row in rows(tmp_path) if "eval/loss" in row}
    assert list(evals) == [2, 4, 6, 8, 10, 12]
    examples = [example(i) for i in range(11)]
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), done.params["params"])
    x, y = (np.stack([e[k] for e in examples]).astype(np.float64) for k in "xy")
    predicted = (np.tanh(x @ p["in"]["kernel"] + p["in"]["bias"]) @ p["out"]["kernel"])[:, 0]
    assert evals[12] == pytest.approx(np.mean((predicted - y) ** 2), rel=1e-5)
    assert done.metrics == {"loss": evals[12]}
    assert len(traces) == 2  # of full batches and of the smaller last one, whatever the number of evaluations
    assert sum("evaluation: loss" in line for line in lines) == 6
    best = min(evals, key=evals.get)
    with Checkpoints(tmp_path, "first", keep=1) as checkpoints:
        assert checkpoints.steps() == sorted({best, 12})
        assert checkpoints.best_loss() == evals[best]
    load_params(tmp_path, "first", "best")


def test_evaluation_without_examples_is_an_error(tmp_path, mesh):
    empty = make_stage("first", 1, eval_data=lambda i, n: [], eval_loss=eval_loss)
    with pytest.raises(ValueError, match="stage 'first': eval_data has no examples"):
        train(make_recipe(empty), tmp_path, mesh=mesh, run=RunConfig(eval_every=1), log=quiet)


def test_starts_from_given_weights(tmp_path, mesh):
    given = {"params": jax.tree.map(lambda x: x + 1, init(jax.random.key(5), {})[0]["params"])}
    save_params(tmp_path, "first", given)

    def larger(key, frozen):
        params, state = init(key, frozen)
        return {**params, "extra": jnp.ones(3)}, state

    def no_gradient(params, state, batch, key, step, frozen):
        return jnp.mean(batch["x"]), ({}, state)

    stage = make_stage("first", 1, init=larger, loss=no_gradient, ema=0.5)
    stage = dataclasses.replace(stage, optimizer=optax.sgd(0.1))
    done = train(make_recipe(stage), tmp_path, mesh=mesh, log=quiet)["first"]
    same(done.params["params"], given["params"])
    np.testing.assert_array_equal(done.params["extra"], np.ones(3))
    assert done.step == 1


def test_no_steps_take_the_weights_as_they_are(tmp_path, mesh):
    given = {"params": init(jax.random.key(5), {})[0]["params"]}
    save_params(tmp_path / "given", "first", given)
    done = train(make_recipe(make_stage("first", 0)), tmp_path / "given", mesh=mesh, log=quiet)
    same(done["first"].params, given)
    with pytest.raises(ValueError, match="stage 'first' has steps=0 and no weights in"):
        train(make_recipe(make_stage("first", 0)), tmp_path / "new", mesh=mesh, log=quiet)


def test_given_weights_of_another_shape_are_refused(tmp_path, mesh):
    """By name; what only one side has is no error, as converted weights lack what only training needs."""
    right = init(jax.random.key(5), {})[0]["params"]
    name = sorted(right)[0]
    wrong = right | {name: jax.tree.map(lambda x: jnp.zeros((*x.shape, 2)), right[name])}
    save_params(tmp_path / "wrong", "first", {"params": wrong})
    with pytest.raises(ValueError, match=rf"does not fit the model: params/params/{name}.* is \[.*, 2\] in the checkpoint"):
        train(make_recipe(make_stage("first", 0)), tmp_path / "wrong", mesh=mesh, log=quiet)
    some = {"params": {key: right[key] for key in right if key != name} | {"more": jnp.ones(3)}}
    save_params(tmp_path / "some", "first", some)
    done = train(make_recipe(make_stage("first", 0)), tmp_path / "some", mesh=mesh, log=quiet)
    same(done["first"].params, some)


def test_weights_that_were_put_there_take_any_configuration_until_training_starts(tmp_path, mesh):
    save_config(tmp_path, Config())
    save_params(tmp_path, "first", {"params": init(jax.random.key(5), {})[0]["params"]})
    other = Config(Inner(width=9, steps=7), (1, 3))
    train(make_recipe(make_stage("first", 1), config=other), tmp_path, mesh=mesh, log=quiet)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 9
    with pytest.raises(ValueError, match="is of another run"):
        train(make_recipe(make_stage("first", 2)), tmp_path, mesh=mesh, log=quiet)


def test_notes_are_said(tmp_path, mesh):
    lines = []
    stage = dataclasses.replace(make_stage("first", 1), notes=("mind the gap",))
    train(make_recipe(stage), tmp_path, mesh=mesh, log=lines.append)
    assert "first: mind the gap" in lines


def test_another_configuration_is_refused(tmp_path, mesh):
    def recipe(config):
        return make_recipe(make_stage("first", 1), config=config)

    train(recipe(Config()), tmp_path, mesh=mesh, log=quiet)
    saved = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        train(recipe(Config(Inner(width=9, steps=7), (1, 3))), tmp_path, mesh=mesh, log=quiet)
    assert str(error.value) == (
        f"{tmp_path}/config.json is of another run: model.width was 8 and is 9; sizes was [1, 2] and is [1, 3]"
    )
    assert (tmp_path / "config.json").read_text() == saved
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"cannot read {tmp_path}/config.json"):
        train(recipe(Config()), tmp_path, mesh=mesh, log=quiet)


def test_run_settings_may_change_but_not_the_seed(tmp_path, mesh):
    @dataclasses.dataclass(frozen=True)
    class WithRun:
        run: RunConfig = RunConfig()

    def go(**fields):
        run = RunConfig(**fields)
        train(make_recipe(make_stage("first", 2), config=WithRun(run)), tmp_path, mesh=mesh, run=run, log=quiet)

    go(save_every=1)
    go(save_every=5, keep=1, eval_every=3, log_every=2, log_every_s=9.0)
    with pytest.raises(ValueError, match="run.seed was 0 and is 1"):
        go(seed=1)


def test_seeds_differ_and_a_started_stage_keeps_its_own(tmp_path, mesh):
    def losses(seed, steps=2):
        run = dataclasses.replace(EACH, seed=seed)
        recipe = make_recipe(make_stage("first", steps), config=Config(Inner(steps=steps)))
        train(recipe, tmp_path / str(seed), mesh=mesh, run=run, log=quiet)
        return [row["loss"] for row in rows(tmp_path / str(seed))]

    assert losses(0) != losses(1)
    (tmp_path / "1").rename(tmp_path / "2")
    with pytest.raises(ValueError, match="seed=2 is not the one that stage 'first' was started with"):
        losses(2, steps=3)


def test_stages_have_to_fit_together(tmp_path, mesh):
    for stages, message in (
        ((make_stage("a"), make_stage("a")), "two stages are called 'a'"),
        ((make_stage("a", needs=("b",)), make_stage("b")), "stage 'a' needs 'b', which is not an earlier stage"),
        ((make_stage("a", eval_loss=eval_loss),), "stage 'a' has only one of eval_data and eval_loss"),
        ((make_stage("a", steps=-1),), "stage 'a': steps=-1 is out of range"),
        ((make_stage("a", accumulate=0),), "stage 'a': accumulate=0 is out of range"),
        ((make_stage("a", ema=1.0),), "stage 'a': ema=1.0 is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_recipe(*stages), tmp_path / "run", mesh=mesh, log=quiet)
    assert not (tmp_path / "run").exists()


def test_data_that_ends_is_an_error(tmp_path, mesh):
    stage = make_stage("first", 20, data=source(size=16, repeat=False))
    with pytest.raises(ValueError, match="stage 'first': data ended at step 2; it has to repeat"):
        train(make_recipe(stage), tmp_path, mesh=mesh, log=quiet)


def test_a_workdir_that_cannot_be_made_is_named(tmp_path, mesh):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"cannot write {tmp_path}/file/config.json: File exists"):
        train(resumable(), tmp_path / "file", mesh=mesh, log=quiet)


def test_the_step_is_compiled_once_and_data_is_closed(tmp_path, mesh):
    traces, made, closed = [], [], []

    def counting(*args):
        traces.append(1)
        return noisy_loss(*args)

    class Closing(grain.DatasetIterator):
        def __init__(self, parent):
            super().__init__()
            self.inner = parent

        def __next__(self):
            return next(self.inner)

        def get_state(self):
            return self.inner.get_state()

        def set_state(self, state):
            self.inner.set_state(state)

        def close(self):
            closed.append(1)

    class Data:
        def __iter__(self):
            made.append(Closing(iter(source()(0, 1))))
            return made[-1]

    stage = make_stage("first", 6, loss=counting, data=lambda index, count: Data())
    train(make_recipe(stage), tmp_path, mesh=mesh, run=EACH, log=quiet)
    assert len(traces) == 1 and closed == [1]


@pytest.mark.parametrize(
    "field, value", [("seed", -1), ("save_every", 0), ("keep", 0), ("eval_every", -1), ("log_every", 0), ("log_every_s", -1.0)]
)
def test_bad_run_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        RunConfig(**{field: value})


def test_time_between_progress_lines(tmp_path, mesh):
    lines = []
    start = time.monotonic()
    train(resumable(), tmp_path, mesh=mesh, run=RunConfig(log_every_s=1000.0), log=lines.append)
    assert time.monotonic() - start < 1000
    assert [line for line in lines if "/20  loss" in line] == [line for line in lines if "20/20  loss" in line]
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]  # every `log_every`


def test_what_is_stuck_is_reported(tmp_path, mesh):
    def slow(shard_index, shard_count):
        inner = source()(shard_index, shard_count)
        return inner.map(lambda batch: (time.sleep(0.3), batch)[1])

    lines = []
    train(make_recipe(make_stage("first", 2, data=slow)), tmp_path, mesh=mesh, run=RunConfig(stuck_s=0.1), log=lines.append)
    assert any(line.startswith("still waiting for the data of update 1 of first (") for line in lines)


@pytest.mark.parametrize("field,value", [("stuck_s", 0.0), ("profile", -1)])
def test_run_config_names_what_is_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        RunConfig(**{field: value})


def test_the_type_of_a_reduction_is_one_of_two():
    assert RunConfig(reduce_dtype="bfloat16").reduce_dtype == "bfloat16"
    with pytest.raises(ValueError, match="reduce_dtype='int8': expected one of float32, bfloat16, or none"):
        RunConfig(reduce_dtype="int8")
