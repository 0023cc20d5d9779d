"""Changes to logits before sampling: temperature, top-k, top-p, min-p, penalties; all settings are traced.

A transform is a function `(logits [b, q, v], context) -> logits`. It may look at all tokens before a query, those drafted on the
query's own path included (`Context`), so that speculative sampling asks what plain sampling would have asked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.decoding.speculate import Context, Transform

__all__ = ["Sampling", "apply_sampling", "check_settings", "compose", "penalise", "token_counts", "truncate"]


def check_settings(
    *,
    cfg=0.0,
    temperature=1.0,
    top_k=0,
    top_p=0.0,
    min_p=0.0,
    repetition=1.0,
    presence=0.0,
    frequency=0.0,
    vocab: int | None = None,
) -> None:
    """Checks sampling settings that are concrete, numbers or arrays; traced ones pass.

    Raises:
      ValueError: naming the setting and its value.
    """
    positive = (lambda x: (x > 0) & (x < np.inf), "> 0 and finite")
    finite = (np.isfinite, "finite")
    most = np.inf if vocab is None else vocab
    checks = (
        ("cfg", cfg, finite),
        ("temperature", temperature, positive),
        ("top_k", top_k, (lambda x: (x >= 0) & (x <= most) & (x == np.floor(x)), f"in 0..{vocab or 'v'}")),
        ("top_p", top_p, (lambda x: (x >= 0) & (x <= 1), "in [0, 1]")),
        ("min_p", min_p, (lambda x: (x >= 0) & (x < 1), "in [0, 1)")),
        ("repetition", repetition, positive),
        ("presence", presence, finite),
        ("frequency", frequency, finite),
    )
    for name, value, (valid, want) in checks:
        if isinstance(value, jax.core.Tracer):
            continue
        good = valid(np.asarray(value))
        if not good.all():
            raise ValueError(f"{name}={np.asarray(value)[~good].flat[0] if good.ndim else value}: must be {want}")


def truncate(
    logits: Float[Array, "*b v"], context: Context | None = None, *, temperature=1.0, top_k=0, top_p=0.0, min_p=0.0
) -> Float[Array, "*b v"]:
    """Logits / temperature with everything outside the top-k, then the top-p, then the min-p set at -inf.

    The top-p set is the smallest set of most probable tokens, after top-k, whose mass reaches p (Holtzman et al. 2020); ties
    with the last token kept are kept too. The min-p set is the tokens at least min_p times as probable as the most probable
    one (Nguyen et al. 2024, arXiv:2407.01082, algorithm 1). Each setting is a number, or an array [b] with one a row of logits.

    A setting out of its range raises where it is concrete; where it is traced, the logits of its rows become NaN, which
    `speculate` reports.

    Args:
      logits: of any leading shape.
      context: not looked at; it makes this function, its settings given, a transform.
      temperature: > 0.
      top_k: how many tokens to keep; 0 keeps all.
      top_p: the mass to keep; 0 or 1 keeps all.
      min_p: in [0, 1); 0 keeps all.

    Raises:
      ValueError: a concrete setting out of its range, or one that is neither a number nor [b].
    """
    check_settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    temperature, top_k, top_p, min_p = (
        _a_row(name, x, logits)
        for name, x in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p))
    )
    valid = (temperature > 0) & jnp.isfinite(temperature) & (top_k >= 0) & (top_p >= 0) & (top_p <= 1)
    valid &= (min_p >= 0) & (min_p < 1)
    logits = logits.astype(jnp.float32) / jnp.where(valid, temperature, jnp.nan)
    vocab = logits.shape[-1]
    top_k, nucleus = top_k.astype(jnp.int32), (top_p > 0) & (top_p < 1)

    def cut(x):
        # Sorting is the cost here, so the whole branch is skipped when nothing is to be cut.
        descending = -jnp.sort(-x, axis=-1)
        kth = jnp.where(top_k > 0, jnp.clip(top_k, 1, vocab), vocab) - 1
        ranked = jnp.where(jnp.arange(vocab) <= kth, descending, -jnp.inf)
        probs = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        # Infinity where it is off: rounding lifts the mass before an unlikely token to 1.
        keep = (before < jnp.where(nucleus, top_p, jnp.inf)) & (jnp.arange(vocab) <= kth)
        keep = keep.at[..., 0].set(True)
        threshold = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(x >= threshold, x, -jnp.inf)

    logits = jax.lax.cond(((top_k > 0) | nucleus).any(), cut, lambda x: x, logits)
    least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where((logits >= least) | jnp.isnan(logits), logits, -jnp.inf)


def penalise(
    logits: Float[Array, "b q v"], context: Context, *, repetition=1.0, presence=0.0, frequency=0.0
) -> Float[Array, "b q v"]:
    """Makes tokens that have occurred less likely: in the prompt, in what was generated, or on the query's own path.

    `repetition` divides their logits (Keskar et al. 2019, arXiv:1909.05858, section 4.1); negative logits are multiplied,
    since dividing them would reward. Then `presence` is subtracted once, and `frequency` once an occurrence. Each setting is
    a number or an array [b]. Out of range they do as in `truncate`. Comes before `truncate`.

    Args:
      logits: of the law.
      context: what came before.
      repetition: > 0; 1 is off, 1.2 is the paper's.
      presence: 0 is off.
      frequency: 0 is off.

    Raises:
      ValueError: a concrete setting out of its range, or one that is neither a number nor [b].
    """
    check_settings(repetition=repetition, presence=presence, frequency=frequency)
    repetition, presence, frequency = (
        _a_row(name, x, logits).astype(jnp.float32)
        for name, x in (("repetition", repetition), ("presence", presence), ("frequency", frequency))
    )
    valid = (repetition > 0) & jnp.isfinite(repetition) & jnp.isfinite(presence) & jnp.isfinite(frequency)

    def lower(x):
        counts = token_counts(context, x.shape[-1])
        divided = jnp.where(x > 0, x / repetition, x * repetition) - presence - frequency * counts
        return jnp.where(valid, jnp.where(counts > 0, divided, x), jnp.nan)

    active = (repetition != 1) | (presence != 0) | (frequency != 0)
    return jax.lax.cond(active.any(), lower, lambda x: x, logits.astype(jnp.float32))


def token_counts(context: Context, vocab: int) -> Float[Array, "b q v"]:
    """How often each token has occurred before each query's law, its own path included."""
    seq, path = context.seq, context.path
    b, s = seq.tokens.shape
    rows, queries = jnp.arange(b), jnp.arange(path.shape[1])
    certain = (jnp.arange(s) < seq.length[:, None]).astype(jnp.float32)
    counts = jnp.zeros((b, vocab)).at[rows[:, None], seq.tokens].add(certain, mode="drop")
    counts = jnp.broadcast_to(counts[:, None], (b, len(queries), vocab))
    if path.shape[2] == 1:
        return counts
    drafted = path[..., 1:]  # the root is certain
    drafted = jnp.where(drafted >= 0, drafted, vocab)
    return counts.at[rows[:, None, None], queries[:, None], drafted].add(1.0, mode="drop")


