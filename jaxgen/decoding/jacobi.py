"""Speculative Jacobi decoding: the drafts of a window are what the last pass would sample there."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.decoding.noise import DRAFT, TARGET, gumbel
from jaxgen.decoding.speculate import Proposal, Sequences
from jaxgen.decoding.topology import Topology, chain

__all__ = ["INITIAL", "Jacobi"]

INITIAL = ("uniform", "repeat_left", "repeat_above", "sample_left", "sample_above")


class _Window(NamedTuple):
    tokens: Int[Array, "b n"]
    log_q: Float[Array, "b n v"]
    key: Any
    laws: Float[Array, "b r v"] | None  # of the last r positions, at position modulo r


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """Speculative Jacobi decoding (Teng et al. 2025, algorithm 1).

    Every pass gives the target's law at all slots. The drafts that were not accepted are drawn anew from it, and that law is
    what they are checked against in the next pass. Tokens that enter the window have no such law; they come from the tokens
    beside or above them in the image (section 4.3), which changes how many are accepted and nothing else, since each is
    checked against the law that it came from.

    Attributes:
      length: drafts in the window.
      coupled: draw with the target's own noise, for `Coupled`.
      initial: where tokens that enter the window come from: "uniform" draws from all tokens; "repeat_left" and "repeat_above"
        copy the nearest known token to the left in the row, or the one above; "sample_left" and "sample_above" draw from the
        law that this token was drawn from. Where there is none, as at the start of a row, tokens are uniform.
      width: tokens in a row of the image, 0 if `initial` is "uniform". "sample_above" keeps as many laws.
      offset: position of the image's first token.

    Example:
      >>> speculate(step, Jacobi(16, initial="repeat_left", width=48), Rejection(), ...)
    """

    length: int
    coupled: bool = False
    initial: str = "uniform"
    width: int = 0
    offset: int = 1

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"length={self.length} must be at least 1")
        if self.initial not in INITIAL:
            raise ValueError(f"initial={self.initial!r}: expected one of {', '.join(INITIAL)}")
        if self.initial != "uniform" and self.width < 1:
            raise ValueError(f"width={self.width}: initial={self.initial!r} needs the tokens in a row of the image, at least 1")

    @property
    def topology(self) -> Topology:
        """A chain."""
        return chain(self.length)

    def start(self, seq, key, vocab, out):
        b = seq.length.shape[0]
        uniform = jnp.full((b, self.length, vocab), -jnp.log(vocab))
        keep = max(self.width, self.length + 1) if self.initial == "sample_above" else 0
        # Uniform until written, which is what tokens without a known law above them are drawn from.
        laws = jnp.full((b, keep, vocab), -jnp.log(vocab)) if keep else None
        last = seq.length - 1
        return self._window(seq, key, uniform, last, uniform[:, 0], laws)

    def propose(self, state, seq, transform, key):
        return Proposal(state.tokens, state.log_q), state

    def update(self, state, seq, verdict, taken, log_p, out):
        # Node i's law is of the i-th position after the old end: slot j of the new window is node taken + j.
        n, v = self.length, log_p.shape[-1]
        node = taken[:, None] + jnp.arange(n)
        law = jnp.take_along_axis(log_p, jnp.minimum(node, n)[..., None], axis=1)
        law = jnp.where((node <= n)[..., None], law, -jnp.log(v))
        laws = state.laws
        if laws is not None:
            pos = (seq.length - taken)[:, None] + jnp.arange(n + 1)
            laws = laws.at[jnp.arange(pos.shape[0])[:, None], pos % laws.shape[1]].set(log_p)
        return self._window(seq, state.key, law, seq.length - taken + n, log_p[:, n], laws)

    def _window(self, seq: Sequences, key, law, last: Int[Array, "b"], last_law: Float[Array, "b v"], laws) -> _Window:
        """Draws the window; positions up to `last` have a law or a token of their own, the others get theirs from neighbours."""
        tokens = self._draw(law, seq, key)
        if self.initial != "uniform":
            known, source = self._source(seq, last)
            if self.initial.startswith("repeat"):
                rows, pos = jnp.arange(source.shape[0])[:, None], seq.length[:, None] + jnp.arange(self.length)
                line = seq.tokens.at[rows, pos].set(tokens)
                one = jax.nn.one_hot(line[rows, source], law.shape[-1], dtype=bool)
                first = jnp.where(one, 0.0, -jnp.inf)
            elif self.initial == "sample_left":
                first = jnp.broadcast_to(last_law[:, None], law.shape)
            else:
                first = jnp.take_along_axis(laws, (source % laws.shape[1])[..., None], axis=1)
            law = jnp.where(known[..., None], first, law)
            tokens = self._draw(law, seq, key)
        return _Window(tokens, law, key, laws)

    def _source(self, seq: Sequences, last: Int[Array, "b"]) -> tuple[Bool[Array, "b n"], Int[Array, "b n"]]:
        """(which slots enter the window with a known neighbour, the neighbour's position)."""
        place = seq.length[:, None] + jnp.arange(self.length) - self.offset
        end = last[:, None] - self.offset
        if self.initial.endswith("above"):
            source = place - self.width
            known = source <= end
        else:
            source = jnp.minimum(place - 1, end)
            known = source // self.width == place // self.width
        return (place > end) & known & (source >= 0), jnp.maximum(source, 0) + self.offset

    def _draw(self, law, seq, key):
        pos = seq.length[:, None] + jnp.arange(self.length)
        noise = gumbel(key, seq.rows, pos, law.shape[-1], stream=TARGET if self.coupled else DRAFT)
        return jnp.argmax(law + noise, axis=-1).astype(jnp.int32)
