"""S086 TTS-VAR: test-time search over scales (Chen et al. 2025, arXiv 2507.18537).

    python scripts/train.py --config configs/tts_var.py --variant small --workdir runs/tts --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/tts --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke`, `demo` (scikit-learn's digits, minutes on a CPU), `world` (coloured shapes, with the oracle's reward), `small`
(MNIST or CIFAR-10 at 32 pixels), and `paper`, the published search in the place of Infinity on VAR-d30: the authors search the
13 scales of Infinity-2B with ImageReward and DINOv2; here 10 scales, a classifier's log-probability and its features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.decoding import SearchPlan
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.next_scale import ClassifierConfig, NextScaleConfig
from jaxgen.recipes.searched import SearchConfig, SearchedConfig
from jaxgen.recipes.searched_claims import compare_searches, equal_compute

VARIANTS = ("smoke", "demo", "world", "small", "paper")

# Candidates that go on from each scale; the published shape (8 8 6 6 6 4 2 2 2 1 1 1 1) on fewer scales.
FOUR = SearchConfig(widths=(4, 2, 1, 1), cluster=(1,), resample=(2,))
SIX = SearchConfig(widths=(8, 6, 4, 2, 1, 1), cluster=(1, 2), resample=(3, 4))
TEN = SearchConfig(widths=(8, 8, 6, 6, 4, 2, 2, 1, 1, 1), cluster=(2, 4), resample=(5, 7))


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SearchedConfig:
    if variant == "smoke":
        return _searched(_four_scales(var.get_config("smoke").config), FOUR)
    if variant == "demo":
        return _searched(var.get_config("demo").config, FOUR)
    if variant == "world":
        return _world()
    if variant == "small":
        return _searched(var.get_config("small").config, SIX)
    if variant == "paper":
        base = var.get_config("d30").config
        return _searched(dataclasses.replace(base, classifier=ClassifierConfig(steps=100_000, width=128)), TEN)
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def _searched(base: NextScaleConfig, search: SearchConfig) -> SearchedConfig:
    """The system of `base` with a search."""
    return SearchedConfig(**config_lib.fields_of(base), search=search)


def _four_scales(base: NextScaleConfig) -> NextScaleConfig:
    return dataclasses.replace(base, tokenizer=dataclasses.replace(base.tokenizer, patch_nums=(1, 2, 3, 4)))


def _world(smoke: bool = False) -> SearchedConfig:
    """Coloured shapes of 16x16 pixels, judged by the world's oracle."""
    base = var.get_config("smoke" if smoke else "demo").config
    tokenizer = dataclasses.replace(base.tokenizer, ch_mult=(1, 2, 2))
    if not smoke:
        tokenizer = dataclasses.replace(tokenizer, ch=16, vocab=256)
    model = dataclasses.replace(base.model, num_classes=30)
    world = dataclasses.replace(base, data=DataConfig(path="world", image_size=16), tokenizer=tokenizer, model=model)
    return _searched(_four_scales(world), dataclasses.replace(FOUR, reward="oracle", strength=20.0))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S086's claim, measured again: rewards rise with compute, against best-of-n at equal compute.

    Two tables: VAR on the digits, guided by its classifier, and VAR on the picture world, guided by the world's oracle.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`, and `world`).
      seeds: trainings of each system.
      edits: of both configurations, such as `search.strength=5`; those of `data` are of the first alone.
      log: takes progress lines.
    """
    if budget not in ("smoke", "small"):
        raise ValueError(f"budget {budget!r} is not one of smoke, small")
    smoke = budget == "smoke"
    systems = {
        "digits, by the classifier's log-probability": _config("smoke" if smoke else "demo"),
        "picture world, by the oracle's score": _world(smoke),
    }
    tables = []
    for name, config in systems.items():
        ours = [edit for edit in edits if config.data.path != "world" or not edit.startswith("data.")]
        config = config_lib.override(config, ours).resolve()
        order, plans = config.build_generator().order, {}
        for n in (1, 2) if smoke else (1, 2, 4, 8):
            search = config.search.plan().times(n)
            best = equal_compute(search, order)
            plans |= {f"best of {n}": SearchPlan.best_of(n, order.steps), f"TTS-VAR, n = {n}": search}
            plans[f"best of {best.widths[0]}"] = best
        plans = dict(sorted(plans.items(), key=lambda plan: plan[1].tokens(order)))
        title = f"Search at test time: {name}"
        tables.append(compare_searches(config, plans, title=title, seeds=seeds, samples=100 if smoke else 500, log=log))
    return tables
