"""Measuring S165 HACK again: one generator sampled with its full cache, with HACK's, and with equal heads."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxgen import metrics
from jaxgen.decoding import HeadPlan, Settings
from jaxgen.generators import NextScaleSampler
from jaxgen.recipe import modules
from jaxgen.recipes.claims import Claim, add_times, mean_and_spread, sampling_costs, train_all
from jaxgen.recipes.evaluation import evaluate_images
from jaxgen.recipes.head_aware import HeadAwareConfig, forced_logits
from jaxgen.recipes.next_scale import sample_images

__all__ = ["compare_budgets", "nearness"]

# Of sampling: one for all that is measured, so that less is compiled.
BATCH = 64


def compare_budgets(
    config: HeadAwareConfig, *, keeps: Sequence[float], seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """Cache bytes, agreement with the full cache, quality and costs at several budgets.

    Each training is sampled in all ways, without guidance and truncation, and judged by one classifier.

    Args:
      config: of the system.
      keeps: shares of the cache.
      seeds: trainings.
      samples: images that are judged.
      log: takes progress lines.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    measured: dict[tuple[str, float], list[dict]] = {}
    last: dict[tuple[str, float], tuple] = {}
    common: dict[str, dict] = {}
    for seed in range(seeds):
        log(f"seed {seed}")
        recipe, params, _ = train_all(config, seed, common, log)
        common = {stage: params[stage] for stage in ("tokenizer", "classifier")}
        full = config.build_sampler()
        ways = {("S047 VAR, full cache", 1.0): full}
        for keep in keeps:
            plan = config.plan(params, keep=keep)
            ways[("S165 HACK", keep)] = config.planned_sampler(plan)
            for name, structural in (("all heads contextual", False), ("all heads structural", True)):
                ways[(name, keep)] = config.planned_sampler(equal_heads(config, keep, structural=structural))
        for way, sampler in ways.items():
            log(f"{way[0]}, {way[1]:.0%}")
            sampled = dataclasses.replace(recipe, sample=functools.partial(sample_images, sampler))
            measured.setdefault(way, []).append(_measure(sampled, params, full, sampler, seed, samples))
            last[way] = sampled, params
    rows = []
    for way, values in measured.items():
        row = dict(zip(("system", "share kept"), way)) | {"model calls": len(config.tokenizer.patch_nums)}
        row |= cache_columns(ways[way]) | {column: mean_and_spread([v[column] for v in values]) for column in values[0]}
        rows.append(row | sampling_costs(*last[way]))
    add_times(rows, [last[way] for way in measured], (1, BATCH))
    budgets = "; ".join(f"{keep:.0%}: {' and '.join(map(str, config.budgets(keep)))} positions" for keep in keeps)
    notes = (
        f"{seeds} seeds; mean (spread); seconds: of the last. Shares are of the {config.positions()[1]} positions that the full "
        f"cache holds when the last scale is made. Budgets of contextual and structural heads: {budgets}. Kept is what waits "
        "between two scales; the peak holds the scale that is being made, too, whose keys and values no method compresses. The "
        "same tokens: with the same noise; millinats: KL from the full cache's laws to the compressed ones, along the full "
        "cache's samples."
    )
    return Claim("One generator, several caches", rows, notes)


def equal_heads(config: HeadAwareConfig, keep: float, *, structural: bool) -> HeadPlan:
    """The baselines: as many positions, chosen by one rule for every head."""
    generator = config.build_generator()
    sizes = dict(layers=generator.depth, heads=generator.heads)
    budget, _ = config.positions(keep)
    return HeadPlan.uniform(**sizes, budget=budget, structural=structural, queries=config.cache.queries)


def _measure(recipe, params, full: NextScaleSampler, sampler: NextScaleSampler, seed: int, samples: int) -> dict:
    settings = dict(cfg=0.0, top_k=0, top_p=0.0)
    result, _ = evaluate_images(recipe, params, jax.random.key(seed), num=samples, batch_size=BATCH, settings=settings)
    row = nearness(full, sampler, modules(params), jax.random.key(seed))
    return row | {"class accuracy": result["generation"]["class_accuracy"], "Frechet": result["generation"]["frechet"]}


def cache_columns(sampler: NextScaleSampler) -> dict:
    """KB of the cache of an image that is sampled with guidance: kept between scales, and while the largest scale is made."""
    generator = sampler.generator
    order, plan = generator.order, getattr(generator, "plan", None)
    head = 2 * 2 * generator.width // generator.heads * np.dtype(generator.dtype).itemsize  # two rows; keys and values
    whole = np.array([0, *order.ends[:-1]]) * generator.depth * generator.heads
    kept = whole if plan is None else plan.kept(order)
    new = np.array(order.sizes) * generator.depth * generator.heads
    return {"kept KB": round(kept.max() * head / 1e3, 2), "peak KB": round((kept + new).max() * head / 1e3, 2)}


def nearness(full: NextScaleSampler, sampler: NextScaleSampler, params: dict, key, *, images: int = BATCH) -> dict:
    """How near a sampler comes to one with the full cache.

    Args:
      full: the sampler to come near to.
      sampler: another, of the same generator.
      params: by module.
      key: of the samples.
      images: how many, by class in turn.
    """
    labels = np.arange(images, dtype=np.int32) % full.generator.num_classes
    settings = Settings(cfg=0.0)
    wanted, tokens = full(params, key, labels, settings)
    made, others = sampler(params, key, labels, settings)
    p, q = (jax.nn.log_softmax(forced_logits(s, params, labels, tokens)) for s in (full, sampler))
    return {
        "same tokens": float((tokens == others).mean()),
        "PSNR to full, dB": float(np.minimum(np.asarray(metrics.psnr(wanted, made)), 100.0).mean()),
        "millinats": 1e3 * float((np.exp(p) * (p - q)).sum(-1).mean()),
    }
