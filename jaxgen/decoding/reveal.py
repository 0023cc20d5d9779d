"""Which masked positions are revealed at a pass: the orders of `refine`.

An order looks at the slots that may be revealed and at what the model would put there, and says which to reveal. Most orders rank
the slots and reveal the first few; how many is a count of their own: a schedule over a number of passes, an even split, or
a fixed number a pass. All numbers may be traced.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.noise import ORDER, gumbel, uniform
from jaxgen.paths import Cosine, Linear, Schedule

__all__ = [
    "Agreement",
    "Ancestral",
    "ByConfidence",
    "Count",
    "Drawn",
    "Each",
    "EntropyBound",
    "Even",
    "FirstHitting",
    "LeftToRight",
    "RandomOrder",
    "RevealOrder",
    "Scheduled",
    "Slots",
    "Threshold",
]


class Slots(NamedTuple):
    """The slots that one pass is about.

    Attributes:
      open: which may be revealed: masked, and in the section (block, sub-block, whole sequence) that is worked on.
      total: slots that were open when this section began.
      step: passes over this section so far.
      pos: absolute positions.
      rows: number of each request.
      key: of the call.
      x: all tokens or vectors of the sequences, the mask's fill where they are not known.
    """

    open: Bool[Array, "b w"]
    total: Int[Array, "b"]
    step: Int[Array, "b"]
    pos: Int[Array, "b w"]
    rows: Int[Array, "b"]
    key: Key[Array, ""]
    x: Array

    @property
    def left(self) -> Int[Array, "b"]:
        """Open slots."""
        return self.open.sum(axis=1)

    @property
    def moment(self) -> Int[Array, "b w"]:
        """A number of its own for each position and pass of a section: where noise is drawn that must be new at each pass."""
        return self.pos + self.step[:, None] * self.x.shape[1]


class Drawn(NamedTuple):
    """What a kernel would put into the slots.

    Attributes:
      value: tokens, or vectors.
      score: log-probability of each; NaN stops a row.
      log_p: the laws they were drawn from; None for vectors.
      agrees: which of them a second model agrees with; None where there is none.
    """

    value: Int[Array, "b w"] | Float[Array, "b w d"]
    score: Float[Array, "b w"]
    log_p: Float[Array, "b w v"] | None = None
    agrees: Bool[Array, "b w"] | None = None


class RevealOrder(Protocol):
    """Orders are functions of what they see; they keep no state."""

    def time(self, slots: Slots) -> Float[Array, "b"]:
        """The noise level that the model is asked at, in [0, 1]."""

    def reveal(self, slots: Slots, drawn: Drawn) -> Bool[Array, "b w"]:
        """Which slots to reveal; those that are not open are left alone."""


class Count(Protocol):
    """How many slots to reveal at this pass, at least 1 and no more than are open."""

    def __call__(self, slots: Slots) -> Int[Array, "b"]: ...


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """After pass i = 1..n, floor(N rate(1 - i / n)) of N slots stay masked, at least one less than before; after the last, none.

    That is MaskGIT's and MAR's count (Chang et al. 2022, section 3.3; Li et al. 2024), which keep at least one slot
    for the next pass. A slot that is alone is revealed at once, since waiting would draw it from the same law.

    Attributes:
      steps: n.
      schedule: the share of masked slots at each time.
    """

    steps: Any
    schedule: Schedule = Cosine()

    def __call__(self, slots):
        passed = slots.step + 1
        rate = self.schedule.rate(1 - passed / self.steps)
        # A hair more, so that rounding does not make floor(128) 127.
        stay = jnp.floor(slots.total * (rate + 2.5e-7)).astype(jnp.int32)
        stay = jnp.clip(stay, 1, jnp.maximum(slots.left - 1, 0))
        return jnp.where(passed >= self.steps, slots.left, slots.left - stay)


@dataclasses.dataclass(frozen=True)
class Even:
    """N // n slots a pass, and one more at the first N mod n passes (LLaDA, Nie et al. 2025; SDAR, Cheng et al. 2025).

    Attributes:
      steps: n.
    """

    steps: Any

    def __call__(self, slots):
        count = slots.total // self.steps + (slots.step < slots.total % self.steps)
        return jnp.where(slots.step + 1 >= self.steps, slots.left, jnp.clip(count, 1, slots.left))


@dataclasses.dataclass(frozen=True)
class Each:
    """A fixed number of slots a pass.

    Attributes:
      count: slots.
    """

    count: Any = 1

    def __call__(self, slots):
        return jnp.clip(self.count, 1, slots.left)


class _Ranked:
    """Orders whose noise level is the share of slots that are open, which is t under the linear schedule."""

    def time(self, slots):
        return slots.left / jnp.maximum(slots.total, 1)


@dataclasses.dataclass(frozen=True)
class ByConfidence(_Ranked):
    """The slots whose tokens the model is most certain of (MaskGIT, Chang et al. 2022, section 3.2).

    They are ranked by log p(token) + temperature (1 - (i + 1) / n) Gumbel at pass i of n. With `Scheduled` this is MaskGIT's
    decoder, whose published temperature is 4.5; with `Even` and no noise "static" low-confidence remasking (LLaDA, SDAR).

    Attributes:
      count: how many a pass.
      temperature: of the noise; falls to 0 over the count's `steps`, or stays where it has none.
    """

    count: Count
    temperature: Any = 0.0

    def reveal(self, slots, drawn):
        steps = getattr(self.count, "steps", None)
        share = 1.0 if steps is None else jnp.maximum(1 - (slots.step + 1) / steps, 0.0)[:, None]
        noise = gumbel(slots.key, slots.rows, slots.moment, 1, stream=ORDER)[..., 0]
        return _first(drawn.score + self.temperature * share * noise, slots.open, self.count(slots))


@dataclasses.dataclass(frozen=True)
class RandomOrder(_Ranked):
    """A uniformly random order, fixed for each row (MAR, Li et al. 2024, with `Scheduled`).

    Attributes:
      count: how many a pass.
    """

    count: Count

    def reveal(self, slots, drawn):
        return _first(_chance(slots), slots.open, self.count(slots))


@dataclasses.dataclass(frozen=True)
class LeftToRight(_Ranked):
    """The leftmost slots (SDAR's sequential order).

    Attributes:
      count: how many a pass.
    """

    count: Count

    def reveal(self, slots, drawn):
        return _first(-slots.pos.astype(jnp.float32), slots.open, self.count(slots))


@dataclasses.dataclass(frozen=True)
class Threshold(_Ranked):
    """All slots whose token's probability exceeds a threshold, and the most certain ones if they are fewer than a count.

    Fast-dLLM (Wu et al. 2025a) and its second version with `Each(1)`, the default; SDAR's dynamic order with
    `Even(n)`. Above 1, the count alone decides.

    Attributes:
      threshold: of probability.
      at_least: how many slots in any case.
    """

    threshold: Any
    at_least: Count = Each(1)

    def reveal(self, slots, drawn):
        return (jnp.exp(drawn.score) > self.threshold) | _first(drawn.score, slots.open, self.at_least(slots))


@dataclasses.dataclass(frozen=True)
class EntropyBound(_Ranked):
    """Slots by rising entropy, as many as keep sum_U H - max_U H <= bound (EB-Sampler, Ben-Hamu et al. 2025).

    The left side bounds how far the slots' joint law is from the product that they are drawn from; one slot is always within it.

    Attributes:
      bound: nats; 0 reveals one slot a pass, and those that are certain.
    """

    bound: Any

    def reveal(self, slots, drawn):
        p = jnp.exp(drawn.log_p)
        entropy = -jnp.where(p > 0, p * drawn.log_p, 0.0).sum(axis=-1)
        order = jnp.argsort(jnp.where(slots.open, entropy, jnp.inf), axis=1)
        ranked = jnp.take_along_axis(entropy, order, axis=1)
        # Entropies rise, so that the largest of a set is the last: the bound is on the sum of those before it.
        fits = jnp.cumsum(ranked, axis=1) - ranked <= jnp.maximum(self.bound, 0.0)
        return jnp.take_along_axis(fits, jnp.argsort(order, axis=1), axis=1)


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """The reverse of the masking path on a grid of times t = 1, 1 - 1/n, ..., 0 (Sahoo et al. 2024, section 3.2).

    From t to s each masked slot is revealed with probability 1 - rate(s) / rate(t), whatever the tokens are. So it is known
    from the start at which step of the grid a slot's turn comes, and steps at which nobody's comes are not run.

    Attributes:
      steps: n.
      schedule: of the path.
    """

    steps: Any
    schedule: Schedule = Linear()

    def time(self, slots):
        return 1 - jnp.where(slots.open, self._turn(slots), jnp.inf).min(axis=1, initial=self.steps) / self.steps

    def reveal(self, slots, drawn):
        turn = jnp.where(slots.open, self._turn(slots), jnp.inf)
        return turn == turn.min(axis=1, keepdims=True)

    def _turn(self, slots):
        """The step of the grid, from 0, whose end is not later than the slot's own time."""
        time = self.schedule.time(_chance(slots))
        return jnp.clip(jnp.ceil(self.steps * (1 - time)) - 1, 0, self.steps - 1)


@dataclasses.dataclass(frozen=True)
class FirstHitting:
    """The reverse of the masking path in continuous time: one slot a pass, at the time when its turn comes.

    The largest of m uniform numbers is u^(1/m) in law, so slots by falling numbers of their own are the first-hitting sampler
    (Zheng et al. 2025; BD3-LM), one call a token at the exact times.

    Attributes:
      schedule: of the path.
    """

    schedule: Schedule = Linear()

    def time(self, slots):
        return self.schedule.time(jnp.where(slots.open, _chance(slots), 0.0).max(axis=1))

    def reveal(self, slots, drawn):
        return _first(_chance(slots), slots.open, jnp.ones_like(slots.total))


@dataclasses.dataclass(frozen=True)
class Agreement(_Ranked):
    """The slots up to the first that a second model does not agree with, that one included; see `GuidedUnmask`."""

    def reveal(self, slots, drawn):
        if drawn.agrees is None:
            raise ValueError("Agreement needs a kernel with a second model, such as GuidedUnmask")
        against = slots.open & ~drawn.agrees
        return jnp.cumsum(against, axis=1) - against == 0


def _chance(slots: Slots) -> Float[Array, "b w"]:
    """A uniform number for each position, the same at every pass."""
    return uniform(slots.key, slots.rows, slots.pos, 1, stream=ORDER)[..., 0]


def _first(score: Float[Array, "b w"], open_: Bool[Array, "b w"], count: Int[Array, "b"]) -> Bool[Array, "b w"]:
    """The `count` open slots with the highest scores; exactly so many, the leftmost of equals."""
    order = jnp.argsort(jnp.where(open_, -score, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    return (rank < count[:, None]) & open_
