"""S086's claim: rewards rise with the compute that a search spends, and more than best-of-n's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from jaxgen.decoding import SearchPlan
from jaxgen.nn.classifier import Classifier
from jaxgen.recipe import modules
from jaxgen.recipes.claims import Claim, mean_and_spread, sampling_costs, seconds_an_image, train_all, trained
from jaxgen.recipes.evaluation import measure_samples, sample_many
from jaxgen.recipes.searched import SearchedConfig

__all__ = ["compare_searches", "equal_compute"]

# Added to a seed for the classifier that judges, which is not the one that guides.
JUDGE = 1000


def equal_compute(plan: SearchPlan, order) -> SearchPlan:
    """Best-of-n with as many predicted tokens as a plan has, as nearly as whole samples allow."""
    one = SearchPlan.best_of(1, order.steps)
    return SearchPlan.best_of(max(1, round(plan.tokens(order) / one.tokens(order))), order.steps)


def compare_searches(
    config: SearchedConfig,
    plans: Mapping[str, SearchPlan],
    *,
    title: str,
    seeds: int,
    samples: int,
    log: Callable[[str], None],
    batch: int = 50,
) -> Claim:
    """Trains the system `seeds` times, and samples by each plan from the same model.

    Each row has the plan's compute and the mean reward of the images that were returned; what another classifier, which guided
    nothing, thinks of them; and their Fréchet distance, which suffers where a search makes images alike. All are means over
    the seeds with the spread (largest - smallest) behind them.

    Args:
      config: of the system.
      plans: by name.
      title: of the table.
      seeds: trainings.
      samples: images for each plan and seed.
      log: takes progress lines.
      batch: images that are sampled at once.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    labels = np.sort(np.arange(samples, dtype=np.int32) % config.num_classes)
    order = config.build_generator().order
    measured: dict[str, list[dict]] = {name: [] for name in plans}
    cost = {}
    for seed in range(seeds):
        recipe, params = trained(config, seed, log)
        given = {name: value for name, value in params.items() if name != "classifier"}
        judge = modules(train_all(config, seed + JUDGE, given, log)[1])["classifier"]
        for name, plan in plans.items():
            log(f"{name}: seed {seed}")
            result = _measure(config, recipe, params, judge, plan, labels, seed, batch)
            measured[name].append(result)
            if seed == 0:
                cost[name] = _cost(recipe, params, plan, order, batch)
    rows = []
    for name, results in measured.items():
        columns = {column: mean_and_spread([result[column] for result in results]) for column in results[0]}
        rows.append({"search": name} | cost[name] | columns)
    notes = f"{seeds} seeds, {samples} images each; mean (spread). Tokens are those that the generator predicts."
    return Claim(title, rows, notes)


def _measure(config, recipe, params, judge, plan, labels, seed, batch) -> dict:
    settings = dict(cfg=0.0, top_k=0, top_p=0.0, plan=plan)
    images = sample_many(recipe, params, jax.random.key(seed), labels, batch_size=min(batch, len(labels)), **settings)
    judged = config.judges(params)["reward"]
    reward = jax.jit(lambda images, labels: judged(images, labels))(images, labels)
    module = Classifier(num_classes=config.num_classes, width=config.classifier.width)
    quality = measure_samples(module, judge, images, labels, config.data, limit=2000)
    return {
        "reward": float(np.mean(reward)),
        "other classifier's accuracy": quality["class_accuracy"],
        "Frechet": quality["frechet"],
        "recall": quality["recall"],
    }


def _cost(recipe, params, plan: SearchPlan, order, batch: int) -> dict:
    searching = dataclasses.replace(recipe, sample=functools.partial(recipe.sample, plan=plan))
    (seconds,) = seconds_an_image([(searching, params)], batch, repeats=3)
    row = {"candidates": " ".join(map(str, plan.widths)), "model calls": order.steps, "tokens an image": plan.tokens(order)}
    return row | sampling_costs(searching, params) | {"ms/image": round(1e3 * seconds, 3)}
