"""How x_t becomes the next x: the kernels of `refine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.noise import gumbel
from jaxgen.decoding.reveal import Drawn, Slots
from jaxgen.decoding.speculate import Context, Sequences, Transform
from jaxgen.decoding.step import Out, StepFn, View

__all__ = ["GuidedUnmask", "Kernel", "Unmask", "UnmaskCells", "UnmaskVectors"]

PyTree = Any


class Kernel(Protocol):
    """Draws values for the slots of a pass and moves them there."""

    def blank(self, batch: int, length: int) -> Array:
        """x at t = 1."""

    def draw(self, out: Out, slots: Slots) -> Drawn:
        """Values for all slots of the pass."""

    def move(self, x: Array, drawn: Drawn, reveal: Bool[Array, "b w"]) -> Array:
        """The window's x after the pass."""


@dataclasses.dataclass(frozen=True)
class Unmask:
    """Masked tokens are filled in, each drawn from its own law; what is filled in stays.

    Attributes:
      mask: the id of masked tokens; where the model has a logit for it, it is never drawn.
      transform: as in `speculate`; its context holds the whole sequence with masks where tokens are not known, and no path.
    """

    mask: int
    transform: Transform = lambda logits, context: logits.astype(jnp.float32)

    def blank(self, batch, length):
        return jnp.full((batch, length), self.mask, jnp.int32)

    def draw(self, out, slots):
        log_p = self.law(out, slots)
        noise = gumbel(slots.key, slots.rows, slots.moment, log_p.shape[-1])
        value = jnp.argmax(log_p + noise, axis=-1).astype(jnp.int32)
        return Drawn(value, jnp.take_along_axis(log_p, value[..., None], axis=-1)[..., 0], log_p)

    def move(self, x, drawn, reveal):
        return jnp.where(reveal, drawn.value, x)

    def law(self, out: Out, slots: Slots) -> Float[Array, "b w v"]:
        """The log-law of each slot."""
        b, length = slots.x.shape
        logits = out.params
        if self.mask < logits.shape[-1]:
            logits = logits.at[..., self.mask].set(-jnp.inf)
        seq = Sequences(slots.x, jnp.full((b,), length, jnp.int32), slots.rows)
        context = Context(seq, jnp.full((*slots.pos.shape, 1), -1, jnp.int32), slots.pos)
        return jax.nn.log_softmax(self.transform(logits, context), axis=-1)


@dataclasses.dataclass(frozen=True)
class UnmaskCells:
    """Masked cells of n tokens are filled in whole: the tokens of a cell are drawn at once, each from its own law.

    x is [b, l, n], and the model's logits are [b, w, n, v]. A cell's score is the mean of its tokens' log-probabilities (the
    masked model of ELM, Liu et al. 2024, in the authors' code).

    Attributes:
      mask: the id that the tokens of a masked cell have; there is no logit for it.
      parts: n.
      transform: of the logits, such as `truncate` with its settings.
    """

    mask: int
    parts: int
    transform: Callable[[Float[Array, "b w n v"]], Float[Array, "b w n v"]] = lambda logits: logits.astype(jnp.float32)

    def blank(self, batch, length):
        return jnp.full((batch, length, self.parts), self.mask, jnp.int32)

    def draw(self, out, slots):
        log_p = jax.nn.log_softmax(self.transform(out.params), axis=-1)
        noise = gumbel(slots.key, slots.rows, slots.moment, self.parts * log_p.shape[-1]).reshape(log_p.shape)
        value = jnp.argmax(log_p + noise, axis=-1).astype(jnp.int32)
        return Drawn(value, jnp.take_along_axis(log_p, value[..., None], axis=-1)[..., 0].mean(axis=-1))

    def move(self, x, drawn, reveal):
        return jnp.where(reveal[..., None], drawn.value, x)


@dataclasses.dataclass(frozen=True)
class UnmaskVectors:
    """Masked vectors are filled in by the model's own head: masked autoregression (MAR, Li et al. 2024).

    Masked vectors read NaN: the model looks for it, and puts something learned in its place.

    Attributes:
      size: d.
      sample: `(keys, out) -> [b, w, d]`, the head, with a key for each row and slot, [b, w].
    """

    size: int
    sample: Callable[[Key[Array, "b w"], Out], Float[Array, "b w d"]]

    def blank(self, batch, length):
        return jnp.full((batch, length, self.size), jnp.nan)

    def draw(self, out, slots):
        def one(row, moment):
            return jax.random.fold_in(jax.random.fold_in(slots.key, row), moment)

        keys = jax.vmap(jax.vmap(one, (None, 0)))(slots.rows, slots.moment)
        value = self.sample(keys, out)
        return Drawn(value, jnp.where(jnp.isfinite(value).all(axis=-1), 0.0, jnp.nan))

    def move(self, x, drawn, reveal):
        return jnp.where(reveal[..., None], drawn.value, x)


@dataclasses.dataclass(frozen=True)
class GuidedUnmask:
    """Guided diffusion: a causal model reads what the masked one proposes, and agrees up to a place (Hu et al. 2025).

    The proposals fill all masks, one pass of the causal model reads the whole sequence, and a proposal is agreed with if it is
    among its `top_k` tokens, has at least `threshold` probability and at least `ratio` of the likeliest token's. Where it does
    not agree, the proposal becomes its own likeliest token. Goes with the order `Agreement`, which reveals the prefix up
    to the first disagreement, so that at least one token is revealed at each pass.

    Attributes:
      proposals: the masked model's kernel.
      step: the causal model, as in `speculate`: position j's law is read at j - 1. Position 0 is agreed with.
      params, cond: passed to `step`.
      cache: empty, with room for all positions.
      top_k: 1 is agreement of argmax.
      threshold: of probability.
      ratio: of the likeliest token's probability.
    """

    proposals: Unmask
    step: StepFn
    params: PyTree
    cache: PyTree
    cond: PyTree = None
    top_k: Any = 1
    threshold: Any = 0.0
    ratio: Any = 0.0

    def blank(self, batch, length):
        return self.proposals.blank(batch, length)

    def move(self, x, drawn, reveal):
        return self.proposals.move(x, drawn, reveal)

    def draw(self, out, slots):
        drawn = self.proposals.draw(out, slots)
        b, length = slots.x.shape
        rows = jnp.arange(b)[:, None]
        filled = slots.x.at[rows, jnp.where(slots.open, slots.pos, length)].set(drawn.value, mode="drop")
        logits = self._read(filled, length)
        before = jnp.take_along_axis(logits, jnp.maximum(slots.pos - 1, 0)[..., None], axis=1)
        log_p = jax.nn.log_softmax(before.astype(jnp.float32), axis=-1)
        chosen = jnp.take_along_axis(log_p, drawn.value[..., None], axis=-1)
        rank = (log_p > chosen).sum(axis=-1)
        chosen, best = chosen[..., 0], log_p.max(axis=-1)
        agrees = (rank < self.top_k) & (chosen >= jnp.log(self.threshold)) & (chosen >= best + jnp.log(self.ratio))
        agrees |= slots.pos == 0
        value = jnp.where(agrees, drawn.value, jnp.argmax(log_p, axis=-1).astype(jnp.int32))
        return drawn._replace(value=value, score=jnp.where(agrees, drawn.score, best), agrees=agrees)

    def _read(self, tokens: Int[Array, "b l"], length: int) -> Float[Array, "b l v"]:
        pos = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        view = View(tokens, pos, jnp.tril(jnp.ones((length, length), bool)))
        return self.step(self.params, self.cache, view, self.cond)[0].params
