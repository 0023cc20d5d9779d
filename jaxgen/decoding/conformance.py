"""Exactness as a measurement: the enumerated law of a small model, and how far samples are from a law."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.decoding.speculate import Context, Sequences, Transform
from jaxgen.decoding.step import StepFn, View

__all__ = ["chi_square", "sequence_law", "total_variation"]


def sequence_law(
    step: StepFn,
    *,
    params: Any,
    cache: Any,
    cond: Any,
    prompt: list[int],
    vocab: int,
    length: int,
    transform: Transform = lambda logits, context: logits,
    stop: tuple[int, ...] = (),
) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of `prompt` by `length` tokens, or fewer that end with a stop token.

    Evaluates `step` on all vocab ** length sequences at once, each read whole: for models small enough.

    Args:
      step: the model; its cache must have vocab ** length rows.
      params, cache, cond: passed to `step`.
      prompt: at least one token.
      vocab: v.
      length: tokens to enumerate.
      transform: as in `speculate`.
      stop: as in `speculate`.
    """
    tails = np.array(list(itertools.product(range(vocab), repeat=length)), np.int32)
    b, p = len(tails), len(prompt)
    tokens = jnp.asarray(np.concatenate([np.tile(np.array(prompt, np.int32), (b, 1)), tails], axis=1))
    q = p + length - 1
    pos = jnp.broadcast_to(jnp.arange(q), (b, q))
    out, _ = step(params, cache, View(tokens[:, :q], pos, jnp.tril(jnp.ones((q, q), bool))), cond)
    # Each position asks the transform as plain sampling would: its sequence ends there and the root is its last token.
    laws = []
    for i in range(p - 1, q):
        seq = Sequences(tokens, jnp.full((b,), i + 1, jnp.int32), jnp.arange(b))
        logits = transform(out.params[:, i : i + 1], Context(seq, tokens[:, i : i + 1, None], pos[:, i : i + 1] + 1))
        laws.append(jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)[:, 0])
    log_p = np.stack([np.asarray(law, np.float64) for law in laws], axis=1)  # [b, length, v]
    picked = np.take_along_axis(log_p, tails[..., None], axis=2)[..., 0]
    law: dict[tuple[int, ...], float] = {}
    for tail, row in zip(tails.tolist(), picked):
        end = next((i + 1 for i, token in enumerate(tail) if token in stop), length)
        law[tuple(tail[:end])] = float(np.exp(row[:end].sum()))
    return law


def chi_square(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float], *, pooled_below: float = 5.0) -> float:
    """How unlikely the counts are under the law, as a normal deviate: |z| < 4 is no evidence against it.

    Pearson's statistic over cells, those with small expectations pooled, put through Wilson and Hilferty's cube root. A
    count where the law is 0 gives infinity.
    """
    total = sum(counts.values())
    if any(law.get(cell, 0.0) == 0.0 for cell, count in counts.items() if count):
        return float("inf")
    observed = np.array([counts.get(cell, 0) for cell in law], np.float64)
    expected = np.array(list(law.values())) * total
    small = expected < pooled_below
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    keep = expected > 0
    statistic, freedom = float(((observed - expected)[keep] ** 2 / expected[keep]).sum()), int(keep.sum()) - 1
    if freedom < 1:
        return 0.0
    centre, spread = 1 - 2 / (9 * freedom), np.sqrt(2 / (9 * freedom))
    return float(((statistic / freedom) ** (1 / 3) - centre) / spread)


def total_variation(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float]) -> float:
    """Half the L1 distance between the counts' frequencies and the law."""
    total = sum(counts.values())
    cells = set(counts) | set(law)
    return 0.5 * sum(abs(counts.get(cell, 0) / total - law.get(cell, 0.0)) for cell in cells)
