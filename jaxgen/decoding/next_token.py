"""Sampling an order's steps in turn, such as one token after another: one model call a step, the loop compiled once."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jaxgen.decoding.grammar import Automaton
from jaxgen.decoding.guidance import Guided, guide
from jaxgen.decoding.next_scale import Settings
from jaxgen.decoding.noise import gumbel
from jaxgen.decoding.step import StepFn, View
from jaxgen.decoding.transforms import truncate
from jaxgen.orders import Order

__all__ = ["Drawn", "begin_tokens", "draw_tokens", "sample_tokens"]


class Drawn(NamedTuple):
    """What has been drawn, and what the next step needs to know.

    Attributes:
      tokens: [b, l + w - 1] for steps of at most w tokens; what has not been drawn means nothing.
      cache: of the model.
      state: of the grammar, None without one.
      ended: rows that the stop token has ended.
    """

    tokens: Int[Array, "b l"]
    cache: Any
    state: Any
    ended: Bool[Array, "b"]


def sample_tokens(
    step: StepFn,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    batch: int,
    order: Order,
    key: Key[Array, ""],
    settings: Settings = Settings(),
    merged: bool = False,
    grammar: Automaton | None = None,
    stop: int | None = None,
) -> Int[Array, "b l"]:
    """Samples the order's tokens, those of a step all at once, w of them at most.

    All calls are as wide as the widest step, so that one program serves all: what is beyond a smaller step's end is written over
    by the next.

    Args:
      step: the model, unguided, with the next positions as `view.pos` [w] and the number of the call as `view.time`. It reads
        `view.tokens` [b, w], the tokens of the step before; at the first call, when there are none, it reads one thing of its
        own, such as a class. Of what it reads the first n count, all others are masked by `view.mask`. Its cache has 2b rows.
      params: passed to `step`.
      cache: empty, with room for all that is read, and w - 1 more.
      cond: the model's condition, rows [2b]: conditional then unconditional.
      batch: b.
      order: of the positions.
      key: row i's noise depends on the key, i and the position only.
      settings: `cfg` is the weight t in (1 + t) conditional - t unconditional, one number or one for each position, [l].
      merged: a call leaves one position in the cache, whatever it reads; the order's steps are of one size.
      grammar: what may be sampled after what; one position a step.
      stop: a token that ends a row: all that follows is this token, and once all rows have ended there are no more calls. One
        position a step.

    Raises:
      ValueError: `merged` with steps of several sizes; `grammar` or `stop` with steps of several positions.
    """
    if merged and len(set(order.sizes)) > 1:
        raise ValueError(f"merged=True: expected steps of one size, not {sorted(set(order.sizes))}")
    if max(order.sizes) > 1 and (grammar is not None or stop is not None):
        raise ValueError(f"grammar and stop read one token a step; this order has steps of {max(order.sizes)}")
    fields = dict(order=order, grammar=grammar, stop=stop)
    drawn = begin_tokens(cache, batch, **fields)
    drawn = draw_tokens(
        step, drawn, 0, order.steps, params=params, cond=cond, key=key, settings=settings, merged=merged, **fields
    )
    return drawn.tokens[:, : order.length]


def begin_tokens(cache: Any, batch: int, *, order: Order, grammar: Automaton | None = None, stop: int | None = None) -> Drawn:
    """Nothing drawn yet; arguments are those of `sample_tokens`."""
    tokens = jnp.full((batch, order.length + max(order.sizes) - 1), stop or 0, jnp.int32)
    cache = dataclasses.replace(cache, length=jnp.int32(cache.length))
    return Drawn(tokens, cache, None if grammar is None else grammar.begin((batch,)), jnp.zeros((batch,), bool))


def draw_tokens(
    step: StepFn,
    drawn: Drawn,
    first: int | Int[Array, ""],
    last: int | Int[Array, ""],
    *,
    params: Any,
    cond: Any,
    order: Order,
    key: Key[Array, ""],
    settings: Settings = Settings(),
    merged: bool = False,
    grammar: Automaton | None = None,
    stop: int | None = None,
) -> Drawn:
    """Draws the steps from `first` up to `last`, which may be traced; other arguments are those of `sample_tokens`."""
    batch, width = drawn.tokens.shape[0], max(order.sizes)
    guided, rows = guide(step), jnp.arange(batch)
    starts, reads = jnp.asarray((0, *order.ends[:-1])), jnp.asarray((1, *order.sizes[:-1]))
    place, weights = np.arange(width), jnp.broadcast_to(settings.cfg, (order.length,))

    def one(k, drawn):
        tokens, cache, state, ended = drawn
        before = jax.lax.dynamic_slice_in_dim(tokens, starts[jnp.maximum(k - 1, 0)], width, axis=1)
        pos = starts[k] + place
        mask = None if merged or width == 1 else jnp.broadcast_to(place < reads[k], (width, width))
        out, cache = guided(params, cache, View(before, pos, mask, k), Guided(cond, weights[pos][:, None]))
        logits = out.params if grammar is None else jnp.where(grammar.allowed(state)[:, None], out.params, -jnp.inf)
        logits = truncate(logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        ids = jnp.argmax(logits + gumbel(key, rows, pos, logits.shape[-1]), axis=-1).astype(jnp.int32)
        if stop is not None:
            ids = jnp.where(ended[:, None], stop, ids)
            ended = ids[:, 0] == stop
        if grammar is not None:
            state = grammar.move(state, ids[:, 0])
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, ids, starts[k], axis=1)
        return Drawn(tokens, cache.commit(1 if merged else reads[k]), state, ended)

    if stop is None:
        return jax.lax.fori_loop(first, last, one, drawn)

    def running(loop):
        return (loop[0] < last) & ~loop[1].ended.all()

    return jax.lax.while_loop(running, lambda loop: (loop[0] + 1, one(*loop)), (jnp.int32(first), drawn))[1]
