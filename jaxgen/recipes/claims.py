"""Measuring published claims again: systems side by side, on the same data in one run."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen import config as config_lib
from jaxgen import metrics
from jaxgen.benchmark import compile_report, count_flops
from jaxgen.recipe import Recipe
from jaxgen.recipes.evaluation import evaluate_images
from jaxgen.recipes.next_scale import NextScaleConfig
from jaxgen.train import load_params, save_params, train

__all__ = [
    "Claim",
    "add_times",
    "claim_config",
    "compare_generators",
    "costs",
    "mean_and_spread",
    "reuse",
    "sampling_costs",
    "scaling_law",
    "seconds_an_image",
    "test_nats",
    "train_all",
    "trained",
    "trained_once",
    "update_costs",
]


class Claim(NamedTuple):
    """One table of results.

    Attributes:
      title: what was compared.
      rows: one a system, in the order measured.
      notes: what was found, in words; a claim that did not reproduce is said here.
    """

    title: str
    rows: list[dict]
    notes: str = ""


def claim_config(build: Callable[[str], Any], budget: str, edits: Sequence[str], *, small: str = "small") -> tuple[Any, bool]:
    """(The resolved configuration that a claim measures, whether the budget is "smoke").

    Args:
      build: from a variant to its configuration.
      budget: "smoke" or "small".
      edits: of the configuration.
      small: the variant that the budget "small" takes.

    Raises:
      ValueError: another budget.
    """
    if budget not in ("smoke", "small"):
        raise ValueError(f"budget {budget!r} is not one of smoke, small")
    return config_lib.override(build("smoke" if budget == "smoke" else small), edits).resolve(), budget == "smoke"


def compare_generators(
    systems: Mapping[str, Any],
    *,
    seeds: int,
    samples: int,
    log: Callable[[str], None],
    columns: Callable[[Recipe, dict], dict] | None = None,
    each: Callable[[Recipe, dict, int], dict] | None = None,
    same_weights: Mapping[str, str] | None = None,
    title: str = "Generators of equal size on the same final grid of tokens, data and training budget",
) -> Claim:
    """Trains each system `seeds` times and measures quality, model calls, seconds an image, FLOPs and memory.

    Each system's row holds means over the seeds, with the spread (max - min) behind them where there is more than one seed; the
    seeds share the system's tokenizer, and systems with equal ones and equal data share it, too. Sampling is without guidance and
    truncation, so that the model's own law is judged, by one classifier for all systems.

    Args:
      systems: configurations of image systems with the stages "generator", "classifier" and, if there is anything to train,
        "tokenizer"; see also `evaluate_images`.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
      columns: `(recipe, parameters by stage) -> {column: value}`, of the last seed; they come last, and replace others of their
        names.
      each: `(recipe, parameters by stage, seed) -> {column: number}`, of every seed.
      same_weights: systems that sample with the weights of an earlier one, {name: the earlier one's}.
      title: of the table.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    weights = {}
    rows, last = [], []
    judge, tokenizers = {}, {}
    for name, config in systems.items():
        measured, shared = [], _tokenizer_key(config)
        for seed in range(seeds):
            log(f"{name}: seed {seed}")
            if name in (same_weights or {}):
                recipe, params = _seeded(config, seed).recipe(), weights[same_weights[name], seed]
            else:
                recipe, params = trained_once(config, seed, tokenizers.get(shared, {}) | judge, log)
            weights[name, seed] = params
            tokenizers[shared] = {stage: params[stage] for stage in ("tokenizer",) if stage in params}
            judge = {"classifier": params["classifier"]}
            settings = dict(cfg=0.0, top_k=0, top_p=0.0)
            result, _ = evaluate_images(recipe, params, jax.random.key(seed), num=samples, batch_size=100, settings=settings)
            measured.append(
                {
                    "PSNR of tokens": result["reconstruction"]["psnr"],
                    "class accuracy": result["generation"]["class_accuracy"],
                    "Frechet": result["generation"]["frechet"],
                    **(each(recipe, params, seed) if each else {}),
                }
            )
        order = getattr(recipe.config.build_generator(), "order", None)
        row = {"system": name, "parameters M": round(_size(params["generator"]) / 1e6, 3)}
        row |= {"model calls": order.steps, "tokens": order.length} if order else {"model calls": "", "tokens": ""}
        for column in measured[0]:
            row[column] = mean_and_spread([m[column] for m in measured])
        row |= costs(recipe, params)
        real = result["generation"]
        row |= {"real class accuracy": real["class_accuracy_real"], "Frechet, real test images": real["frechet_real"]}
        rows.append(row | (columns(recipe, params) if columns else {}))
        last.append((recipe, params))
    add_times(rows, last)
    steps = [row["model calls"] for row in rows]
    notes = f"{seeds} seeds; mean (spread). Model calls an image: {' against '.join(map(str, steps))}."
    return Claim(title, rows, notes)


def _tokenizer_key(config) -> str:
    """What a system's tokenizer is made of and trained on, so that equal ones are trained once."""
    names = ["data", "tokenizer", "tokenizer_train"]
    if getattr(getattr(config, "tokenizer_train", None), "aligned", False):
        names += ["features", "features_train"]
    parts = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return f"{type(config.build_tokenizer()).__name__} {parts}"


def costs(recipe: Recipe, params, *, batch: int = 16) -> dict:
    """`sampling_costs` and `update_costs` of the stage "generator"."""
    return sampling_costs(recipe, params, batch=batch) | update_costs(recipe, params, batch=batch)


def sampling_costs(recipe: Recipe, params, *, batch: int = 16) -> dict:
    """What an image costs, from the sampler's program: GFLOP (`count_flops`) and MB of temporary memory.

    Both depend on shapes alone, and not on the parameters' values.

    Args:
      recipe: its `sample` is called with its own settings, which means with guidance where it has any.
      params: by stage.
      batch: of the program that is compiled for its memory; GFLOP are per image.
    """
    labels = np.arange(batch, dtype=np.int32) % recipe.config.num_classes

    def draw(params, key):
        return recipe.sample(params, key, labels)[recipe.shows]

    return _program_costs("sampling", batch, draw, params, jax.random.key(0))


def update_costs(recipe: Recipe, params, *, stage: str = "generator", batch: int = 16) -> dict:
    """What an image costs in an update, forward and backward pass; see `sampling_costs`.

    Args:
      recipe: whose stage is trained.
      params: by stage.
      stage: its name.
      batch: see `sampling_costs`.
    """
    training = recipe.stage(stage)
    frozen = {name: params[name] for name in training.needs}
    trained, state = jax.eval_shape(training.init, jax.random.key(0), frozen)
    images = next(iter(training.data(0, 1)))
    images = {name: np.resize(values, (batch, *values.shape[1:])) for name, values in images.items()}

    def update(trained, state, images, key, frozen):
        return jax.grad(lambda p: training.loss(p, state, images, key, 0, frozen)[0])(trained)

    return _program_costs("update", batch, update, trained, state, images, jax.random.key(0), frozen)


def _program_costs(name: str, batch: int, fn: Callable, *args) -> dict:
    return {
        f"{name} GFLOP/image": count_flops(fn, *args) / batch / 1e9,
        f"{name} temporary MB, batch {batch}": compile_report(fn, *args)[1].get("temp_MB", ""),
    }


def test_nats(recipe: Recipe, params: Mapping[str, Any], state: Any = ()) -> float:
    """Mean loss of the stage "generator" over the test images: nats a token of a system that predicts tokens.

    `state` is the stage's, of those that have one.
    """
    stage = recipe.stage("generator")
    frozen = {name: params[name] for name in stage.needs}
    evaluate = jax.jit(lambda batch: stage.eval_loss(params["generator"], state, batch, jax.random.key(0), frozen)["loss"])
    values, counts = np.array([(float(evaluate(batch)), len(batch["label"])) for batch in stage.eval_data(0, 1)]).T
    return float(values @ counts / counts.sum())


def scaling_law(sizes: Mapping[str, NextScaleConfig], *, log: Callable[[str], None]) -> Claim:
    """Test loss of models that differ in size alone, on one tokenizer, and the power law L = (b N)^a through them."""
    rows, tokenizer = [], {}
    for name, config in sizes.items():
        log(f"scaling: {name}")
        config = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, steps=0))
        _, params, metrics_of = train_all(config, 0, tokenizer, log)
        tokenizer = {"tokenizer": params["tokenizer"]}
        row = {"model": name, "parameters M": round(_size(params["generator"]) / 1e6, 4)}
        rows.append(row | {f"test {key}": metrics_of["generator"][key] for key in ("nll", "nll_last_step")})
    sizes_m = np.array([row["parameters M"] for row in rows]) * 1e6
    law = metrics.fit_power_law(sizes_m, np.array([row["test nll"] for row in rows]))
    notes = f"L = (b N)^a with a = {law.a:.4f}, b = {law.b:.4g}; correlation of the logarithms r = {law.r:.4f}."
    return Claim("Test loss (nats a token) against the generator's size", rows, notes)


