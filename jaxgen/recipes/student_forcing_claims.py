"""Measuring S008's claim: what refinement does to a trained model, against as many more updates of plain teacher forcing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.nn.classifier import Classifier
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.evaluation import measure_samples, sample_many

__all__ = ["compare_refinements"]


def compare_refinements(config: Any, *, title: str, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """The same pretrained model a seed: as it is, after plain updates, and after refinement, on the same batches.

    Args:
      config: a resolved `RefinementConfig` or `FlexibleRefinementConfig` with a classifier.
      title: of the table.
      seeds: trainings; they share the tokenizer and the classifier.
      samples: images that are judged, of each model.
      log: takes progress lines.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    plain = dataclasses.replace(config, refine=dataclasses.replace(config.refine, weight=0.0))
    names = ("pretrained", "and plain teacher forcing", "and self-autoregressive refinement")
    scores: dict[str, list[dict]] = {name: [] for name in names}
    shared: dict[str, Any] = {}
    for seed in range(seeds):
        log(f"{title}: seed {seed}")
        recipe, params, _ = claims.train_all(config, seed, shared, log)
        shared = {name: params[name] for name in ("tokenizer", "classifier")}
        base = {name: value for name, value in params.items() if name != "refine"}
        plain_recipe, plain_params, _ = claims.train_all(plain, seed, base, log)
        trained = {names[0]: (recipe, base), names[1]: (plain_recipe, plain_params), names[2]: (recipe, params)}
        for name, (system, weights) in trained.items():
            scores[name].append(_scores(system, weights, samples, seed))
    rows = [_row(name, *trained[name], scores[name]) for name in names]
    claims.add_times(rows, [trained[name] for name in names])
    ours, theirs = (np.mean([score["Frechet"] for score in scores[name]]) for name in (names[2], names[0]))
    notes = f"{seeds} seeds; mean (spread). Refinement changes the distance of the pretrained model by {ours / theirs - 1:+.1%}"
    theirs = np.mean([score["Frechet"] for score in scores[names[1]]])
    notes += f", and that after plain updates by {ours / theirs - 1:+.1%} (published: -5.2 % of the pretrained model's FID)."
    return Claim(title, rows, notes)


def _scores(recipe: Recipe, params: Mapping[str, Any], samples: int, seed: int) -> dict[str, float]:
    config = recipe.config
    labels = np.sort(np.arange(samples, dtype=np.int32) % config.num_classes)
    options = dict(batch_size=min(100, samples), cfg=0.0, top_k=0, top_p=0.0)
    images = sample_many(recipe, params, jax.random.key(seed), labels, **options)
    judge = Classifier(num_classes=config.num_classes, width=config.classifier.width)
    found = measure_samples(judge, params["classifier"]["classifier"], images, labels, config.data)
    return {"class accuracy": found["class_accuracy"], "Frechet": found["frechet"]}


def _row(name: str, recipe: Recipe, params: Mapping[str, Any], scores: list[dict]) -> dict:
    refined = "refine" in params
    row = {"model": name, "more updates": recipe.stage("refine").steps if refined else 0}
    row["model calls"] = recipe.config.build_generator().order.steps
    row |= {column: claims.mean_and_spread([score[column] for score in scores]) for column in scores[0]}
    row |= claims.sampling_costs(recipe, params)
    return row | (claims.update_costs(recipe, params, stage="refine") if refined else {})
