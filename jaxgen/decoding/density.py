"""Which drafted continuous tokens may stay: rejection sampling on the paths that a diffusion head takes to a token.

A diffusion head has no density of its token that could be computed, but one of the whole path x_s, ..., x_0 (`jaxgen.paths_vp`).
Speculative sampling on paths is exact for paths, hence for their ends, the tokens (Wang et al. 2024, *Continuous speculative
decoding*, arXiv:2411.11925, without its scale factors).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.noise import normal, uniform
from jaxgen.paths_vp import Kernel, chain_log_prob, sample_chain

__all__ = ["DensityRule", "PathDensity", "Residual", "path_noise", "sample_residual"]

# Streams of noise: trial n of a place uses PATH + n for its path and TRIAL + n to decide; trial 0 is the draft's own path.
PATH, TRIAL = 1 << 16, 1 << 24


class DensityRule(Protocol):
    """Decides about paths by their log-densities under the target, p, and under the draft, q; `u` is uniform in [0, 1)."""

    def accepts(self, log_p: Float[Array, "*b"], log_q: Float[Array, "*b"], u: Float[Array, "*b"]) -> Bool[Array, "*b"]:
        """Which drafted paths stay."""

    def keeps(self, log_p: Float[Array, "*b"], log_q: Float[Array, "*b"], u: Float[Array, "*b"]) -> Bool[Array, "*b"]:
        """Which paths drawn from p may replace a rejected one; `log_q` is -inf where nothing was drafted."""


@dataclasses.dataclass(frozen=True)
class PathDensity:
    """Accepts a path with probability min(1, p / q), else draws from (p - q)+ by keeping a path from p with 1 - q / p.

    The ratio is that of whole paths. Both chains start from the same law, which cancels; what noise made the path does not
    matter. A rejected token needs 1 / TV(p, q) paths of the target on average, and a token is rejected with probability
    TV(p, q): one path a token that was checked.

    Attributes:
      temperature: T; 1 is exact. Otherwise paths are accepted with probability min(1, (p / q)^(1 / T^2)), as if both chains'
        variances were T^2 times as large: above 1 more of them, and the law moves towards the draft's. (The released code has
        T = 42.)
    """

    temperature: Any = 1.0

    def accepts(self, log_p, log_q, u):
        return jnp.log(u) < (log_p - log_q) / self.temperature**2

    def keeps(self, log_p, log_q, u):
        return u < -jnp.expm1(jnp.minimum(log_q - log_p, 0.0))


class Residual(NamedTuple):
    """What replaces rejected tokens.

    Attributes:
      token: meaningless where none was needed; NaN where the densities are no numbers.
      trials: paths of the target that were drawn up to the one kept.
      exhausted: no path was kept; the token is the last one drawn.
    """

    token: Float[Array, "b q c"]
    trials: Int[Array, "b q"]
    exhausted: Bool[Array, "b q"]


def path_noise(
    key: Key[Array, ""], rows: Int[Array, "b"], pos: Int[Array, "b q"], steps: int, channels: int, trial=0
) -> Float[Array, "b q s+1 c"]:
    """What `sample_chain` needs of noise at each (row, position), independent for each number of a trial."""
    noise = normal(key, rows, pos, (steps + 1) * channels, stream=PATH + trial)
    return noise.reshape(*pos.shape, steps + 1, channels)


def sample_residual(
    rule: DensityRule,
    target: Kernel,
    draft: Kernel | None,
    need: Bool[Array, "b q"],
    drafted: Bool[Array, "b q"],
    *,
    steps: int,
    channels: int,
    key: Key[Array, ""],
    rows: Int[Array, "b"],
    pos: Int[Array, "b q"],
    at_once: int = 1,
    most: int = 1024,
) -> Residual:
    """Draws paths from the target until the rule keeps one, everywhere where a token is needed.

    Where nothing was drafted the first path is kept, which is plain sampling; its noise is what a draft there would have had.

    Args:
      rule: keeps or refuses.
      target: on [b, q, r, c] and [b, q, r, s, c], with r = `at_once`.
      draft: the same of the draft; None where nothing was drafted anywhere.
      need: which places need a token.
      drafted: where a draft was rejected.
      steps: s, of both chains.
      channels: c.
      key: of the call.
      rows: number of each request.
      pos: position of each place.
      at_once: paths drawn together; more of them are fewer rounds.
      most: paths after which the last one is taken, at least. If p and q are so close that this happens, a token was hardly
        ever rejected: the law of a token changes by at most max_e e (1 - e)^most < 0.37 / most in total variation.
    """

    def more(carry):
        return (carry[2] & (carry[0] < most)).any()

    def draw(carry):
        first, found, need = carry
        trials = first + jnp.arange(at_once)
        number = trials + drafted[..., None]  # [b, q, r]; trial 0 was the draft's
        flat = jnp.broadcast_to(pos[..., None], number.shape).reshape(len(rows), -1)
        noise = path_noise(key, rows, flat, steps, channels, number.reshape(flat.shape))
        points, log_p = sample_chain(target, noise.reshape(*number.shape, steps + 1, channels))
        log_q = jnp.full(log_p.shape, -jnp.inf)
        if draft is not None:
            log_q = jnp.where(drafted[..., None], chain_log_prob(draft, points), log_q)
        u = uniform(key, rows, flat, 1, stream=TRIAL + number.reshape(flat.shape)).reshape(number.shape)
        bad = jnp.isnan(log_p - log_q)
        keeps = rule.keeps(log_p, log_q, u) | bad
        which = jnp.where(keeps.any(-1), jnp.argmax(keeps, axis=-1), at_once - 1)
        ends = jnp.where(bad[..., None], jnp.nan, points[..., 0, :])
        token = jnp.take_along_axis(ends, which[..., None, None], axis=2)[:, :, 0]
        found = Residual(
            jnp.where(need[..., None], token, found.token),
            jnp.where(need, first + which + 1, found.trials),
            need & ~keeps.any(-1),
        )
        return first + at_once, found, found.exhausted

    none = Residual(jnp.zeros((*pos.shape, channels)), jnp.zeros(pos.shape, jnp.int32), need)
    return jax.lax.while_loop(more, draw, (jnp.int32(0), none, need))[1]
