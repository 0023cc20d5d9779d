"""Held-out metrics of a stage."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgen.recipe import Stage
from jaxgen.train.mesh import batch_parts, batch_share, replicate_batch, shard_batch
from kernels_pallas import partitioned

__all__ = ["evaluate"]

PyTree = Any

# Batches in flight: enough that the devices do not wait for the host, few enough that batches do not fill their memory.
_IN_FLIGHT = 2


def evaluate(
    stage: Stage,
    mesh: Mesh,
    params: PyTree,
    state: PyTree,
    frozen: dict,
    stop: Callable[[], int | bool] = lambda: False,
) -> dict[str, float]:
    """Means of `stage.eval_loss` over the examples of `stage.eval_data`.

    Args:
      stage: has `eval_loss` and `eval_data`.
      mesh, params, state, frozen: as in training.
      stop: asked before each batch; once true, the result is empty.

    Raises:
      ValueError: there are no examples.
    """
    key, parts = jax.random.key(0), batch_parts(mesh)
    total, count, shares = collections.defaultdict(float), 0, batch_share(mesh)[1]
    in_flight = collections.deque()

    def look(leave: int) -> None:
        while len(in_flight) > leave:
            size, metrics = in_flight.popleft()
            for name, value in jax.device_get(metrics).items():
                total[name] += size * float(value)

    for index, batch in enumerate(stage.eval_data(*batch_share(mesh))):
        if stop():
            return {}
        size = len(jax.tree.leaves(batch)[0])
        # The last batch may be too small to be split: every device then computes all of it.
        whole = size * shares % parts
        batch = replicate_batch(mesh, batch) if whole else shard_batch(mesh, batch)
        in_flight.append((size, _eval_step(stage.eval_loss, mesh, params, state, batch, jax.random.fold_in(key, index), frozen)))
        count += size
        look(_IN_FLIGHT)
    if not count:
        raise ValueError(f"stage {stage.name!r}: eval_data has no examples")
    look(0)
    return {name: value / count for name, value in total.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _eval_step(eval_loss: Callable, mesh: Mesh, *args):
    with partitioned(mesh):
        return eval_loss(*args)
