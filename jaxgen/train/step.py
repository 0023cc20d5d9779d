"""The training state and the jitted update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, PRNGKeyArray

from jaxgen.hosts import to_host
from jaxgen.recipe import Stage
from jaxgen.train.gradients import gradients, local_gradients, reducible
from jaxgen.train.mesh import batch_sharding, path_name, replicated, shardings
from kernels_pallas import partitioned

__all__ = ["TrainState", "abstract_state", "init_state", "make_step"]

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes.

    Attributes:
      step: updates done.
      params: the trained parameters.
      state: the stage's other changing pytree.
      opt_state: the optimizer's.
      ema: exponential moving average of `params`, or `None`.
      key: the stage's random key; update t uses `fold_in(key, t)`, so that the key itself never changes.
    """

    step: Int[Array, ""]
    params: PyTree
    state: PyTree
    opt_state: PyTree
    ema: PyTree
    key: PRNGKeyArray

    @property
    def weights(self) -> PyTree:
        """The parameters to evaluate and to sample with: the average if one is kept."""
        return self.params if self.ema is None else self.ema


def _init(stage: Stage, key: PRNGKeyArray, frozen: dict) -> TrainState:
    init_key, train_key = jax.random.split(key)
    params, state = stage.init(init_key, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        state=state,
        opt_state=stage.optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if stage.ema else None,
        key=train_key,
    )


def abstract_state(stage: Stage, mesh: Mesh, frozen: dict) -> TrainState:
    """The shapes, dtypes and shardings of the stage's training state; nothing is computed.

    Parameters and `state` are placed by `stage.rules`. The average, and those leaves of the optimizer's state that end in
    a parameter's path and have its shape (Adam's moments), lie where that parameter lies; the rest is replicated.

    Raises:
      ValueError: see `jaxgen.train.mesh.shardings`.
    """
    shapes = jax.eval_shape(lambda key, frozen: _init(stage, key, frozen), jax.random.key(0), frozen)
    params = shardings(mesh, shapes.params, stage.rules)
    placed = TrainState(
        step=replicated(mesh),
        params=params,
        state=shardings(mesh, shapes.state, stage.rules),
        opt_state=_like_params(mesh, shapes.opt_state, shapes.params, params),
        ema=None if shapes.ema is None else params,
        key=replicated(mesh),
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed)


def _like_params(mesh: Mesh, tree: PyTree, params: PyTree, placed: PyTree) -> PyTree:
    """Shardings for a tree that holds copies of the structure of `params`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    table = {path_name(path): (x.shape, s) for (path, x), s in zip(leaves, jax.tree.leaves(placed))}

    def place(path, leaf):
        for start in range(len(path)):
            shape, sharding = table.get(path_name(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def init_state(stage: Stage, key: PRNGKeyArray, mesh: Mesh, frozen: dict) -> TrainState:
    """A new training state, made where it will live: no device ever holds more than its part.

    Args:
      stage: what to train.
      key: decides the initial parameters and every random choice of the training.
      mesh: the devices.
      frozen: parameters of earlier stages by name, on the mesh.
    """
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(stage, mesh, frozen))
    made = jax.jit(lambda key, frozen: _init(stage, key, frozen), out_shardings=placed)(key, frozen)
    if stage.fill is None:
        return made
    state = jax.tree.map(lambda x, place: jax.device_put(to_host(x), place), stage.fill(frozen), placed.state)
    return made.replace(state=state)


def make_step(
    stage: Stage, mesh: Mesh, frozen: dict, *, reduce_dtype: str | None = None, log: Callable[[str], None] | None = None
) -> Callable[[TrainState, PyTree, dict], tuple[TrainState, dict]]:
    """The jitted update `(train_state, batch, frozen) -> (train_state, metrics)`; the state passed in is donated.

    The batch is split into `stage.accumulate` micro-batches whose gradients and metrics are averaged, which for a loss that
    is a mean over examples equals one large batch; `state` goes through them in order. If the loss or the gradient's norm
    is not finite, the update is undone: everything but `step` keeps its value, so that the last good parameters survive.

    Args:
      stage: what to train.
      mesh: the devices.
      frozen: parameters of earlier stages by name, or their shapes.
      reduce_dtype: of the one sum of all devices' gradients in an update, "float32" or "bfloat16"; `None` leaves to the compiler
        when and in what type it sums (see `jaxgen.train.gradients`).
      log: see `jaxgen.train.gradients.reducible`.

    Returns:
      A function whose metrics are the stage's, `"loss"`, `"grad_norm"` (before the optimizer's clipping) and `"finite"`
      (bool).

    Raises:
      ValueError: a `reduce_dtype` that the mesh or the stage does not allow; when traced, a batch that cannot be split into
        micro-batches.
    """
    reduce_dtype = reducible(stage, mesh, frozen, reduce_dtype, log)
    placed = jax.tree.map(lambda x: x.sharding, abstract_state(stage, mesh, frozen))

    def update(ts: TrainState, batch: PyTree, frozen: dict) -> tuple[TrainState, dict]:
        loss_key, update_key = jax.random.split(jax.random.fold_in(ts.key, ts.step))
        inputs = (ts.params, ts.state, batch, loss_key, ts.step, frozen)
        if reduce_dtype is None or mesh.size == 1:
            with partitioned(mesh):
                grads, state, metrics = gradients(stage, mesh, *inputs)
        else:
            grads, state, metrics = local_gradients(stage, mesh, reduce_dtype, *inputs)
        metrics["grad_norm"] = optax.global_norm(grads)
        metrics["finite"] = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        updates, opt_state = stage.optimizer.update(grads, ts.opt_state, ts.params)
        params = optax.apply_updates(ts.params, updates)
        if stage.after_update is not None:
            params, state = stage.after_update(params, state, update_key, ts.step)
        ema = None if ts.ema is None else optax.incremental_update(params, ts.ema, 1 - stage.ema)
        new = ts.replace(params=params, state=state, opt_state=opt_state, ema=ema)
        new = jax.tree.map(lambda new, old: jnp.where(metrics["finite"], new, old), new, ts)
        return new.replace(step=ts.step + 1), metrics

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(placed, batch_sharding(mesh), None),
        out_shardings=(placed, replicated(mesh)),
    )
