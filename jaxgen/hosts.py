"""Reading arrays that lie on the devices of several processes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["to_host"]

PyTree = Any


def to_host(tree: PyTree) -> PyTree:
    """Arrays that may lie on the devices of many processes, as whole NumPy arrays in each of them.

    To be called in all processes alike. What a process can read by itself, it reads without the others.
    """
    return jax.tree.map(_read, tree)


def _read(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
