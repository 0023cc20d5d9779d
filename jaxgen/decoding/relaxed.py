"""Rules that accept more than the target's law allows, since image tokens near one another look alike: LANTERN and GSD.

Both are recursive rejection with an easier test, so that what they emit is *not* the target's law. How far it is from it can
be computed exactly where the laws can be enumerated: `step_law` for one token, `chain_law` for whole sequences.

Rules here are pytrees: thresholds and tables may be traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.verify import Level, Relaxed, Rule, in_turn

__all__ = ["Grouped", "Lantern", "StepLaw", "chain_law", "nearest_codes", "step_law"]


def nearest_codes(codebook: Float[Array, "v w"], k: int, *, block: int = 256) -> Int[Array, "v k"]:
    """The k codes nearest to each, nearest first, itself left out; of equally far ones the lower index first.

    Args:
      codebook: vectors that tokens stand for.
      k: in 1..v - 1.
      block: codes whose distances are held at once.

    Raises:
      ValueError: more neighbours than there are other codes.
    """
    v = codebook.shape[0]
    if not 1 <= k < v:
        raise ValueError(f"k={k}: a codebook of {v} has 1..{v - 1} neighbours of a code")
    norm = jnp.square(codebook).sum(-1)

    def one(code):
        distance = norm - 2 * jnp.dot(codebook, codebook[code], precision="highest")
        return jax.lax.top_k(-distance.at[code].set(jnp.inf), k)[1]

    return jax.lax.map(one, jnp.arange(v), batch_size=min(block, v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lantern:
    """Accepts x with probability min(1, p(A) / q(x)), where A is x and neighbours of x up to a bound (Jang et al. 2025, LANTERN).

    A grows from the nearest neighbour on, up to k of them, while the neighbours' mass is at most `delta`: then the law p^x that
    moves p(A) onto x is within `delta` of p in total variation. When x is rejected, p <- normalised (p^x - q)+. What is emitted
    mixes the p^x of all drafts, and its law is *not* within `delta` of p; `step_law` gives the distance. `delta` = 0 gives
    `Rejection`.

    The authors' code, when it rejects, takes q as 0 on all k neighbours, which puts mass on tokens that are drafted too often
    already; the rule here follows the definition of p^x.

    Attributes:
      neighbours: of each token, nearest first; see `nearest_codes`.
      delta: the bound, >= 0.
      relative: the bound is `delta` p(x) (LANTERN++, Park et al. 2025), so that unlikely drafts gain little.
    """

    neighbours: Int[Array, "v k"]
    delta: Any = 0.1
    relative: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def __call__(self, level: Level) -> tuple[Array, Array]:
        v = level.log_p.shape[-1]
        if self.neighbours.ndim != 2 or self.neighbours.shape[0] != v:
            raise ValueError(f"neighbours {self.neighbours.shape}: expected a row for each of {v} tokens")

        def relax(p, q, x):
            near = self.neighbours[x]
            mass = jnp.take_along_axis(p, near, axis=1)
            at_x = jnp.take_along_axis(p, x[:, None], axis=1)
            inside = jnp.cumsum(mass, axis=1) <= (self.delta * at_x if self.relative else self.delta)
            total = at_x[:, 0] + jnp.where(inside, mass, 0.0).sum(axis=1)
            rows = jnp.arange(p.shape[0])
            moved = p.at[rows[:, None], near].multiply(jnp.where(inside, 0.0, 1.0)).at[rows, x].set(total)
            return Relaxed(total, jnp.take_along_axis(q, x[:, None], axis=1)[:, 0], moved)

        return in_turn(level, relax)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Grouped:
    """Accepts x with probability min(1, p(C) / q(C)) for a group C of tokens like x (So et al. 2025, GSD).

    C is found anew for every draft: tokens whose rank under p is within a window around that of x, whose probability is near
    p(x) and whose code is near that of x. When x is rejected, p <- normalised (p - q)+, as without groups. Groups of one token
    give `Rejection`; others give another law than p, see `step_law`.

    In the authors' code the window is empty, and the test the plain one, where it reaches below the lowest rank; here it is cut
    off there, as it is at the highest rank in both.

    Attributes:
      codebook: vectors that tokens stand for.
      below: ranks below that of x which the window reaches.
      above: ranks from that of x on which the window reaches; 1 is x alone.
      p_radius: probabilities differ by less.
      d_radius: squared distances of codes are less.
    """

    codebook: Float[Array, "v w"]
    below: int = dataclasses.field(default=7, metadata=dict(static=True))
    above: int = dataclasses.field(default=7, metadata=dict(static=True))
    p_radius: Any = 0.15
    d_radius: Any = 0.5

    def __call__(self, level: Level) -> tuple[Array, Array]:
        v = level.log_p.shape[-1]
        if self.codebook.ndim != 2 or self.codebook.shape[0] != v:
            raise ValueError(f"codebook {self.codebook.shape}: expected a row for each of {v} tokens")
        if self.below < 0 or self.above < 1:
            raise ValueError(f"below={self.below}, above={self.above}: expected at least 0 and 1")

        def relax(p, q, x):
            order = jnp.argsort(p, axis=1)
            rank = jnp.argmax(order == x[:, None], axis=1)
            at = rank[:, None] + jnp.arange(-self.below, self.above)
            group = jnp.take_along_axis(order, jnp.clip(at, 0, v - 1), axis=1)
            in_p, in_q = (jnp.take_along_axis(law, group, axis=1) for law in (p, q))
            like = jnp.abs(in_p - jnp.take_along_axis(p, x[:, None], axis=1)) < self.p_radius
            like &= jnp.square(self.codebook[group] - self.codebook[x][:, None]).sum(-1) < self.d_radius
            like = ((at >= 0) & (at < v) & like) | (at == rank[:, None])
            return Relaxed(jnp.where(like, in_p, 0.0).sum(axis=1), jnp.where(like, in_q, 0.0).sum(axis=1), p)

        return in_turn(level, relax)


class StepLaw(NamedTuple):
    """What becomes of one drafted token.

    Attributes:
      accepted: probability that x is drafted and accepted.
      replaced: probability that the draft is rejected and x emitted instead. The sum of both is the law of what is emitted.
    """

    accepted: Float[Array, "b v"]
    replaced: Float[Array, "b v"]

    @property
    def law(self) -> Float[Array, "b v"]:
        """Of the emitted token."""
        return self.accepted + self.replaced


def step_law(rule: Rule, log_p: Float[Array, "b v"], log_q: Float[Array, "b v"]) -> StepLaw:
    """The exact law of the token that a rule emits after one draft from q, without sampling.

    Every token is tried as the draft. A rule accepts while its uniform number is small enough; where it stops is found by
    bisection, to the last bit of a float32.

    Args:
      rule: any rule that looks at `Level.u` and not at `Level.gumbel`.
      log_p: the target's laws.
      log_q: the drafts' laws.
    """
    b, v = log_p.shape
    every = jnp.tile(jnp.arange(v, dtype=jnp.int32), b)[:, None]
    p, q = (jnp.repeat(law, v, axis=0) for law in (log_p, log_q))

    def decide(u):
        return rule(Level(p, every, q[:, None], jnp.ones((b * v, 1), bool), u[:, None], jnp.zeros_like(p)))

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        takes = decide(middle)[0] >= 0
        return jnp.where(takes, middle, low), jnp.where(takes, high, middle)

    chance = jax.lax.fori_loop(0, 30, halve, (jnp.zeros(b * v), jnp.ones(b * v)))[1].reshape(b, v)
    residual = jnp.exp(decide(jnp.ones(b * v))[1]).reshape(b, v, v)
    drafted = jnp.exp(log_q)
    return StepLaw(drafted * chance, jnp.einsum("bx,bxy->by", drafted * (1 - chance), residual))


def chain_law(
    rule: Rule, log_p: Sequence[Float[Array, "n v"]], log_q: Sequence[Float[Array, "n v"]], drafts: int
) -> tuple[Float[Array, "n"], Float[Array, ""]]:
    """The exact law of the sequences that `speculate` emits with a `DraftModel` of a chain, for models small enough.

    Args:
      rule: as in `step_law`.
      log_p: the target's laws after all prefixes of 0, 1, ... tokens: [v ** i, v], prefixes in lexicographic order.
      log_q: the draft's.
      drafts: in a chain, at least 1.

    Returns:
      (probability of each of the v ** length sequences in lexicographic order, expected target calls a sequence).
    """
    prefixes = [jnp.ones(1)] + [jnp.zeros(1)] * drafts  # by how many drafts of the current round have been accepted
    calls = jnp.zeros(())
    for here, draft in zip(log_p, log_q):
        step = step_law(rule, here, draft)
        ended = sum(mass[:, None] * step.replaced for mass in prefixes[:-1]) + prefixes[-1][:, None] * jnp.exp(here)
        calls += ended.sum()
        prefixes = [x.reshape(-1) for x in (ended, *(mass[:, None] * step.accepted for mass in prefixes[:-1]))]
    return sum(prefixes), calls + sum(mass.sum() for mass in prefixes[1:])
