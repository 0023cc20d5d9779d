"""The step function: the only thing that a sampler knows of a model.

    out, cache = step(params, cache, view, cond)

reads one query (`View`) in the light of what the cache holds, stages the query's keys and values, and returns the law
of what comes next (`Out`). Staged positions become permanent when the sampler commits them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

__all__ = ["Out", "StepFn", "View"]

PyTree = Any


class View(NamedTuple):
    """One query of q positions.

    Attributes:
      tokens: ids [b, q], or features [b, q, c] for models that read vectors.
      pos: absolute positions, [q] or [b, q], in any order.
      mask: which of the q positions each of them sees, [q, q] or [b, q, q]; None is all of them.
      time: noise level, or the index of the scale (a Python int); None where neither applies.
    """

    tokens: Int[Array, "b q"] | Float[Array, "b q c"]
    pos: Any
    mask: Bool[Array, "*b q q"] | None = None
    time: Any = None


class Out(NamedTuple):
    """What a step returns.

    Attributes:
      params: parameters of the law of each position, for categorical models float32 logits [b, q, v].
      feats: last hidden states [b, q, d], or None.
      aux: what else a model tells, for those who know it; samplers do not look at it.
    """

    params: PyTree
    feats: Float[Array, "b q d"] | None = None
    aux: PyTree = None


StepFn = Callable[[PyTree, PyTree, View, PyTree], tuple[Out, PyTree]]
