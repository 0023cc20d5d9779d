"""S102 SkipDecode: one exit point a position for the whole batch (Del Corro et al. 2023, arXiv 2307.02628).

    python scripts/train.py --config configs/skip_decode.py --variant small --workdir runs/skip --set data.path=shakespeare.txt
    python scripts/sample.py --workdir runs/skip --prompt "To be, or" --num 3 --out text.txt

The model is trained with the schedule that it is sampled with.
Variants: `smoke`, `small` (eight narrow blocks), and `paper`, the depth and width of
OPT-1.3B with a sixth of the blocks left at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import economy
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.economy import SkipDecodeConfig
from jaxgen.recipes.language import LanguageModelConfig, LanguageTrainConfig, tiny

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SkipDecodeConfig:
    small = SkipDecodeConfig(model=LanguageModelConfig(width=128, heads=4, depth=8), least=2, start=16, end=128)
    if variant == "smoke":
        return dataclasses.replace(tiny(small), least=1, start=4, end=24)
    if variant == "small":
        return small
    if variant == "paper":
        return SkipDecodeConfig(
            data=TextConfig(length=2048),
            model=LanguageModelConfig(vocab=50272, width=2048, heads=32, depth=24, hidden=8192, remat=True, dtype="bfloat16"),
            model_train=LanguageTrainConfig(steps=100_000, batch_size=256),
            least=4,
            start=128,
            end=2048,
        )
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S102's claim, measured again: seconds saved and likelihood lost by fewer blocks for later tokens.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: not used: nothing is compared that training noise could decide.
      edits: of the configuration, such as `data.path=tinyshakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    new_tokens = config.data.length - config.start
    sizes = dict(prompts=1 if smoke else 8, new_tokens=new_tokens, limit=4 if smoke else 64, repeats=1 if smoke else 5)
    return [economy.compare_depths(config, shares=(0.5,) if smoke else (0.5, 0.25), **sizes, log=log)]
