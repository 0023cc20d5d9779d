"""Measuring S064's claim: one trained model on lists of scales of other lengths, sizes and aspect ratios."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.nn.classifier import Classifier
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.evaluation import measure_samples, sample_many
from jaxgen.recipes.flexible_scales import FlexibleConfig
from jaxgen.resample import resize

__all__ = ["compare_lists", "other_lists"]


def other_lists(patch_nums: tuple[int, ...]) -> dict[str, tuple[Any, ...]]:
    """Lists to sample on, made from a model's own: other numbers of steps, two more sizes, and two aspect ratios.

    Raises:
      ValueError: fewer than three scales.
    """
    if len(patch_nums) < 3:
        raise ValueError(f"patch_nums={patch_nums}: at least three scales are needed to make other lists of")
    last = patch_nums[-1]
    between = [size for a, b in itertools.pairwise(patch_nums) for size in ((a, b), b)]
    wide = [(n, -(-3 * n // 2)) for n in patch_nums[1:]]
    return {
        "its own": patch_nums,
        "two steps": (patch_nums[0], last),
        "a step fewer": (*patch_nums[:-2], last),
        "twice the steps": (patch_nums[0], *between),
        "smaller": patch_nums[:-1],
        "larger": (*patch_nums, -(-3 * last // 2)),
        "3:2": (patch_nums[0], *wide),
        "2:3": (patch_nums[0], *((w, h) for h, w in wide)),
    }


def compare_lists(
    config: FlexibleConfig, trained: Mapping[str, Any], *, seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """One model a seed, sampled on `other_lists` without further training.

    Images are brought to the size of the data before they are judged, so that an aspect ratio is undone.

    Args:
      config: resolved, with a classifier.
      trained: parameters by stage of the last seed; the others share its tokenizer.
      seeds: trainings.
      samples: images that are judged, of each list and seed.
      log: takes progress lines.
    """
    lists, shared = other_lists(config.tokenizer.patch_nums), {name: trained[name] for name in ("tokenizer", "classifier")}
    scores: dict[str, list[dict]] = {name: [] for name in lists}
    for seed in range(seeds):
        log(f"lists of scales: seed {seed}")
        params, recipe = trained, config.recipe()
        if seed < seeds - 1:
            recipe, params = claims.trained_once(config, seed, shared, log)
        for name, patch_nums in lists.items():
            scores[name].append(_scores(recipe, params, patch_nums, samples, seed))
    rows = [_row(recipe, name, lists[name], scores[name]) for name in lists]
    samples_of = [functools.partial(recipe.sample, patch_nums=patch_nums) for patch_nums in lists.values()]
    claims.add_times(rows, [(dataclasses.replace(recipe, sample=sample), params) for sample in samples_of], (64,))
    notes = (
        f"{seeds} seeds; mean (spread). One checkpoint a seed for all rows, trained on lists that end at "
        f"{config.tokenizer.patch_nums[-1]}; what lies beyond is taken greedily, as published. VAR has one list only: its "
        f"positions and scales are parameters."
    )
    return Claim("One model on lists of scales, judged at the size of the data", rows, notes)


def _scores(recipe, params, patch_nums, samples: int, seed: int) -> dict[str, float]:
    config = recipe.config
    labels = np.sort(np.arange(samples, dtype=np.int32) % config.num_classes)
    options = dict(cfg=0.0, top_k=0, top_p=0.0, patch_nums=patch_nums)
    images = sample_many(recipe, params, jax.random.key(seed), labels, batch_size=min(100, samples), **options)
    size = config.build_tokenizer().image_size
    for axis in (1, 2):  # an axis that shrinks is averaged, one that grows interpolated
        shape = tuple(size[i - 1] if i == axis else images.shape[i] for i in (1, 2))
        method = "area" if images.shape[axis] > size[axis - 1] else "bicubic"
        images = np.asarray(resize(jnp.asarray(images), shape, method))
    judge = Classifier(num_classes=config.num_classes, width=config.classifier.width)
    found = measure_samples(judge, params["classifier"]["classifier"], np.clip(images, -1, 1), labels, config.data)
    return {"class accuracy": found["class_accuracy"], "Frechet": found["frechet"]}


def _row(recipe, name: str, patch_nums, scores: list[dict]) -> dict:
    at = recipe.config.build_sampler(patch_nums)
    row = {
        "list": name,
        "last scales": " ".join("x".join(map(str, shape)) for shape in at.generator.order.shapes[-2:]),
        "pixels": "x".join(map(str, at.tokenizer.image_size)),
        "model calls": at.generator.order.steps,
        "tokens": at.generator.order.length,
    }
    return row | {column: claims.mean_and_spread([score[column] for score in scores]) for column in scores[0]}
