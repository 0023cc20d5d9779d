"""What saving costs a training: the seconds its loop stands still, and those until a checkpoint is complete."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen.train import Checkpoints, TrainState

__all__ = ["bench", "make_state"]

WIDTH = 2048  # of the matrices that stand for a model's


def make_state(parameters: int, *, moments: bool = True) -> TrainState:
    """A training state of about so many float32 parameters, in square matrices, with Adam's two moments of each or none.

    All numbers are random: checkpoints are compressed.
    """
    width = min(WIDTH, math.isqrt(parameters))
    count = max(1, round(parameters / width**2))

    @jax.jit
    def make():
        noise = jax.random.normal(jax.random.key(0), (width, width))
        params = {f"layer_{i:03d}": {"kernel": noise + i} for i in range(count)}
        opt_state = optax.scale_by_adam().init(params) if moments else ()
        opt_state = jax.tree.map(lambda x: noise if x.ndim else x, opt_state)
        return TrainState(
            step=jnp.zeros((), jnp.int32), params=params, state=(), opt_state=opt_state, ema=None, key=jax.random.key(0)
        )

    return jax.block_until_ready(make())


def bench(parameters: int, *, folder: str | os.PathLike | None = None) -> Iterator[dict[str, Any]]:
    """A row for parameters alone, for them with Adam's moments, and for a save of these that comes while one is running.

    `blocked_s` is how long `Checkpoints.save` keeps the training's loop. On accelerators that is mostly the copying out of their
    memory; on a CPU nothing is copied, as the next update finds the buffers in use and takes new ones. Training goes on until the
    checkpoint is complete, `complete_s` after the call. A second save first waits for the one that is running, so that the host
    never holds more than one copy. `copy_s` is what NumPy needs to copy the same bytes in the same minute, to judge by.

    Args:
      parameters: how many, in float32.
      folder: where checkpoints are written, and removed; the system's temporary folder by default.

    Raises:
      ValueError: no positive number, or the disk is full.
    """
    if parameters < 1:
        raise ValueError(f"parameters={parameters}: must be >= 1")
    data = iter(grain.MapDataset.range(8).batch(2).to_iter_dataset())
    for moments in (False, True):
        state = make_state(parameters, moments=moments)
        sizes = [x.nbytes for x in jax.tree.leaves(state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        about = {
            "what": "parameters and moments" if moments else "parameters",
            "parameters_M": round(sum(x.size for x in jax.tree.leaves(state.params)) / 1e6, 1),
            "GB": round(sum(sizes) / 1e9, 3),
            "copy_s": round(_copy(state), 3),
        }
        with tempfile.TemporaryDirectory(dir=folder) as workdir, Checkpoints(workdir, "stage", keep=1) as checkpoints:
            yield about | _timed(checkpoints, 1, state, data)
            if moments:
                checkpoints.save(2, state, data)
                yield about | {"what": "the same, one still running"} | _timed(checkpoints, 3, state, data)


def _timed(checkpoints: Checkpoints, step: int, state: TrainState, data: Any) -> dict[str, float]:
    start = time.perf_counter()
    checkpoints.save(step, state, data)
    blocked = time.perf_counter() - start
    checkpoints.wait()
    return {"blocked_s": round(blocked, 3), "complete_s": round(time.perf_counter() - start, 3)}


def _copy(state: TrainState) -> float:
    """Seconds that NumPy needs to copy the arrays into memory that was never touched, as a first save does."""
    start = time.perf_counter()
    for x in jax.tree.leaves((state.params, state.opt_state)):
        np.array(x)
    return time.perf_counter() - start
