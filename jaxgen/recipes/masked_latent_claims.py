"""Measuring S028's claim: what a draft saves of the target's calls, and whether the samples stay the target's."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.decoding.density import PathDensity
from jaxgen.generators.masked_latent_sampler import MaskedLatentSampler
from jaxgen.nn.classifier import Classifier
from jaxgen.recipe import modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.evaluation import measure_samples
from jaxgen.recipes.masked_latent import MaskedLatentConfig

__all__ = ["compare_samplers"]

BATCH = 100


def compare_samplers(config: MaskedLatentConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """One target and one draft: samples of each alone, and of the target with the draft's help.

    Rows hold means over the seeds, which are keys of sampling: the models are trained once. "Calls" are sequential calls of the
    target's transformer an image; with n drafts a call looks at n + 1 states, whose number are the "states". The last rows are
    what a reader may compare with: the draft accepted by the released code's temperature, and the target alone in as many
    steps as the speculation took calls.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    recipe, params, _ = claims.train_all(config, config.run.seed, {}, log)
    variables, full = modules(params), recipe.config.build_sampler()
    alone = dataclasses.replace(full, drafts=0, draft=None)
    weights = {"generator": variables["generator"], "draft": variables["draft"]}
    target_only, draft_only = {"generator": weights["generator"]}, {"generator": weights["draft"]}
    systems = {
        "target alone": (alone, target_only),
        "draft alone": (dataclasses.replace(alone, generator=full.draft), draft_only),
        f"{full.drafts} drafts": (full, weights),
        f"{full.drafts} drafts, temperature 42": (dataclasses.replace(full, rule=PathDensity(42.0)), weights),
    }
    rows = []
    for name, (sampler, given) in systems.items():
        rows.append(_row(name, sampler, given, recipe.config, variables, seeds, samples, log))
    calls = round(_number(rows[2]["calls"]))
    fewer = dataclasses.replace(alone, steps=max(1, calls))
    rows.append(_row(f"target alone, {calls} steps", fewer, target_only, recipe.config, variables, seeds, samples, log))
    base, ours = _number(rows[0]["calls"]), _number(rows[2]["calls"])
    notes = (
        f"{seeds} keys of sampling, one pair of models, {samples} samples each; mean (spread). {base / ours:.2f} times fewer "
        f"sequential calls of the target. A call with drafts looks at several states as rows of a batch, which saves time only "
        f"where a call with more rows takes no longer; measured on {jax.devices()[0].device_kind}."
    )
    return Claim("Sampling with a draft, and what it is measured against", rows, notes)


def _row(name: str, sampler: MaskedLatentSampler, given, config, variables, seeds: int, samples: int, log) -> dict[str, Any]:
    measured: list[dict[str, float]] = []
    for seed in range(seeds):
        log(f"{name}: seed {seed}")
        images, labels, results = _samples(sampler, given, config.num_classes, samples, seed)
        row = _costs(sampler, results)
        if "classifier" in variables:
            judge = Classifier(num_classes=config.num_classes, width=config.classifier.width)
            scores = measure_samples(judge, variables["classifier"], images, labels, config.data)
            row |= {"class accuracy": scores["class_accuracy"], "Frechet": scores["frechet"]}
        measured.append(row)
    out = {"sampler": name} | {column: claims.mean_and_spread([row[column] for row in measured]) for column in measured[0]}
    for batch in (1, BATCH):
        out[f"ms/image, batch {batch}"] = round(1e3 * _seconds(sampler, given, config.num_classes, batch), 3)
    return out


def _samples(sampler: MaskedLatentSampler, given, classes: int, samples: int, seed: int):
    """(images, labels, results of the batches)."""
    labels = np.sort(np.arange(samples, dtype=np.int32) % classes)
    size, images, results = min(BATCH, samples), [], []
    for i in range(0, samples, size):
        chunk = np.resize(labels[i : i + size], size)
        pictures, result = sampler(given, jax.random.fold_in(jax.random.key(seed), i), chunk)
        images.append(np.asarray(pictures)[: len(labels[i : i + size])])
        results.append(jax.device_get(result))
    return np.concatenate(images), labels, results


def _costs(sampler: MaskedLatentSampler, results) -> dict[str, float]:
    """What sampling took, an image or a token."""
    total = {name: np.concatenate([np.atleast_1d(getattr(r, name)) for r in results]) for name in results[0]._fields}
    calls = float(total["row_calls"].mean())
    first = min(sampler.prefill_steps, sampler.steps) if sampler.drafts else sampler.steps
    costs = {"calls": calls, "states": first + (calls - first) * (sampler.drafts + 1)}
    checked = total["checked"].sum()
    none = float("nan")
    return costs | {
        "accepted": float(total["accepted"].sum() / checked) if checked else none,
        "paths a checked token": float(total["paths"].sum() / checked) if checked else none,
    }


def _seconds(sampler: MaskedLatentSampler, given: Mapping[str, Any], classes: int, batch: int, repeats: int = 5) -> float:
    """Median seconds an image of warm, compiled sampling."""
    labels, seconds = np.arange(batch, dtype=np.int32) % classes, []
    for i in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(sampler(given, jax.random.key(i), labels)[0])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / batch


def _number(cell) -> float:
    """The mean in a cell of `mean_and_spread`."""
    return float(str(cell).split()[0])