def train_all(config: Any, seed: int, given: Mapping[str, dict], log) -> tuple[Recipe, dict, dict]:
    """(recipe, parameters by stage, last metrics by stage) of a system whose stages in `given` are trained already."""
    recipe = _seeded(config, seed).recipe()
    kept = _kept_stages(recipe, seed)
    given = {stage: load_params(folder, stage)[0] for stage, folder in kept.items() if folder.exists()} | dict(given)
    stages = tuple(dataclasses.replace(stage, steps=0) if stage.name in given else stage for stage in recipe.stages)
    recipe = dataclasses.replace(recipe, stages=stages)
    with tempfile.TemporaryDirectory() as workdir:
        for stage in stages:
            if stage.name in given:
                save_params(workdir, stage.name, given[stage.name])
        results = train(recipe, workdir, run=recipe.config.run, log=log)
    params = {name: result.params for name, result in results.items()}
    for stage, folder in kept.items():
        if not folder.exists():
            save_params(folder, stage, params[stage])
    return recipe, {**given, **params}, {name: result.metrics for name, result in results.items()}


def _seeded(config: Any, seed: int) -> Any:
    """The configuration of a run with this seed."""
    return config_lib.override(config, [f"run.seed={seed}"])


def trained_once(config: Any, seed: int, given: Mapping[str, dict], log) -> tuple[Recipe, dict]:
    """`train_all` without metrics; inside `reuse` a system is trained once with the same configuration and given stages."""
    if _kept.get() is None:
        return train_all(config, seed, given, log)[:2]
    tokenizer = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(given.get("tokenizer", {})))
    told = json.dumps([config_lib.to_json(config), seed, hashlib.sha256(tokenizer).hexdigest()], sort_keys=True)
    folder = _kept.get() / "systems" / _digest(told)
    if folder.exists():
        recipe = _seeded(config, seed).recipe()
        return recipe, {**{stage.name: load_params(folder, stage.name)[0] for stage in recipe.stages}, **given}
    recipe, params, _ = train_all(config, seed, given, log)
    unfinished = folder.with_name(folder.name + ".unfinished")  # a run killed here leaves nothing that looks whole
    shutil.rmtree(unfinished, ignore_errors=True)
    for stage in recipe.stages:
        save_params(unfinished, stage.name, params[stage.name])
    unfinished.rename(folder)
    return recipe, params


