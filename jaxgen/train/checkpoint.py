"""Checkpoints of training: `<workdir>/checkpoints/<stage>/<step>/`.

Written by orbax in the background: a checkpoint is built in a temporary directory that is renamed when everything is on
disk, so that a directory named by a number is whole; in a bucket its last file says so. Each holds `state` (the training
state, or only weights if a converter wrote it), `data` (the input iterator's position) and `metrics` (the evaluation made at
that step, if any).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import grain.checkpoint
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from jaxgen import storage
from jaxgen.train import reading
from jaxgen.train.distributed import lost_process
from jaxgen.train.step import TrainState

__all__ = ["Checkpoints", "load_params", "save_params"]

PyTree = Any


class Checkpoints:
    """The checkpoints of one stage, opened for training. Use it as a context manager: leaving it waits for the last save.

    Args:
      workdir: the run's directory, on a disk or in a bucket (see `jaxgen.storage.place`).
      stage: the stage's name.
      keep: how many of the latest checkpoints to keep; the one with the lowest evaluation loss is kept besides.
      log: told of what an interrupted run left half-written, which is then removed.
    """

    def __init__(self, workdir: str | os.PathLike, stage: str, *, keep: int = 2, log: Callable[[str], None] = print):
        self.directory = reading.directory(workdir, stage)
        if jax.process_index() == 0:
            for path in reading.incomplete(self.directory):
                log(f"removing the incomplete checkpoint {path}")
                storage.remove_tree(path)
        self.best_loss()  # reads what was saved beside each checkpoint, so that a damaged one is named
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(reading.quiet())
        with reading.readable(self.directory, "cannot be opened"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_LatestAndBest(keep), best_fn=reading.eval_loss, best_mode="min"
                ),
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        # An error on its way out says more than what a failed save would add to it.
        with self._quiet, contextlib.suppress(ValueError) if error else contextlib.nullcontext():
            try:
                self.wait()
            finally:
                self._manager.close()

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, in order."""
        return reading.steps(self.directory)

    def latest(self) -> int | None:
        """The last of `steps`."""
        return max(self.steps(), default=None)

    def best_loss(self) -> float:
        """The lowest evaluation loss among the checkpoints; infinite if none was evaluated."""
        return min((reading.read_loss(self.directory / str(step)) for step in self.steps()), default=float("inf"))

    def save(self, step: int, train_state: TrainState, data: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts to save; returns when the arrays have left the devices.

        Args:
          step: updates done, names the checkpoint.
          train_state: may be donated afterwards.
          data: the grain iterator, in its state after `step` batches.
          metrics: of an evaluation at this step; `"loss"` ranks the checkpoint.

        Raises:
          ValueError: this or the save before it failed (a full disk); the earlier checkpoints are intact.
        """
        with self._saving():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(train_state), data=grain.checkpoint.CheckpointSave(data)),
                metrics=metrics or {},
            )

    def check(self) -> None:
        """Raises what a save in the background ran into, without waiting for it."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until the last save is complete; raises as `save` does."""
        with self._saving():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _saving(self):
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many kinds
            if jax.process_index() == 0:
                with contextlib.suppress(Exception):  # the first failure says more
                    for path in reading.incomplete(self.directory):
                        storage.remove_tree(path)
            latest = self.latest()
            rest = "there is no earlier one" if latest is None else f"the one of step {latest} is intact"
            said = lost_process(error) or reading.reason(error)
            raise ValueError(f"cannot save a checkpoint in {self.directory} ({rest}): {said}") from error

    def restore(self, abstract: TrainState, data: Any, step: int | None = None) -> TrainState:
        """The training state saved at `step` (the latest by default), placed as `abstract` says; moves `data` to its place.

        The number of processes may have changed since: a data iterator's state says how many batches it has made, and so
        is the same in all of them.

        Raises:
          ValueError: the checkpoint is missing, damaged or does not fit; its path and the parameters are named.
        """
        path = reading.find(self.directory, step)
        reading.check_fit(path, vars(abstract))
        with reading.readable(path):
            step = int(path.name)
            data.set_state(reading.data_state(path))
            state = ocp.args.StandardRestore(abstract)
            return self._manager.restore(step, args=ocp.args.Composite(state=state))["state"]

    def has_training_state(self, step: int | None = None) -> bool:
        """Whether the checkpoint can be resumed; one of `save_params` holds only weights."""
        return "step" in reading.metadata(reading.find(self.directory, step))

    def restore_weights(self, abstract: TrainState, step: int | None = None) -> tuple[dict[str, PyTree], PyTree | None]:
        """`(params, state)` of a checkpoint of weights, placed and checked as in `restore`.

        It may hold only some of the modules, the entries of `params`, and no state, which is then `None`.
        """
        path = reading.find(self.directory, step)
        saved = reading.metadata(path)
        wanted = {"params": {name: tree for name, tree in abstract.params.items() if name in saved["params"]}}
        if jax.tree.leaves(saved["state"]):
            wanted["state"] = abstract.state
        reading.check_fit(path, wanted)
        restored = reading.restore_tree(path, wanted)
        return restored["params"], restored.get("state")

    def check_shapes(self, params: PyTree, step: int | None = None) -> None:
        """Raises ValueError if the checkpoint has parameters of other shapes than `params`, of those that both have."""
        reading.check_common_shapes(reading.find(self.directory, step), {"params": params})


def load_params(
    workdir: str | os.PathLike,
    stage: str,
    step: int | str | None = None,
    *,
    shardings: Callable[[PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """The trained weights of a stage, for inference: no optimizer, no model and no mesh is needed.

    Args:
      workdir: the run's directory.
      stage: the stage's name.
      step: which checkpoint; `None` is the latest, `"best"` the one with the lowest evaluation loss.
      shardings: maps a tree of `ShapeDtypeStruct` to a tree of shardings; by default everything lies on the first device.

    Returns:
      `(params, state)`: the averaged parameters if an average was kept, and the stage's other state, both as the dicts
      and lists they were saved as.

    Raises:
      ValueError: there is no such checkpoint (those that exist are named), or it is damaged.
    """
    path = reading.find(reading.directory(workdir, stage), step)
    saved = reading.metadata(path)
    name = "ema" if saved.get("ema") is not None else "params"
    wanted = {name: saved[name], "state": saved["state"]}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda x: device, wanted)
    else:
        places = {key: shardings(tree) for key, tree in wanted.items()}
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), wanted, places)
    restored = reading.restore_tree(path, wanted)
    return restored[name], restored["state"]


def save_params(workdir: str | os.PathLike, stage: str, params: PyTree, state: PyTree = ()) -> None:
    """Writes weights made elsewhere as the stage's checkpoint of step 0: `load_params` reads it, training starts from it.

    Raises:
      ValueError: the stage has checkpoints already, or the disk is full.
    """
    with Checkpoints(workdir, stage) as checkpoints:
        if checkpoints.steps():
            raise ValueError(f"{checkpoints.directory} already holds the checkpoints {checkpoints.steps()}")
        with checkpoints._saving():
            weights = {"params": params, "state": state}
            checkpoints._manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(weights)), metrics={})


class _LatestAndBest(PreservationPolicy):
    """Keeps the last n checkpoints and the one with the lowest evaluation loss."""

    def __init__(self, n: int):
        self.n = n

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        losses = [reading.eval_loss(checkpoint.metrics) for checkpoint in checkpoints]
        best = int(np.argmin(losses)) if losses and np.isfinite(min(losses)) else None
        return [i >= len(losses) - self.n or i == best for i in range(len(losses))]
