"""Classifier-free guidance as a wrapper around a step function: the batch is doubled, the two laws are combined."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.decoding.step import Out, StepFn, View

__all__ = ["Guided", "guide", "scale_ramp"]


class Guided(NamedTuple):
    """The condition that a guided step takes.

    Attributes:
      cond: the model's condition with rows [2b]: first conditional, then unconditional.
      weight: t in (1 + t) conditional - t unconditional; a scalar or one that broadcasts to [b, q, v].
    """

    cond: Any
    weight: Any


def guide(step: StepFn) -> StepFn:
    """A step over b rows from one over 2b (Ho & Salimans 2021): logits = (1 + t) conditional - t unconditional.

    The cache must have 2b rows; the condition is a `Guided`; the view has b.
    """

    def guided(params, cache, view, cond: Guided):
        doubled = View(_twice(view.tokens, 1), _twice(view.pos, 2), _twice(view.mask, 3), _twice(view.time, 1))
        out, cache = step(params, cache, doubled, cond.cond)
        t = cond.weight

        def combine(x):
            conditional, unconditional = jnp.split(x, 2)
            return (1 + t) * conditional - t * unconditional

        feats = None if out.feats is None else jnp.split(out.feats, 2)[0]
        return Out(jax.tree.map(combine, out.params), feats), cache

    return guided


def _twice(x, rank: int):
    """`x` for both halves, where it has an entry a row (that is, at least `rank` axes)."""
    return x if x is None or jnp.ndim(x) < rank else jnp.concatenate([x, x])


def scale_ramp(cfg, step: int, steps: int):
    """VAR's published ramp: t = cfg * step / (steps - 1), so that the first scale is unguided."""
    return cfg * (step / max(steps - 1, 1))
