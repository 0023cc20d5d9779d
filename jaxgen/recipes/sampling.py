"""Calling a recipe's sampler where its parameters lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxgen.train import spread
from kernels_pallas import partitioned

__all__ = ["sample_batch"]


def sample_batch(
    recipe, params: Mapping[str, Any], key, asked: np.ndarray | Sequence[str], *, mesh: Mesh | None = None, **settings
) -> dict[str, Any]:
    """What a recipe's sampler makes in one call; on a mesh its rows, and its kernels, are split over the axes of the batch.

    What comes back may lie on the devices of many processes: `jaxgen.hosts.to_host` reads it.

    Args:
      recipe: a `jaxgen.recipe.Recipe`.
      params: by stage.
      key: the same in all processes.
      asked: labels [b], or prompts; all of them in each process.
      mesh: where `params` lie; None is one device. A sampler that was called with one mesh keeps to it in its process.
      settings: of the sampler.

    Raises:
      ValueError: labels that the mesh does not divide, or see the recipe's sampler.
    """
    if mesh is None:
        return recipe.sample(params, key, asked, **settings)
    with partitioned(mesh):
        return recipe.sample(params, key, spread(mesh, asked) if isinstance(asked, np.ndarray) else asked, **settings)
