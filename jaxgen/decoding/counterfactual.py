"""What would have been written, had one thing been different and all chance the same (S110, Chatzi et al. 2025).

Sampling a token is y = argmax(log p + U) with Gumbel noise U, a function of the model and the noise: the Gumbel-max causal model
(Oberst & Sontag 2019). A counterfactual keeps U and changes what comes before. `speculate` keys its noise by position, so that
text sampled here is replayed by sampling again with its key. For text from elsewhere the noise is drawn in hindsight, given
that it led to that text (Ravfogel et al. 2025).

    seen = hindsight(step, params=params, cache=cache, cond=None, tokens=tokens, prompt_length=lengths, key=key)
    prompt, prompt_length = intervene(tokens, at, value)
    result = speculate(step, Factual(tokens, 4), Coupled(), prompt=prompt, prompt_length=prompt_length, noise=seen, ...)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.noise import DRAFT, gumbel
from jaxgen.decoding.speculate import Context, Proposal, Sequences, Transform
from jaxgen.decoding.step import StepFn, View
from jaxgen.decoding.topology import Topology, chain
from jaxgen.decoding.transforms import truncate

__all__ = ["Factual", "Hindsight", "alternative", "hindsight", "intervene", "posterior_gumbel"]


def posterior_gumbel(
    key: Key[Array, ""],
    rows: Int[Array, "b"],
    pos: Int[Array, "*b q"],
    log_p: Float[Array, "b q v"],
    tokens: Int[Array, "b q"],
) -> Float[Array, "b q v"]:
    """Gumbel noise U given that argmax(log p + U) is the token.

    The largest of log p + U is a Gumbel variable m whichever token attains it, and the others are Gumbel variables cut off at m
    (Maddison et al. 2014): with G fresh noise, m = G_token, U_token = m - log p_token, and elsewhere
    U_i = -log(exp(-G_i) + exp(log p_i - m)). Over tokens drawn from p, U is plain Gumbel noise.

    Args:
      key, rows, pos: as in `gumbel`.
      log_p: normalised log-laws; where a token is impossible, its noise is not constrained.
      tokens: what was seen; +inf is its noise where it was impossible.
    """
    fresh = gumbel(key, rows, pos, log_p.shape[-1])
    own = tokens[..., None] == jnp.arange(log_p.shape[-1])
    top = jnp.take_along_axis(fresh, tokens[..., None], axis=-1)
    return jnp.where(own, top - log_p, -jnp.logaddexp(-fresh, log_p - top))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hindsight:
    """Noise for `speculate(noise=...)`: inferred where a token was seen, fresh everywhere else.

    Attributes:
      noise: of the token at each position.
      possible: whether the model could have written the token there; where not, its noise holds it fast.
    """

    noise: Float[Array, "b s v"]
    possible: Bool[Array, "b s"]

    def __call__(self, key, rows, pos, vocab):
        """See `jaxgen.decoding.noise.Noise`; row i of a call is row i here."""
        s = self.noise.shape[1]
        held = jnp.take_along_axis(self.noise, jnp.clip(pos, 0, s - 1)[..., None], axis=1)
        return jnp.where((pos < s)[..., None], held, gumbel(key, rows, pos, vocab))


def hindsight(
    step: StepFn,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    tokens: Int[Array, "b s"],
    prompt_length: Int[Array, "b"],
    length: Int[Array, "b"] | None = None,
    key: Key[Array, ""],
    transform: Transform = lambda logits, context: logits.astype(jnp.float32),
    rows: Int[Array, "b"] | None = None,
) -> Hindsight:
    """Noise that leads the model from each prompt to the rest of its row, by one reading of the whole.

    Args:
      step, params, cond: the model that is taken to have written the tokens.
      cache: empty, with room for s - 1 positions.
      tokens: what was written, prompts included.
      prompt_length: the first token that was sampled, 1 or more.
      length: tokens of each row; None is s for all.
      key: of the noise; give the same to `speculate`.
      transform: as they were sampled, see `speculate`.
      rows: as in `speculate`.

    Raises:
      ValueError: fewer than two tokens.
    """
    b, s = tokens.shape
    if s < 2:
        raise ValueError(f"tokens {tokens.shape}: a prompt and what follows it take at least 2 tokens")
    rows = jnp.arange(b) if rows is None else rows
    length = jnp.full((b,), s) if length is None else length
    pos = jnp.broadcast_to(jnp.arange(s), (b, s))
    view = View(tokens[:, :-1], pos[:, :-1], jnp.tril(jnp.ones((s - 1, s - 1), bool)))
    out, _ = step(params, cache.commit(jnp.zeros((b,), jnp.int32)), view, cond)

    def law(i, logits):
        """As plain sampling would ask: the sequence ends with token i, which is the root."""
        seq = Sequences(tokens, jnp.full((b,), i + 1), rows)
        logits = transform(logits[:, None], Context(seq, tokens[:, i, None, None], jnp.full((b, 1), i + 1)))
        return jax.nn.log_softmax(logits, axis=-1)[:, 0]

    log_p = jax.vmap(law, (0, 1), 1)(jnp.arange(s - 1), out.params)
    log_p = jnp.pad(log_p, ((0, 0), (1, 0), (0, 0)))
    seen = (pos >= prompt_length[:, None]) & (pos < length[:, None])
    inferred = posterior_gumbel(key, rows, pos, log_p, tokens)
    noise = jnp.where(seen[..., None], inferred, gumbel(key, rows, pos, log_p.shape[-1]))
    own = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    return Hindsight(noise, ~seen | (own > -jnp.inf))


def intervene(
    tokens: Int[Array, "b s"], at: Int[Array, "b"], value: Int[Array, "b"]
) -> tuple[Int[Array, "b s"], Int[Array, "b"]]:
    """(prompt, prompt_length) for `speculate`: what stood before position `at`, then `value` instead of what stood there."""
    rows = jnp.arange(tokens.shape[0])
    return tokens.at[rows, at].set(value), at + 1


def alternative(
    key: Key[Array, ""],
    rows: Int[Array, "b"],
    log_p: Float[Array, "b v"],
    token: Int[Array, "b"],
    *,
    top_p=0.9,
) -> Int[Array, "b"]:
    """A likely token other than the one that was written: drawn from the law's top-p set, or the likeliest one outside it."""
    others = jnp.where(token[:, None] == jnp.arange(log_p.shape[-1]), -jnp.inf, log_p)
    kept = jnp.where(jnp.isneginf(truncate(log_p, top_p=top_p)), -jnp.inf, others)
    noise = gumbel(key, rows, jnp.zeros(1, jnp.int32), log_p.shape[-1], stream=DRAFT)[:, 0]
    score = jnp.where(jnp.isneginf(kept).all(axis=-1, keepdims=True), others, kept + noise)
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Factual:
    """Drafts what was written at the same positions: as far as the counterfactual follows it, one target call reads many tokens.

    With `Coupled` the tokens are those of plain sampling with the same noise.

    Attributes:
      tokens: what was written.
      count: tokens to propose.
    """

    tokens: Int[Array, "b s"]
    count: int

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"count={self.count} must be at least 1")

    @property
    def topology(self) -> Topology:
        """A chain."""
        return chain(self.count)

    def start(self, seq, key, vocab, out):
        return ()

    def propose(self, state, seq, transform, key):
        at = seq.length[:, None] + jnp.arange(self.count)
        last = self.tokens.shape[1] - 1
        return Proposal(jnp.take_along_axis(self.tokens, jnp.minimum(at, last), axis=1), None, at <= last), state

    def update(self, state, seq, verdict, taken, log_p, out):
        return state
