"""Drafts from masks that the target read in the last pass behind every node, so that there are new ones whatever was accepted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.noise import DRAFT, TARGET, gumbel
from jaxgen.decoding.speculate import Context, Proposal
from jaxgen.decoding.topology import Topology

__all__ = ["MaskDrafts"]


class _Masks(NamedTuple):
    feats: Float[Array, "b k d"]
    known: Any  # bool [b]: the masks behind the last token were read


@dataclasses.dataclass(frozen=True)
class MaskDrafts:
    """Quadratic decoding (Samragh et al. 2025, section 3.5): k masks are read behind the root and behind each of k drafts.

    Attributes:
      head: `(feats [b, 1, d], before [b, 1]) -> logits [b, 1, v]`, the law of a mask's token given the token before it.
      width: d, of the target's features.
      masks: the ids of the k masks.
      coupled: draw with the target's own noise, for `Coupled`.
    """

    head: Callable[[Float[Array, "b 1 d"], Int[Array, "b 1"]], Float[Array, "b 1 v"]]
    width: int
    masks: tuple[int, ...]
    coupled: bool = False

    @property
    def topology(self) -> Topology:
        """A chain with probes."""
        return Topology(tuple(range(len(self.masks))), self.masks)

    def start(self, seq, key, vocab, out):
        b = seq.length.shape[0]
        return _Masks(jnp.zeros((b, len(self.masks), self.width)), jnp.zeros((b,), bool))

    def propose(self, state, seq, transform, key):
        b, k = seq.length.shape[0], len(self.masks)
        root = jnp.take_along_axis(seq.tokens, seq.length[:, None] - 1, axis=1)
        path = jnp.full((b, 1, k + 1), -1, jnp.int32).at[:, 0, 0].set(root[:, 0])
        tokens, laws = [root], []
        for i in range(k):
            at = (seq.length + i)[:, None]
            logits = transform(self.head(state.feats[:, i : i + 1], tokens[-1]), Context(seq, path, at))
            log_q = jax.nn.log_softmax(logits, axis=-1)
            noise = gumbel(key, seq.rows, at, log_q.shape[-1], stream=TARGET if self.coupled else DRAFT)
            tokens.append(jnp.argmax(log_q + noise, axis=-1).astype(jnp.int32))
            laws.append(log_q)
            path = path.at[:, 0, i + 1].set(tokens[-1][:, 0])
        valid = jnp.broadcast_to(state.known[:, None], (b, k))
        return Proposal(jnp.concatenate(tokens[1:], axis=1), jnp.concatenate(laws, axis=1), valid), state

    def update(self, state, seq, verdict, taken, log_p, out):
        # The masks behind the last accepted node lie at the places of the tokens after it, of which the first is certain now.
        k = len(self.masks)
        node = jnp.maximum(taken - 1, 0)
        at = k + 1 + node[:, None] * k + jnp.arange(k)
        feats = jnp.take_along_axis(out.feats, at[..., None], axis=1)
        return _Masks(feats.astype(state.feats.dtype), state.known | (taken > 0))
