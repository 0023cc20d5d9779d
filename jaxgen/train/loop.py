"""Trains the stages of a recipe in order, resumes by itself, and stops cleanly."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from jaxgen import storage
from jaxgen.data.throughput import Throughput
from jaxgen.recipe import Recipe, Stage
from jaxgen.train.checkpoint import Checkpoints, load_params
from jaxgen.train.evaluation import evaluate
from jaxgen.train.gradients import REDUCE_DTYPES, check_mesh
from jaxgen.train.interrupt import Interrupted, signals
from jaxgen.train.log import MetricsLog, Progress
from jaxgen.train.mesh import batch_share, make_mesh, shard_batch, shardings
from jaxgen.train.profile import Profile
from jaxgen.train.step import TrainState, abstract_state, init_state, make_step
from jaxgen.train.waiting import saying
from jaxgen.train.workdir import save_config

__all__ = ["NonFiniteError", "RunConfig", "StageResult", "train"]

PyTree = Any

# Updates in flight before their metrics are looked at: the devices never wait for the host, and a bad loss is seen soon.
_IN_FLIGHT = 2

# The first updates of a run are not like the others: caches are cold, and data workers start.
_PROFILE_AFTER = 10

# A compilation that takes longer says so.
_COMPILE_S = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How to run a training; nothing here changes what is learnt but `seed`, and by rounding and other noise `reduce_dtype`.

    Attributes:
      seed: decides initial parameters and all random choices of the training.
      save_every: updates between checkpoints; the end of a stage and an interruption are saved in any case.
      keep: latest checkpoints kept of each stage, besides the best.
      eval_every: updates between evaluations, which also happen at the end of a stage; 0 never evaluates. A checkpoint is
        saved after an evaluation that is the best so far.
      log_every: updates between rows in `metrics.jsonl`.
      log_every_s: seconds between progress lines.
      reduce_dtype: on a mesh of `data` alone, "float32" or "bfloat16" sums the devices' gradients once an update, in this type;
        None leaves to the compiler when and in what type it does (see `jaxgen.train.gradients`). Stages with a state that
        changes in training, which has to see whole batches, say that they do not follow.
      stuck_s: seconds after which an update or an evaluation that is not yet done is reported, again and again.
      profile: updates to record with JAX's profiler, from the tenth after the start on or, of short stages, the last, into
        `profile/` of the work directory; 0 records none. TensorBoard and Perfetto open the trace.
      tensorboard, wandb: dashboards to write to as well.
    """

    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    eval_every: int = 0
    log_every: int = 10
    log_every_s: float = 5.0
    reduce_dtype: str | None = None
    stuck_s: float = 300.0
    profile: int = 0
    tensorboard: bool = False
    wandb: bool = False

    def __post_init__(self):
        for name, least in (("seed", 0), ("save_every", 1), ("keep", 1), ("eval_every", 0), ("log_every", 1), ("profile", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        if not self.log_every_s >= 0:
            raise ValueError(f"log_every_s={self.log_every_s}: expected seconds")
        if not self.stuck_s > 0:
            raise ValueError(f"stuck_s={self.stuck_s}: expected seconds above 0")
        if self.reduce_dtype not in (None, *REDUCE_DTYPES):
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r}: expected one of {', '.join(REDUCE_DTYPES)}, or none")


class NonFiniteError(FloatingPointError):
    """The loss or the gradient became infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """A trained stage.

    Attributes:
      params: its weights (the average if one is kept), on the mesh.
      state: its other pytree.
      step: updates done.
      metrics: the last evaluation, or else the last update's metrics; empty if the stage was already trained.
    """

    params: PyTree
    state: PyTree
    step: int
    metrics: dict[str, float]


def train(
    recipe: Recipe,
    workdir: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    run: RunConfig | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, StageResult]:
    """Trains what is not yet trained of `recipe` in `workdir`.

    `workdir` receives `config.json` (the recipe's configuration), `metrics.jsonl` and `checkpoints/<stage>/`. Called again,
    finished stages are loaded and a started one goes on where its last checkpoint left it, data included; of the
    configuration, only the stages' `steps`, the place of the data and the fields of `RunConfig` other than `seed` may have
    changed by then. Weights that were put there (`save_params`) are started from, or taken as they are by a stage of 0 steps.

    Args:
      recipe: the stages.
      workdir: the run's directory, made if missing: of this machine, or `gs://bucket/folder` (see `jaxgen.storage.place`).
      mesh: the devices; all of them on `data` by default.
      run: how to run.
      log: takes each progress line.

    Returns:
      What each stage learnt, by name.

    Raises:
      ValueError: `workdir` holds a run of another configuration or seed, a checkpoint cannot be read or written, or a batch
        or `run.reduce_dtype` does not fit the mesh.
      NonFiniteError: a loss or gradient that is not finite; checkpoints keep the last good parameters.
      Interrupted: SIGTERM or Ctrl-C, after the current update was finished and saved. A second one kills at once.
    """
    workdir, run = storage.place(workdir), run or RunConfig()
    mesh = make_mesh() if mesh is None else mesh
    say = log if jax.process_index() == 0 else lambda line: None
    _check_stages(recipe.stages)
    if run.reduce_dtype is not None:
        check_mesh(mesh, run.reduce_dtype)
    started = _started(workdir)
    save_config(workdir, recipe.config, may_differ=_may_differ(recipe), replace=not started)
    done = {}
    with MetricsLog(workdir, tensorboard=run.tensorboard, wandb=run.wandb) as rows, signals() as stop:
        for index, stage in enumerate(recipe.stages):
            key = jax.random.fold_in(jax.random.key(run.seed), index)
            frozen = {name: done[name].params for name in stage.needs}
            with Checkpoints(workdir, stage.name, keep=run.keep, log=say) as checkpoints:
                step = checkpoints.latest()
                if step is not None and step >= stage.steps:
                    say(f"{stage.name} is trained: step {step}")
                    if not stage.steps:  # it was not trained here
                        checkpoints.check_shapes(jax.eval_shape(stage.init, key, frozen)[0], step)
                    done[stage.name] = _load(workdir, stage, mesh, step)
                else:
                    training = _Training(stage, mesh, run, frozen, checkpoints, rows, stop, say, workdir / "profile")
                    done[stage.name] = training.run(key)
    return done


class _Training:
    """One stage's loop."""

    def __init__(self, stage, mesh, run, frozen, checkpoints, rows, stop, say, profile):
        self.stage, self.mesh, self.run_config, self.frozen = stage, mesh, run, frozen
        self.checkpoints, self.rows, self.stop, self.say = checkpoints, rows, stop, say
        self.meter = Throughput()
        self.profile = Profile(profile, _PROFILE_AFTER, run.profile, say)
        self.last: dict[str, float] = {}
        self.in_flight: deque[tuple[int, dict]] = deque()

    def run(self, key: PRNGKeyArray) -> StageResult:
        """Trains to the end, from the last checkpoint if there is one."""
        stage = self.stage
        starting = f"starting {stage.name}"
        with (
            contextlib.closing(iter(stage.data(*batch_share(self.mesh)))) as data,
            saying(starting, every_s=self.run_config.stuck_s, log=self.say) as now,
            self.profile,
        ):
            return self._loop(key, data, now)

    def _loop(self, key: PRNGKeyArray, data: Any, now: Callable[[str], None]) -> StageResult:
        stage, run = self.stage, self.run_config
        if stage.check is not None:
            stage.check(self.frozen)
        train_state = self._start(key, data)
        step = int(train_state.step)
        self.rows.rewind(stage.name, step)
        best = self.checkpoints.best_loss()
        update, metrics = None, {}
        while step < stage.steps:
            now(f"waiting for the data of update {step + 1} of {stage.name}")
            with self.meter.input():
                batch = shard_batch(self.mesh, self._next(data, step))
            if update is None:
                update = self._compile(train_state, batch)
                self.progress = Progress(stage.name, step, stage.steps, run.log_every_s, self.say)
                self.profile.fit(stage.steps - step)
                self.meter.reset()
            now(f"waiting for update {step + 1} of {stage.name}")
            self.profile.before_update()
            train_state, row = update(train_state, batch, self.frozen)
            step += 1
            self.in_flight.append((step, row))
            with self.meter.device():
                self._look(_IN_FLIGHT)
            self.meter.step(len(jax.tree.leaves(batch)[0]))
            self.checkpoints.check()
            metrics, end = {}, step == stage.steps
            regular = end or step % run.save_every == 0
            if regular:
                self.say(f"{stage.name}: {self.meter.line()}")
            if run.eval_every and stage.eval_data is not None and (end or step % run.eval_every == 0):
                now(f"evaluating {stage.name} after update {step}")
                metrics = self._evaluate(train_state, step)
            better, stop = metrics.get("loss", np.inf) < best, self.stop()
            if better:
                best = metrics["loss"]
            if regular or better or stop:
                self._look(0)
                now(f"saving {stage.name} after update {step}")
                self.rows.flush()
                self.checkpoints.save(step, train_state, data, metrics)
            if regular or metrics:
                self.meter.reset()
            if stop:
                self.checkpoints.wait()
                raise Interrupted(stop, stage.name, step)
        if self.checkpoints.latest() is None and not stage.steps:
            self.checkpoints.save(step, train_state, data)
        self.checkpoints.wait()
        return StageResult(train_state.weights, train_state.state, step, metrics or self.last)

    def _start(self, key: PRNGKeyArray, data: Any) -> TrainState:
        """The stage's training state, new or from its last checkpoint; `data` is moved to its place."""
        stage, step = self.stage, self.checkpoints.latest()
        for note in stage.notes:
            self.say(f"{stage.name}: {note}")
        if step is None:
            if not stage.steps:
                raise ValueError(f"stage {stage.name!r} has steps=0 and no weights in {self.checkpoints.directory}")
            self.say(f"{stage.name} starts: {stage.steps} steps")
            return init_state(stage, key, self.mesh, self.frozen)
        abstract = abstract_state(stage, self.mesh, self.frozen)
        if not self.checkpoints.has_training_state(step):
            given, state = self.checkpoints.restore_weights(abstract, step)
            self.say(f"{stage.name} starts from the given weights of {', '.join(sorted(given))}: {stage.steps} steps")
            fresh = init_state(stage, key, self.mesh, self.frozen)
            params = {**fresh.params, **given}
            ema = None if fresh.ema is None else jax.tree.map(lambda x: x.copy(), params)
            return fresh.replace(params=params, state=fresh.state if state is None else state, ema=ema)
        train_state = self.checkpoints.restore(abstract, data, step)
        _, expected = jax.random.split(key)
        if not np.array_equal(jax.random.key_data(train_state.key), jax.random.key_data(expected)):
            raise ValueError(f"seed={self.run_config.seed} is not the one that stage {stage.name!r} was started with")
        self.say(f"{stage.name} goes on at step {step}/{stage.steps}")
        return train_state

    def _next(self, data: Iterator, step: int) -> PyTree:
        try:
            return next(data)
        except StopIteration:
            raise ValueError(f"stage {self.stage.name!r}: data ended at step {step}; it has to repeat") from None

    def _compile(self, train_state: TrainState, batch: PyTree) -> Callable:
        size = sum(x.size for x in jax.tree.leaves(train_state.params))
        self.say(f"{self.stage.name}: compiling the step ({size:,} parameters, mesh {dict(self.mesh.shape)})")
        start = time.monotonic()
        with saying(f"compiling the step of {self.stage.name}", every_s=_COMPILE_S, log=self.say):
            dtype = self.run_config.reduce_dtype
            step = make_step(self.stage, self.mesh, self.frozen, reduce_dtype=dtype, log=self.say)
            update = step.lower(train_state, batch, self.frozen).compile()
        self.say(f"{self.stage.name}: compiled in {time.monotonic() - start:.1f} s")
        return update

    def _look(self, leave: int) -> None:
        """Waits until `leave` updates are in flight; logs the others' metrics and checks that they are finite."""
        while len(self.in_flight) > leave:
            step, row = self.in_flight.popleft()
            finite = bool(row.pop("finite"))
            due = not finite or step % self.run_config.log_every == 0 or step == self.stage.steps
            if due:
                self.last = {name: float(value) for name, value in jax.device_get(row).items()}
                self.rows.write(self.stage.name, step, self.last)
            if not finite:
                self.checkpoints.wait()
                raise NonFiniteError(
                    f"stage {self.stage.name!r} step {step}: loss {self.last['loss']}, gradient norm "
                    f"{self.last['grad_norm']}; the last good checkpoint is step {self.checkpoints.latest()} in "
                    f"{self.checkpoints.directory}"
                )
            self.progress.update(step, {"loss": row["loss"]})

    def _evaluate(self, train_state: TrainState, step: int) -> dict[str, float]:
        self._look(0)
        metrics = evaluate(self.stage, self.mesh, train_state.weights, train_state.state, self.frozen, self.stop)
        if metrics:
            self.rows.write(self.stage.name, step, {f"eval/{name}": value for name, value in metrics.items()})
            values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            self.say(f"{self.stage.name} {step}/{self.stage.steps}  evaluation: {values}")
        return metrics


def _started(workdir: storage.Place) -> bool:
    """Whether something was trained there."""
    try:
        return storage.exists(workdir / "metrics.jsonl")
    except OSError as error:
        raise ValueError(f"cannot read {workdir}: {error}") from error


def _load(workdir: storage.Place, stage: Stage, mesh: Mesh, step: int) -> StageResult:
    params, state = load_params(workdir, stage.name, step, shardings=lambda tree: shardings(mesh, tree, stage.rules))
    return StageResult(params, state, step, {})


def _may_differ(recipe: Recipe) -> set[str]:
    """Fields of the configuration that a run may go on with after they changed."""
    run = {field.name for field in dataclasses.fields(RunConfig)} - {"seed"}
    return run | {"steps", "path", "tokens", "workers"} | {f"{stage.name}_steps" for stage in recipe.stages}


def _check_stages(stages: tuple[Stage, ...]) -> None:
    for index, stage in enumerate(stages):
        before = [earlier.name for earlier in stages[:index]]
        if stage.name in before:
            raise ValueError(f"two stages are called {stage.name!r}")
        for name in stage.needs:
            if name not in before:
                raise ValueError(f"stage {stage.name!r} needs {name!r}, which is not an earlier stage: {before}")
        if (stage.eval_data is None) != (stage.eval_loss is None):
            raise ValueError(f"stage {stage.name!r} has only one of eval_data and eval_loss")
        for field, fine in (
            ("steps", stage.steps >= 0),
            ("accumulate", stage.accumulate >= 1),
            ("ema", 0 <= stage.ema < 1),
        ):
            if not fine:
                raise ValueError(f"stage {stage.name!r}: {field}={getattr(stage, field)} is out of range")
