"""Which drafted tokens may stay: rules that keep the target's law, and the walk down the tree that applies them.

A rule looks at one level of the tree at a time: the target's law p of the next token, the candidates that some accepted
path proposes there, and the laws q that they were drawn from. It picks a candidate, or none and the law of the token to emit
instead. Exact rules leave the law of the emitted sequence p, whatever q is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.noise import ACCEPT, Noise, gumbel, uniform
from jaxgen.decoding.topology import RuntimeTree, Topology

__all__ = ["Coupled", "KSeq", "Level", "Rejection", "Relaxed", "Rule", "Verdict", "in_turn", "verify"]


class Level(NamedTuple):
    """What a rule sees: one position of every row.

    Attributes:
      log_p: the target's law.
      tokens: the candidates.
      log_q: the law that each was drawn from, given the candidates before it; None if they were not drawn but chosen.
      valid: which candidates continue the accepted path.
      u: uniform noise, one a candidate.
      gumbel: the target's own noise at this position; a token that is not a candidate is `argmax(residual + gumbel)`.
    """

    log_p: Float[Array, "b v"]
    tokens: Int[Array, "b c"]
    log_q: Float[Array, "b c v"] | None
    valid: Bool[Array, "b c"]
    u: Float[Array, "b c"]
    gumbel: Float[Array, "b v"]


class Rule(Protocol):
    """`(level) -> (choice, residual)`: the accepted candidate or -1, [b], and the log-law to emit from if none, [b, v]."""

    def __call__(self, level: Level) -> tuple[Int[Array, "b"], Float[Array, "b v"]]: ...


class Verdict(NamedTuple):
    """What stays of a proposal.

    Attributes:
      path: nodes from the root down, one a level; only the first `accepted` + 1 count.
      accepted: how many drafts stay.
      token: what follows them.
    """

    path: Int[Array, "b d"]
    accepted: Int[Array, "b"]
    token: Int[Array, "b"]


def verify(
    rule: Rule,
    topology: Topology | RuntimeTree,
    log_p: Float[Array, "b m v"],
    tokens: Int[Array, "b n"],
    log_q: Float[Array, "b n v"] | None,
    valid: Bool[Array, "b n"] | None,
    *,
    parents: Int[Array, "b n"] | None = None,
    key: Key[Array, ""],
    rows: Int[Array, "b"],
    pos: Int[Array, "b"],
    noise: Noise = gumbel,
) -> Verdict:
    """Walks down from the root while candidates are accepted, then emits one more token.

    Candidates of a level are all nodes there whose parent is on the accepted path; several nodes with the accepted token stay
    on it together, so that independent chains pool their continuations.

    Args:
      rule: decides at each level.
      topology: of the n drafts; m = n + 1.
      log_p: normalised log-law of what follows each node.
      tokens: drafts.
      log_q: see `Level`.
      valid: drafts that exist; None is all of them.
      parents: of each draft, for a `RuntimeTree`.
      key: of the call.
      rows: number of each request.
      pos: the position that the root's law is about.
      noise: the target's own, see `jaxgen.decoding.noise.Noise`.
    """
    b, _, v = log_p.shape
    if parents is None:
        parents = jnp.broadcast_to(jnp.asarray(topology.parents, jnp.int32), (b, topology.drafts))
    places = pos[:, None] + jnp.arange(len(topology.levels) + 1)
    target_noise = noise(key, rows, places, v)
    widest = max((len(nodes) for nodes in topology.levels), default=0)
    chance = uniform(key, rows, places, widest, stream=ACCEPT)
    alive = jnp.zeros((b, topology.drafts + 1), bool).at[:, 0].set(True)  # the accepted path's nodes of the last level
    path = [jnp.zeros((b,), jnp.int32)]
    going, accepted = jnp.ones((b,), bool), jnp.zeros((b,), jnp.int32)
    residual = log_p[:, 0]
    for d, nodes in enumerate(topology.levels):
        drafts = jnp.asarray(nodes) - 1
        candidate = jnp.take_along_axis(alive, parents[:, drafts], axis=1) & going[:, None]
        if valid is not None:
            candidate &= valid[:, drafts]
        level = Level(
            jnp.take_along_axis(log_p, path[-1][:, None, None], axis=1)[:, 0],
            tokens[:, drafts],
            None if log_q is None else log_q[:, drafts],
            candidate,
            chance[:, d, : len(nodes)],
            target_noise[:, d],
        )
        choice, left = rule(level)
        took = going & (choice >= 0)
        residual = jnp.where((going & ~took)[:, None], left, residual)
        token = jnp.take_along_axis(level.tokens, jnp.maximum(choice, 0)[:, None], axis=1)
        stays = candidate & (level.tokens == token) & took[:, None]
        alive = jnp.zeros_like(alive).at[:, drafts + 1].set(stays)
        path.append(jnp.asarray(nodes)[jnp.argmax(stays, axis=1)])
        accepted += took
        going = took
        # A path that goes on emits from the law of its new end, unless the next level says otherwise.
        end = jnp.take_along_axis(log_p, path[-1][:, None, None], axis=1)[:, 0]
        residual = jnp.where(took[:, None], end, residual)
    here = jnp.take_along_axis(target_noise, accepted[:, None, None], axis=1)[:, 0]
    return Verdict(jnp.stack(path, axis=1), accepted, jnp.argmax(residual + here, axis=-1).astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class Coupled:
    """Accepts what the target would have sampled with the same noise: y = argmax(log p + G), candidates equal to y stay.

    The emitted sequence is, token by token, that of plain sampling with the same key, for any drafter. Accepts with
    probability sum_x 1 / sum_y max(p_y / p_x, q_y / q_x) when the draft used the noise G too (Daliri et al. 2025).
    """

    def __call__(self, level: Level) -> tuple[Array, Array]:
        y = jnp.argmax(level.log_p + level.gumbel, axis=-1)
        agrees = level.valid & (level.tokens == y[:, None])
        return jnp.where(agrees.any(axis=1), jnp.argmax(agrees, axis=1), -1), level.log_p


class Relaxed(NamedTuple):
    """What a rule of `in_turn` makes of one candidate x: it is accepted with probability min(1, mass_p / mass_q).

    Attributes:
      mass_p: p(x), or what counts as such.
      mass_q: q(x), or what counts as such.
      p: the law that q is taken from when x is rejected.
    """

    mass_p: Float[Array, "b"]
    mass_q: Float[Array, "b"]
    p: Float[Array, "b v"]


def in_turn(
    level: Level, relax: Callable[[Float[Array, "b v"], Float[Array, "b v"], Int[Array, "b"]], Relaxed]
) -> tuple[Int[Array, "b"], Float[Array, "b v"]]:
    """Tries the candidates one after another, each against what is left of p: a `Rule` made from `relax(p, q, x)`."""
    b, c = level.tokens.shape
    p, choice = jnp.exp(level.log_p), jnp.full((b,), -1, jnp.int32)
    for i in range(c):
        x = level.tokens[:, i]
        q = jax.nn.one_hot(x, p.shape[-1]) if level.log_q is None else jnp.exp(level.log_q[:, i])
        against = relax(p, q, x)
        tried = level.valid[:, i] & (choice < 0)
        take = level.u[:, i] * against.mass_q < against.mass_p
        choice = jnp.where(tried & take, i, choice)
        p = jnp.where((tried & ~take)[:, None], _normalised(jnp.maximum(against.p - q, 0.0), p), p)
    return choice, _log(p)


@dataclasses.dataclass(frozen=True)
class Rejection:
    """Tries the candidates in turn: accept x with probability min(1, p(x) / q(x)), else p <- normalised (p - q)+.

    One candidate is speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023); several, each with the law
    that it was drawn from given those before it, are recursive rejection (SpecInfer, Miao et al. 2024; EAGLE, Li et al.
    2024). Candidates without a law are accepted with probability p(x), else p(x) <- 0.
    """

    def __call__(self, level: Level) -> tuple[Array, Array]:
        return in_turn(level, lambda p, q, x: Relaxed(_at(p, x), _at(q, x), p))


@dataclasses.dataclass(frozen=True)
class KSeq:
    """SpecTr's sequential selection among k candidates drawn independently from one law q (Sun et al. 2023, algorithm 2).

    Each is accepted with probability min(1, p(x) / (rho q(x))). With beta = sum_x min(q(x), p(x) / rho), rho solves
    1 - (1 - beta)^k = rho beta, where the probability that some candidate is accepted is largest; the residual is
    p - min(q, p / rho) (1 - (1 - beta)^k) / beta.

    Attributes:
      iterations: of the bisection for rho in [1, k]; the rule is exact for every rho that it ends with, see `_rho`.
    """

    iterations: int = 24

    def __call__(self, level: Level) -> tuple[Array, Array]:
        if level.log_q is None:
            raise ValueError("K-SEQ needs the law that the candidates were drawn from; this proposer chooses them")
        p = jnp.exp(level.log_p)
        first = jnp.argmax(level.valid, axis=1)
        q = jnp.exp(jnp.take_along_axis(level.log_q, first[:, None, None], axis=1)[:, 0])
        k = level.valid.sum(axis=1).astype(jnp.float32)
        rho = self._rho(p, q, k)
        overlap = jnp.minimum(q, p / rho[:, None])
        ratio = jnp.take_along_axis(p, level.tokens, axis=1) / (rho[:, None] * jnp.take_along_axis(q, level.tokens, axis=1))
        takes = level.valid & (level.u < ratio)
        choice = jnp.where(takes.any(axis=1), jnp.argmax(takes, axis=1), -1)
        beta = overlap.sum(axis=1)
        share = jnp.where(beta > 0, -jnp.expm1(k * jnp.log1p(-jnp.minimum(beta, 1.0))) / jnp.maximum(beta, 1e-30), k)
        left = jnp.maximum(p - overlap * share[:, None], 0.0)
        return choice, _log(_normalised(left, p))

    def _rho(self, p, q, k):
        """Upper end of the bracket: there the residual is never negative, whatever the number of iterations."""

        def halve(_, bracket):
            low, high = bracket
            middle = (low + high) / 2
            beta = jnp.minimum(q, p / middle[:, None]).sum(axis=1)
            covers = -jnp.expm1(k * jnp.log1p(-jnp.minimum(beta, 1.0))) <= middle * beta
            return jnp.where(covers, low, middle), jnp.where(covers, middle, high)

        ones = jnp.ones_like(k)
        return jax.lax.fori_loop(0, self.iterations, halve, (ones, jnp.maximum(k, 1.0)))[1]


def _at(law: Float[Array, "b v"], x: Int[Array, "b"]) -> Float[Array, "b"]:
    return jnp.take_along_axis(law, x[:, None], axis=1)[:, 0]


def _normalised(x: Float[Array, "b v"], otherwise: Float[Array, "b v"]) -> Float[Array, "b v"]:
    """x / sum(x); where nothing is left (p = q up to rounding), `otherwise`."""
    total = x.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), otherwise)


def _log(p: Any) -> Any:
    return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)
