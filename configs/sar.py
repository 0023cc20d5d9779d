"""S008 SAR: refinement of next-scale models on their own predictions, one scale ahead (Zhou et al. 2025, arXiv 2512.06421).

    python scripts/train.py --config configs/sar.py --variant small --workdir runs/sar --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/sar --labels 0,1,2 --num 8 --out grid.png

A last stage "refine" after the training of a VAR (`smoke`, `demo`, `small`: `configs/var.py`) or of a FlexVAR, which the
authors refine (`flex_smoke`, `flex_demo`: `configs/flexvar.py`; `paper`: FlexVAR-d16 and 10 epochs more). Published weights are
refined by converting them into the work directory first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import flexvar, var
from jaxgen import config as config_lib
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import student_forcing_claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.student_forcing import FlexibleRefinementConfig, RefineConfig, RefinementConfig

VARIANTS = ("smoke", "demo", "small", "flex_smoke", "flex_demo", "paper")

# The authors go on where the pretraining of 180 epochs would at its end: its schedule, laid out for 190, falls from here.
PAPER_EPOCHS = 10
PAPER_LR = 0.15 * 3e-4
PAPER_LR_END = 0.1 / 0.15


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> RefinementConfig | FlexibleRefinementConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant in ("smoke", "demo", "small"):
        cls, base = RefinementConfig, var.get_config(variant).config
    else:
        cls, base = FlexibleRefinementConfig, flexvar.build("d16" if variant == "paper" else variant.removeprefix("flex_"))
    fields = config_lib.fields_of(base)
    return cls(**fields, refine=_refine(variant, base.model_train.optim))


def _refine(variant: str, optim: OptimConfig) -> RefineConfig:
    """A tenth of the pretraining's updates or less, at the learning rates of its end."""
    if variant == "paper":
        optim = dataclasses.replace(optim, lr=PAPER_LR, lr_end=PAPER_LR_END, warmup_steps=0)
        return RefineConfig(steps=PAPER_EPOCHS * -(-var.IMAGENET_TRAIN // 768), batch_size=768, optim=optim)
    optim = dataclasses.replace(optim, lr=0.15 * optim.lr, lr_end=1 / 3, warmup_steps=2)
    if variant.endswith("smoke"):
        return RefineConfig(steps=6, batch_size=16, ema=0.9, optim=optim)
    if variant == "small":
        return RefineConfig(steps=1000, batch_size=128, ema=0.999, optim=optim)
    return RefineConfig(steps=100, batch_size=64, ema=0.97, optim=optim)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S008's claim, measured again on VAR and on FlexVAR: a refined model against the pretrained one and plain updates.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of both configurations, such as `refine.weight=0.1`.
      log: takes progress lines.
    """
    if budget not in ("smoke", "small"):
        raise ValueError(f"budget {budget!r} is not one of smoke, small")
    variant, samples = ("smoke", 100) if budget == "smoke" else ("demo", 1000)
    tables = []
    for title, name in (("VAR", variant), ("FlexVAR", f"flex_{variant}")):
        config = config_lib.override(build(name), edits).resolve()
        tables.append(
            student_forcing_claims.compare_refinements(config, title=f"{title}, refined", seeds=seeds, samples=samples, log=log)
        )
    return tables
