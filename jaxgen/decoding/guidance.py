"""Classifier-free guidance as a wrapper around a step function: the batch is doubled, the two laws are combined."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.decoding.step import Out, StepFn, View

__all__ = ["Guided", "GuidedCache", "cosine_ramp", "guide", "scale_ramp"]


class Guided(NamedTuple):
    """The condition that a guided step takes.

    Attributes:
      cond: the model's condition with rows [2b]: first conditional, then unconditional.
      weight: t in (1 + t) conditional - t unconditional; a scalar or one that broadcasts to [b, q, v].
    """

    cond: Any
    weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuidedCache:
    """A cache of 2b rows as one of b, for samplers that commit another number of positions a row, such as `speculate`.

    Attributes:
      cache: rows of the condition, then those without it.
    """

    cache: Any

    @property
    def capacity(self) -> int | None:
        """The positions that fit, None if the cache doesn't say."""
        return getattr(self.cache, "capacity", None)

    def commit(self, n, path=None) -> GuidedCache:
        """See `KVCache.commit`."""
        return GuidedCache(self.cache.commit(_twice(n, 1), _twice(path, 2)))

    def restore(self, saved: GuidedCache) -> GuidedCache:
        """See `KVCache.restore`."""
        return GuidedCache(self.cache.restore(saved.cache))


def guide(step: StepFn) -> StepFn:
    """A step over b rows from one over 2b (Ho & Salimans 2021): logits = (1 + t) conditional - t unconditional.

    The cache must have 2b rows, or be a `GuidedCache` of such a one; the condition is a `Guided`; the view has b.
    """

    def guided(params, cache, view, cond: Guided):
        doubled = View(_twice(view.tokens, 1), _twice(view.pos, 2), _twice(view.mask, 3), _twice(view.time, 1))
        wrapped = isinstance(cache, GuidedCache)
        out, cache = step(params, cache.cache if wrapped else cache, doubled, cond.cond)
        t = cond.weight

        def combine(x):
            conditional, unconditional = jnp.split(x, 2)
            return (1 + t) * conditional - t * unconditional

        feats = None if out.feats is None else jnp.split(out.feats, 2)[0]
        return Out(jax.tree.map(combine, out.params), feats), GuidedCache(cache) if wrapped else cache

    return guided


def _twice(x, rank: int):
    """`x` for both halves, where it has an entry a row (that is, at least `rank` axes)."""
    return x if x is None or jnp.ndim(x) < rank else jnp.concatenate([x, x])


def scale_ramp(cfg, step: int, steps: int):
    """VAR's published ramp: t = cfg * step / (steps - 1), so that the first scale is unguided."""
    return cfg * (step / max(steps - 1, 1))


def cosine_ramp(cfg, power, steps: int):
    """The weight at each step, [steps]: cfg (1 - cos(pi (i / steps)^power)) / 2 at step i, from 0 up (Gao et al. 2023, MDT).

    Larger powers keep guidance away for longer. RAR samples with it.
    """
    share = (jnp.arange(steps) / steps) ** power
    return cfg * (1 - jnp.cos(jnp.pi * share)) / 2