class Sampling(NamedTuple):
    """The settings of `penalise` and `truncate`: numbers, or arrays [b] with one a row.

    Attributes:
      temperature: > 0.
      top_k: 0 is off.
      top_p: 1 (or 0) is off.
      min_p: 0 is off.
      repetition: 1 is off.
      presence: 0 is off.
      frequency: 0 is off.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition: Any = 1.0
    presence: Any = 0.0
    frequency: Any = 0.0


def apply_sampling(logits: Float[Array, "b q v"], context: Context, sampling: Sampling) -> Float[Array, "b q v"]:
    """`penalise`, then `truncate`, as `sampling` says."""
    s = sampling
    logits = penalise(logits, context, repetition=s.repetition, presence=s.presence, frequency=s.frequency)
    return truncate(logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)


def compose(*transforms: Transform) -> Transform:
    """One transform that applies several, the first first.

    Example:
      >>> import functools
      >>> transform = compose(
      ...     functools.partial(penalise, repetition=1.2), functools.partial(truncate, temperature=0.8, top_p=0.9)
      ... )
    """

    def apply(logits, context):
        for transform in transforms:
            logits = transform(logits, context)
        return logits

    return apply


def _a_row(name: str, setting, logits):
    """A setting as an array that broadcasts with `logits`."""
    x = jnp.asarray(setting)
    if x.ndim == 0:
        return x
    if logits.ndim < 2 or x.shape != logits.shape[:1]:
        raise ValueError(f"{name} has shape {x.shape}: must be a number or one a row of logits {logits.shape}")
    return x.reshape(-1, *(1,) * (logits.ndim - 1))
