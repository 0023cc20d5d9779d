"""Gradients of a batch that lies on many devices, in one or several micro-batches.

Left to itself (`gradients`), XLA's partitioner sums the gradients of all devices where they arise: once for each micro-batch, in
the type in which the backward pass computes them, which for parameters that are used in bfloat16 is bfloat16. Where parameters
are split (`fsdp`, `tensor`) nothing else is possible, as no device has room for all gradients: they are then summed and
scattered, micro-batch by micro-batch.

Where every device has all parameters (a mesh of `data` alone), `local_gradients` lets each add up its own gradients over all its
micro-batches, in the parameters' type, and sums over devices once an update, in a type of choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgen.recipe import Stage
from jaxgen.train.mesh import batch_parts, batch_sharding, batch_share, check_split, shardings

__all__ = ["REDUCE_DTYPES", "check_batch", "check_mesh", "gradients", "local_gradients", "reducible"]

REDUCE_DTYPES = ("float32", "bfloat16")

PyTree = Any


def gradients(
    stage: Stage, mesh: Mesh, params: PyTree, state: PyTree, batch: PyTree, key: jax.Array, step: jax.Array, frozen: dict
) -> tuple[PyTree, PyTree, dict]:
    """Mean gradients over the micro-batches, the state after the last, and mean metrics.

    Raises:
      ValueError: the batch cannot be split into micro-batches.
    """
    return _accumulated(stage, params, state, batch, key, step, frozen, lambda batch, n: _split(batch, n, mesh))


def local_gradients(
    stage: Stage, mesh: Mesh, dtype: str, params: PyTree, state: PyTree, batch: PyTree, key: jax.Array, step, frozen: dict
) -> tuple[PyTree, PyTree, dict]:
    """As `gradients`, of what each device finds by itself; then one sum over the devices in `dtype`.

    A loss that is a mean over examples has the same gradients either way, but for rounding; one that mixes the examples of a
    batch sees those of one device. Each device draws random numbers of its own.

    Args:
      stage, mesh, dtype: as `reducible` allows.
    """

    def local(params, state, batch, key, step, frozen):
        own = jax.random.fold_in(key, jax.lax.axis_index("data"))
        grads, _, metrics = _accumulated(stage, params, state, batch, own, step, frozen, _take_turns)
        grads = jax.tree.map(lambda g: g.astype(dtype), grads)
        return jax.lax.psum((grads, metrics), "data")

    # Without the check of what varies over devices, parameters count as each device's own, and so do their gradients.
    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data"), P(), P(), P()), out_specs=P(), check_vma=False)
    grads, metrics = spread(params, state, batch, key, step, frozen)
    count = mesh.shape["data"]
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype) / count, grads, params)
    return grads, state, {name: value / count for name, value in metrics.items()}


def _accumulated(
    stage: Stage, params, state, batch, key, step, frozen, split: Callable[[PyTree, int], PyTree]
) -> tuple[PyTree, PyTree, dict]:
    """Over the micro-batches that `split` makes."""
    value_and_grad = jax.value_and_grad(stage.loss, has_aux=True)

    def micro(state, batch, key):
        (loss, (metrics, state)), grads = value_and_grad(params, state, batch, key, step, frozen)
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in {**metrics, "loss": loss}.items()}
        return grads, state, metrics

    n = stage.accumulate
    if n == 1:
        return micro(state, batch, key)

    def body(carry, xs):
        total, state = carry
        grads, state, metrics = micro(state, xs[1], jax.random.fold_in(key, xs[0]))
        return (jax.tree.map(lambda t, g: t + g / n, total, grads), state), metrics

    zeros = jax.tree.map(jnp.zeros_like, params)
    (grads, state), metrics = jax.lax.scan(body, (zeros, state), (jnp.arange(n), split(batch, n)))
    return grads, state, jax.tree.map(jnp.mean, metrics)


def _take_turns(batch: PyTree, n: int) -> PyTree:
    """`[b, ...]` as `[n, b / n, ...]`; micro-batch i takes every n-th example."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), batch)


def _split(batch: PyTree, n: int, mesh: Mesh) -> PyTree:
    """As `_take_turns`, by which no example changes its device."""
    axes = batch_sharding(mesh).spec[0]
    for x in jax.tree.leaves(batch):
        check_split(mesh, x.shape[0], accumulate=n)
    placed = NamedSharding(mesh, P(None, axes))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, placed), _take_turns(batch, n))


def check_mesh(mesh: Mesh, dtype: str) -> None:
    """That devices can sum their gradients once an update.

    Raises:
      ValueError: an unknown type, or a mesh that splits parameters.
    """
    if dtype not in REDUCE_DTYPES:
        raise ValueError(f"reduce_dtype={dtype!r}: expected one of {', '.join(REDUCE_DTYPES)}")
    if mesh.shape["data"] != mesh.size:
        raise ValueError(
            f"reduce_dtype={dtype!r}: mesh {dict(mesh.shape)} splits parameters, whose gradients are reduced micro-batch by "
            "micro-batch where they arise; a mesh of data alone can reduce them once"
        )


def reducible(stage: Stage, mesh: Mesh, frozen: dict, dtype: str | None, log: Callable[[str], None] | None = None) -> str | None:
    """`dtype` where `local_gradients` can be had, `None` where gradients are left to the compiler.

    Args:
      stage, mesh, frozen: as in `jaxgen.train.make_step`.
      dtype: what is wanted.
      log: is told of a stage that cannot follow, as it has a state that changes in training (codebook statistics), which has to
        see whole batches; without it that is an error.

    Raises:
      ValueError: as `check_mesh`, such a stage, or one with rules that split parameters over `data`.
    """
    if dtype is None:
        return None
    check_mesh(mesh, dtype)
    params, state = jax.eval_shape(stage.init, jax.random.key(0), frozen)
    if jax.tree.leaves(state):
        if log is None:
            raise ValueError(f"reduce_dtype={dtype!r}: stage {stage.name!r} has a state that has to see whole batches")
        log(f"{stage.name}: reduce_dtype={dtype} is left out, as the stage's state has to see whole batches")
        return None
    if any(any(place.spec) for place in jax.tree.leaves(shardings(mesh, params, stage.rules))):
        raise ValueError(f"reduce_dtype={dtype!r}: stage {stage.name!r} splits parameters over data")
    return dtype


def check_batch(stage: Stage, mesh: Mesh) -> None:
    """That a batch of the stage's data, of which one is read, can be split over the mesh and into micro-batches.

    Raises:
      ValueError: the stage, and the numbers that do not divide each other.
    """
    if batch_parts(mesh) * stage.accumulate == 1 or not stage.steps:
        return
    index, count = batch_share(mesh)
    with contextlib.closing(iter(stage.data(index, count))) as data:
        size = len(jax.tree.leaves(next(data))[0]) * count
    check_split(mesh, size, accumulate=stage.accumulate, where=f"stage {stage.name!r}: ")