def _kept_stages(recipe: Recipe, seed: int) -> dict[str, Path]:
    """Where, inside `reuse`, the stages are kept that depend on no other: tokenizers and classifiers."""
    if _kept.get() is None:
        return {}
    config, names = recipe.config, {stage.name for stage in recipe.stages if not stage.needs and stage.steps}
    made = {"tokenizer": _tokenizer_key(config)} if "tokenizer" in names else {}
    if "classifier" in names:
        made["classifier"] = f"{config.data} {config.classifier} {config.num_classes}"
    return {stage: _kept.get() / stage / _digest(f"{key} {seed}") for stage, key in made.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_kept: contextvars.ContextVar[Path | None] = contextvars.ContextVar("kept", default=None)


@contextlib.contextmanager
def reuse(folder: str | Path | None) -> Iterator[None]:
    """Keeps what `trained` and `compare_generators` train, and every tokenizer and classifier, in a folder.

    What is there with the same configuration is not trained again.
    """
    token = _kept.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _kept.reset(token)


def trained(config: Any, seed: int, log) -> tuple[Recipe, dict]:
    """(recipe, parameters by stage) of a system that several claims build on; trained once inside `reuse`."""
    config, folder = _seeded(config, seed), _kept.get()
    if folder is None:
        return train_all(config, seed, {}, log)[:2]
    recipe = config.recipe()
    name = _digest(json.dumps(config_lib.to_json(config), sort_keys=True))
    results = train(recipe, folder / name, run=config.run, log=log)
    return recipe, {name: result.params for name, result in results.items()}


def _size(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def mean_and_spread(values: list[float]) -> str | float:
    """ "mean (largest - smallest)", or the value itself if it is one."""
    mean = statistics.fmean(values)
    if len(values) == 1 or math.isinf(mean):  # nothing is lost: an infinite PSNR
        return mean
    return f"{mean:.4g} ({max(values) - min(values):.2g})"


def add_times(rows: Sequence[dict], systems: Sequence[tuple[Recipe, Any]], batches: Sequence[int] = (1, 64)) -> None:
    """Writes milliseconds an image of each system, at each batch, to its row; see `seconds_an_image`."""
    for batch in batches:
        for row, seconds in zip(rows, seconds_an_image(systems, batch)):
            row[f"ms/image, batch {batch}"] = round(1e3 * seconds, 3)


def seconds_an_image(systems: Sequence[tuple[Recipe, Any]], batch: int, repeats: int = 7) -> list[float]:
    """Median seconds of warm, compiled sampling, over the batch, of each (recipe, parameters).

    They are measured in turns, so that what else a machine does meanwhile falls on all of them.
    """
    seconds: list[list[float]] = [[] for _ in systems]
    for i in range(repeats + 1):
        for (recipe, params), measured in zip(systems, seconds):
            labels = np.arange(batch, dtype=np.int32) % recipe.config.num_classes
            start = time.perf_counter()
            jax.block_until_ready(recipe.sample(params, jax.random.key(i), labels)[recipe.shows])
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured[1:]) / batch for measured in seconds]
