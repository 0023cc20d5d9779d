"""Sampling by scales: one model call a scale, all of its tokens at once (Tian et al. 2024, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.guidance import Guided, guide, scale_ramp
from jaxgen.decoding.noise import REPARAMETERISED, gumbel
from jaxgen.decoding.step import StepFn, View
from jaxgen.decoding.transforms import truncate
from jaxgen.orders import Order

__all__ = ["Known", "Settings", "sample_scales"]


class Settings(NamedTuple):
    """What a user may change between calls; all of it is traced.

    Attributes:
      cfg: guidance scale; the weight grows linearly over the scales from 0 to cfg.
      temperature: > 0.
      top_k: 0 is off, 1 is greedy.
      top_p: 0 is off.
    """

    cfg: Any = 1.5
    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 0.0


class Known(NamedTuple):
    """Tokens that are given, for in-painting, out-painting and editing.

    Attributes:
      tokens: [b, l], the tokens of the image to be edited.
      keep: [b, l], True where a token is kept.
    """

    tokens: Int[Array, "b l"]
    keep: Bool[Array, "b l"]


def sample_scales(
    step: StepFn,
    feed: Callable[..., tuple[Any, Float[Array, "b q c"] | None]],
    order: Order,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    carry: Any,
    inputs: Float[Array, "b q c"],
    key: Key[Array, ""],
    settings: Settings = Settings(),
    known: Known | None = None,
    smooth: bool = False,
) -> tuple[Int[Array, "b l"], Any]:
    """Samples every scale in turn.

    The loop over scales is unrolled: each has its own static shapes, so that attention reads just the cached prefix and
    needs no mask.

    Args:
      step: the model, unguided; its cache has 2b rows.
      feed: `(params, carry, scale, tokens) -> (carry, inputs of the next scale)`, the tokenizer's side: adds the new
        tokens to the picture so far. `tokens` are ids [b, q] or, with `smooth`, probabilities [b, q, v].
      order: the scales.
      params: passed to `step` and `feed`.
      cache: empty, with a static length and room for `order.length` positions.
      cond: the model's condition, rows [2b]: conditional then unconditional.
      carry: the empty picture.
      inputs: features of the first scale.
      key: of this call; row i's noise depends on the key, i and the position only.
      settings: see `Settings`.
      known: tokens to force.
      smooth: feed Gumbel-softmax mixtures of codes instead of the sampled codes, which the authors use for nicer pictures
        (not for measuring); the returned tokens are the mixtures' largest entries.

    Returns:
      (tokens [b, l], the last carry).
    """
    b = inputs.shape[0]
    guided = guide(step)
    rows = jnp.arange(b)
    tokens = []
    for s in range(order.steps):
        start, end = order.span(s)
        pos = jnp.arange(start, end)
        weight = scale_ramp(settings.cfg, s, order.steps)
        out, cache = guided(params, cache, View(inputs, pos, time=s), Guided(cond, weight))
        cache = cache.commit(end - start)
        logits = truncate(out.params, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        vocab = logits.shape[-1]
        ids = jnp.argmax(logits + gumbel(key, rows, pos, vocab), axis=-1)
        codes = ids
        if smooth:
            ratio = s / max(order.steps - 1, 1)
            tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
            codes = jax.nn.softmax((logits * (1 + ratio) + gumbel(key, rows, pos, vocab, stream=REPARAMETERISED)) / tau)
            ids = jnp.argmax(codes, axis=-1)
        if known is not None:
            keep = known.keep[:, start:end]
            ids = jnp.where(keep, known.tokens[:, start:end], ids)
            codes = jnp.where(keep[..., None], jax.nn.one_hot(ids, vocab), codes) if smooth else ids
        tokens.append(ids)
        carry, inputs = feed(params, carry, s, codes)
    return jnp.concatenate(tokens, axis=1), carry
