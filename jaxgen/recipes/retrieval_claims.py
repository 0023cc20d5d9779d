"""Whether another database makes a trained model's samples other ones (S159 RDM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxgen import metrics
from jaxgen.nn.classifier import Classifier
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, mean_and_spread, train_all
from jaxgen.recipes.evaluation import read_images, real_features, sample_many
from jaxgen.recipes.retrieval import RetrievalLlamaConfig

__all__ = ["swap_databases"]


def swap_databases(
    config: RetrievalLlamaConfig,
    databases: Mapping[str, tuple[int, ...]],
    *,
    unseen: tuple[int, ...],
    seeds: int,
    samples: int,
    log: Callable[[str], None],
) -> Claim:
    """What two models make from several databases: one that was trained on all classes, and one that never saw some of them.

    A classifier of all real images names the samples: the share that is of the database's classes, and the share that is of the
    class of the entry that was drawn. The distance is to the training images of the database's classes. Without neighbours, the
    same weights show what the model makes by itself.

    Args:
      config: of the first model; its database has all classes.
      databases: names and classes.
      unseen: classes that the second model and its database are trained without; it is sampled with a database of these alone.
      seeds: trainings of each.
      samples: images a row.
      log: takes progress lines.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    seen = tuple(c for c in range(config.num_classes) if c not in unseen)
    partly = dataclasses.replace(config, retrieval=dataclasses.replace(config.retrieval, classes=seen, trained=seen))
    without = {"no neighbours": ((), -1.0)}  # cfg=-1 is the model without its condition
    models = {
        "trained on all classes": (config, {name: (classes, 0.0) for name, classes in databases.items()} | without),
        f"never saw {_told(unseen)}": (partly, {_told(seen): (seen, 0.0), _told(unseen): (unseen, 0.0)} | without),
    }
    measured: dict[tuple[str, str], list[dict]] = {}
    for seed in range(seeds):
        shared: dict = {}
        for model, (system, asked) in models.items():
            log(f"{model}: seed {seed}")
            recipe, params, _ = train_all(system, seed, shared, log)
            shared = {name: params[name] for name in ("tokenizer", "encoder", "classifier")}
            for name, (classes, cfg) in asked.items():
                row = _measure(recipe, params, classes, cfg, jax.random.key(seed), samples)
                measured.setdefault((model, name), []).append(row)
    rows = []
    for (model, name), found in measured.items():
        row = {"S159 RDM": model, "database": name}
        for column, value in found[0].items():
            row[column] = "" if value == "" else mean_and_spread([each[column] for each in found])
        rows.append(row)
    title = "Samples of one trained model with other databases: what a classifier of the real images takes them for"
    notes = f"{seeds} seeds; mean (spread). No guidance, no truncation; the model is told no class, only neighbours' features."
    return Claim(title, rows, notes)


def _told(classes: tuple[int, ...]) -> str:
    return "classes " + ", ".join(map(str, classes))


def _measure(recipe: Recipe, params: dict, classes: tuple[int, ...], cfg: float, key, samples: int) -> dict:
    """Of samples from a database of `classes`, whose entries are drawn equally often; all classes, where none are named."""
    config = recipe.config
    classes = np.array(classes or range(config.num_classes), np.int32)
    # Without neighbours any database will do.
    options = dict(classes=tuple(classes.tolist())) if cfg == 0 else {}
    asked = np.resize(classes, samples) if cfg == 0 else np.full(samples, -1, np.int32)
    images = sample_many(recipe, params, key, asked, batch_size=min(100, samples), cfg=cfg, **options)
    judge = Classifier(num_classes=config.num_classes, width=config.classifier.width)
    variables = params["classifier"]["classifier"]
    features, logits = read_images(judge, variables, images)
    real, _, labels = real_features(judge, variables, config.data, split="train")
    named = logits.argmax(-1)
    stats = [metrics.FeatureStats.of(x) for x in (real[np.isin(labels, classes)], features)]
    return {
        "share of its classes": float(np.isin(named, classes).mean()) if cfg == 0 else "",
        "share of the drawn entry's class": float((named == asked).mean()) if cfg == 0 else "",
        "Frechet to its images": metrics.frechet_distance(*stats),
    }
