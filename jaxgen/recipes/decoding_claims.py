"""Decoding methods side by side: target calls, tokens a call and time, on the same model and prompts in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxgen.data.text import TextConfig, read_text
from jaxgen.generators.sequence_sampler import SequenceSampler

__all__ = ["compare_samplers", "held_out_prompts"]


def held_out_prompts(data: TextConfig, *, count: int, length: int, seed: int = 0) -> Int[np.ndarray, "n p"]:
    """Windows of the held-out text."""
    text = read_text(data, "test")
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return np.stack([text[start : start + length] for start in starts]).astype(np.int32)


def compare_samplers(
    samplers: Mapping[str, SequenceSampler],
    params: Mapping[str, Any],
    prompts: Int[np.ndarray, "n p"],
    *,
    new_tokens: int,
    repeats: int = 5,
    baseline: str = "plain",
    **settings,
) -> list[dict]:
    """A row for each sampler: what it costs to continue all prompts as one batch, and each of some prompts alone.

    Columns: target calls a row needs for its tokens, tokens a target call, and medians over `repeats` of seconds for a batch of 1
    and for all prompts, with their ratio to the baseline (> 1 is faster). The samplers take turns, so that a machine that slows
    down slows all of them.

    Args:
      samplers: by name.
      params: variables by module name, of all samplers.
      prompts: the batch.
      new_tokens: a row.
      repeats: keys.
      baseline: whose seconds the others are compared to; None of the samplers compares nothing.
      **settings: of the samplers.
    """
    max_length = prompts.shape[1] + new_tokens
    seconds: dict[str, dict[int, list[float]]] = {name: {1: [], len(prompts): []} for name in samplers}
    calls: dict[str, list[float]] = {name: [] for name in samplers}
    for i in range(repeats + 1):
        for name, sampler in samplers.items():
            for batch in seconds[name]:
                start = time.perf_counter()
                result = sampler(params, jax.random.key(i), prompts[:batch], max_length=max_length, **settings)
                jax.block_until_ready(result.tokens)
                if i:
                    seconds[name][batch].append(time.perf_counter() - start)
            if i:
                made = np.asarray(result.length).sum() - prompts.size
                calls[name].append(made / np.asarray(result.row_calls).sum())
    rows = []
    for name in samplers:
        per_call = statistics.fmean(calls[name])
        row = {"method": name, "tokens a target call": round(per_call, 3), "target calls": round(new_tokens / per_call, 1)}
        for batch, measured in seconds[name].items():
            row[f"ms a token, batch {batch}"] = round(1e3 * statistics.median(measured) / (new_tokens * batch), 4)
            if baseline in samplers:
                ratio = statistics.median(seconds[baseline][batch]) / statistics.median(measured)
                row[f"speed-up, batch {batch}"] = round(ratio, 2)
        rows.append(row)
    return rows
