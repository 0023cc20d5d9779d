"""Sampling entity by entity: each is carried from noise to data by a flow, given the finished ones (Ren et al. 2025)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.guidance import Guided, guide, scale_ramp
from jaxgen.decoding.step import StepFn, View
from jaxgen.orders import Order
from jaxgen.paths_flow import METHODS, integrate_with

__all__ = ["Draw", "sample_entities"]

# (positions [q], 0 for the start and i for the i-th step of the solver) -> standard normal numbers [b, q, c].
Draw = Callable[[Int[Array, "q"], Any], Float[Array, "b q c"]]


def sample_entities(
    step: StepFn,
    order: Order,
    draw: Draw,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    times: Float[Array, " steps+1"],
    solver: str = "noisy",
    cfg: Any = 0.0,
) -> Float[Array, "b L c"]:
    """Samples every entity in turn.

    A finished entity is read once more, at level 0, and its keys and values stay in the cache; the calls of the solver read the
    noisy one and leave nothing. (The released sampler makes the first of those calls together with that of the finished entity.)
    Entities of equal size after the first are one compiled loop.

    Args:
      step: the model, unguided: velocities at noisy tokens; its cache has 2b rows.
      order: an entity a step.
      draw: the noise.
      params: passed to `step`.
      cache: empty, with a static length and room for `order.length` positions: a `KVCache`, or a tree of some.
      cond: the model's condition, rows [2b]: conditional then unconditional.
      times: levels, from 1 to 0.
      solver: a method of `integrate_with`; "noisy" is the released one.
      cfg: guidance; the weight t in (1 + t) conditional - t unconditional grows from 0 at the first entity to this at the last,
        and is this for an only one.

    Returns:
      The entities, one after another.

    Raises:
      ValueError: an unknown solver.
    """
    if solver not in METHODS:
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(METHODS)}")
    guided = guide(step)

    def finish(cache, x, pos):
        """The cache with a finished entity."""
        _, cache = guided(params, cache, View(x, pos, time=jnp.float32(0)), Guided(cond, 0.0))
        return _each(cache, lambda c: c.commit(x.shape[1]))

    def solve(cache, k, pos):
        """(entity k, the cache with nothing new but what is written over)."""
        weight = scale_ramp(cfg, k, order.steps) if order.steps > 1 else cfg

        def velocity(x, t, cache):
            out, cache = guided(params, cache, View(x, pos, time=t), Guided(cond, weight))
            return out.params, cache

        noise = (lambda i: draw(pos, i + 1)) if solver == "noisy" else None
        return integrate_with(velocity, draw(pos, 0), times, cache, method=solver, draw=noise)

    def following(carry, at):
        """Entity k, after the one that the carry holds."""
        cache, x = carry
        k, before, pos = at
        x, cache = solve(finish(cache, x, before), k, pos)
        return (cache, x), x

    x, cache = solve(cache, 0, jnp.arange(order.sizes[0]))
    out = [x]
    for _, run in itertools.groupby(range(1, order.steps), lambda k: (order.sizes[k - 1], order.sizes[k])):
        run = list(run)
        before, pos = (jnp.stack([jnp.arange(*order.span(k - back)) for k in run]) for back in (1, 0))
        if len(run) == 1:
            (cache, x), _ = following((cache, x), (run[0], before[0], pos[0]))
            out.append(x)
            continue
        # In a loop the length is not known while tracing, and comes out as one that is.
        cache = _each(cache, lambda c: dataclasses.replace(c, length=jnp.int32(c.length)))
        (cache, x), made = jax.lax.scan(following, (cache, x), (jnp.asarray(run), before, pos))
        out += list(made)
    return jnp.concatenate(out, axis=1)


def _each(caches: Any, change: Callable) -> Any:
    """`change` of every cache in a tree."""
    return jax.tree.map(change, caches, is_leaf=lambda c: hasattr(c, "commit"))
