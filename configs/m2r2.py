"""S101 M2R2: mixture of multi-rate residuals, drafts and experts from a faster stream (Bhendawade et al. 2025, arXiv 2502.02040).

    python scripts/train.py --config configs/m2r2.py --variant small --workdir runs/m2r2 --set data.path=shakespeare.txt
    python scripts/sample.py --workdir runs/m2r2 --prompt "To be, or" --num 3 --out text.txt

A language model is trained as in `configs/language.py` and frozen; then adapters of its first half learn to say what its last
block says. Variants: `smoke` (with experts), `small`, `experts` (a small model with 8 experts a block), and `paper`: Gemma-7B's
depth and width, the stream twice as fast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import multi_rate
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.language import LanguageModelConfig, LanguageTrainConfig, tiny
from jaxgen.recipes.multi_rate import FastConfig, MultiRateConfig

VARIANTS = ("smoke", "small", "experts", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> MultiRateConfig:
    if variant == "smoke":
        base = tiny(MultiRateConfig())
        model = dataclasses.replace(base.model, depth=4, hidden=16, experts=3, experts_used=2)
        return dataclasses.replace(base, model=model, fast=FastConfig(rank=2, drafts=2), fast_train=base.model_train)
    if variant == "small":
        return MultiRateConfig()
    if variant == "experts":
        model = LanguageModelConfig(width=128, heads=4, depth=6, hidden=96, experts=8)
        return MultiRateConfig(model=model, model_train=LanguageTrainConfig(steps=300), fast_train=LanguageTrainConfig(steps=150))
    if variant == "paper":
        model = LanguageModelConfig(
            vocab=256000, width=3072, heads=16, depth=28, hidden=24576, tied=True, remat=True, dtype="bfloat16"
        )
        return MultiRateConfig(data=TextConfig(length=2048), model=model, fast=FastConfig(rank=64))
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S101's claims, measured again: self-speculation against plain sampling and early exit, and experts ahead of time.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: not used: the method is lossless, quality is that of the frozen model.
      edits: of the configuration, such as `data.path=shakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    experts, _ = claim_config(_config, budget, edits, small="experts")
    sizes = dict(prompts=1, new_tokens=4, repeats=1) if smoke else dict(prompts=16, new_tokens=128, repeats=5)
    return [
        multi_rate.compare_streams(config, **sizes, log=log),
        multi_rate.compare_experts(experts, limit=2 if smoke else 64, log=log),
    ]
