"""S103 FFN-SkipLLM: MLPs skipped by tokens that have settled (Jaiswal et al. 2024, arXiv 2404.03865).

    python scripts/train.py --config configs/ffn_skip.py --variant small --workdir runs/skip --set data.path=tinyshakespeare.txt
    python scripts/sample.py --workdir runs/skip --prompt "To be, or" --num 3 --out text.txt

The model is trained as any other; its sampler skips.
Variants: `smoke`, `small` (eight narrow blocks), and `paper`, the sizes of Llama-2-7B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import economy
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.economy import SkipFeedForwardConfig
from jaxgen.recipes.language import LanguageModelConfig, LanguageTrainConfig, tiny

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SkipFeedForwardConfig:
    small = SkipFeedForwardConfig(model=LanguageModelConfig(width=128, heads=4, depth=8))
    if variant == "smoke":
        return dataclasses.replace(tiny(small), cold=0)
    if variant == "small":
        return small
    if variant == "paper":
        return SkipFeedForwardConfig(
            data=TextConfig(length=4096),
            model=LanguageModelConfig(vocab=32000, width=4096, heads=32, depth=32, hidden=11008, remat=True, dtype="bfloat16"),
            model_train=LanguageTrainConfig(steps=500_000, batch_size=1024),
            cold=4,
        )
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S103's claim, measured again: how many MLPs can be skipped, at what loss of likelihood.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: not used: one model is sampled in several ways.
      edits: of the configuration, such as `data.path=tinyshakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    sizes = dict(prompts=1 if smoke else 8, new_tokens=16 if smoke else 112, limit=4 if smoke else 64, repeats=1 if smoke else 5)
    thresholds = (0.9,) if smoke else (0.99, 0.98, 0.97, 0.95, 0.9)
    return [economy.compare_thresholds(config, thresholds=thresholds, **sizes, log=log)]
