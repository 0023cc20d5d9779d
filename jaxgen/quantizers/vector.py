"""Nearest-neighbour lookup in a codebook, its statistics, and the revival of codes that nobody uses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

__all__ = ["CodebookState", "nearest", "revive"]


class CodebookState(NamedTuple):
    """What is remembered of a codebook while training.

    Attributes:
      usage: [v], moving average of how often each code is chosen a batch.
      candidates: [r, c], recent vectors that were quantised: where dead codes restart.
    """

    usage: Float[Array, "v"]
    candidates: Float[Array, "r c"]

    @classmethod
    def zeros(cls, vocab: int, width: int, candidates: int) -> CodebookState:
        """A state that has seen nothing."""
        return cls(jnp.zeros(vocab), jnp.zeros((candidates, width)))

    def update(self, counts: Float[Array, "v"], vectors: Float[Array, "n c"], key: Key[Array, ""], decay: float = 0.99):
        """The state after a batch with these counts; the candidates are drawn from its `vectors`."""
        index = jax.random.randint(key, (self.candidates.shape[0],), 0, vectors.shape[0])
        return CodebookState(decay * self.usage + (1 - decay) * counts, vectors[index])


def nearest(x: Float[Array, "... c"], codebook: Float[Array, "v c"], *, cosine: bool = False) -> Int[Array, "..."]:
    """argmin_i |x - codebook_i|^2, or the largest cosine similarity.

    The squared norm of `x` does not change the winner and is left out.
    """
    if cosine:
        x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        codebook = codebook / jnp.maximum(jnp.linalg.norm(codebook, axis=-1, keepdims=True), 1e-12)
        return jnp.argmax(jnp.einsum("...c,vc->...v", x, codebook, precision="highest"), axis=-1)
    dot = jnp.einsum("...c,vc->...v", x, codebook, precision="highest")
    return jnp.argmin(jnp.square(codebook).sum(-1) - 2 * dot, axis=-1)


def revive(
    codebook: Float[Array, "v c"], state: CodebookState, key: Key[Array, ""], *, threshold: float
) -> tuple[Float[Array, "v c"], CodebookState, Float[Array, ""]]:
    """Moves codes with a usage below `threshold` onto random candidates (Dhariwal et al. 2020, "random restart").

    Args:
      codebook: [v, c].
      state: its statistics; a revived code's usage restarts at twice the threshold, so that it gets time to be chosen.
      key: for the choice and a tiny jitter that keeps two codes from landing on the same point.
      threshold: in choices a batch.

    Returns:
      (codebook, state, number of codes revived).
    """
    pick, jitter = jax.random.split(key)
    vocab, width = codebook.shape
    index = jax.random.randint(pick, (vocab,), 0, state.candidates.shape[0])
    spread = 0.01 * state.candidates.std(axis=0)
    fresh = state.candidates[index] + spread * jax.random.normal(jitter, (vocab, width))
    dead = state.usage < threshold
    codebook = jnp.where(dead[:, None], fresh.astype(codebook.dtype), codebook)
    return codebook, state._replace(usage=jnp.where(dead, 2 * threshold, state.usage)), dead.sum().astype(jnp.float32)
