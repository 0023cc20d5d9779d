"""S109 AS-ARM and any-subset speculative decoding (Guo and Ermon 2025, arXiv 2504.20456).

    python scripts/train.py --config configs/any_subset.py --variant small --workdir runs/infill --set data.path=shakespeare.txt
    python scripts/sample.py --workdir runs/infill --prompt "To be, or ___ to be" --length 64 --num 3 --out text.txt

Underscores in a prompt are bytes to fill in; so is what lies behind it, up to the length. Variants: `smoke`, `small` (minutes on
a CPU), and `paper`: the sizes of XLNet-base, 110 million weights, trained from nothing where the authors fine-tune XLNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxgen.data.text import TextConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import any_subset
from jaxgen.recipes.any_subset import AnySubsetConfig, DraftingConfig, SubsetConfig
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.language import LanguageModelConfig, LanguageTrainConfig, tiny

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> AnySubsetConfig:
    if variant == "smoke":
        return tiny(AnySubsetConfig(), drafting=DraftingConfig(drafts=3))
    if variant == "small":
        return AnySubsetConfig()
    if variant == "paper":
        # 4 GPUs with 24 windows each, two micro-batches: 192 windows of 512 tokens an update, 120 million windows in all.
        rate = dict(lr=6e-5, warmup_steps=2500, schedule="lin0", lr_end=0.0)
        optim = OptimConfig(**rate, weight_decay=0.01, b2=0.999, clip=1.0, no_decay=("scale",))
        return AnySubsetConfig(
            data=TextConfig(length=511),
            model=LanguageModelConfig(vocab=32000, width=768, heads=12, depth=12, tied=True, scan_layers=True, remat=True),
            model_train=LanguageTrainConfig(steps=625_000, batch_size=192, accumulate=2, optim=optim),
            subset=SubsetConfig(hidden=(0.6, 0.75), warmup=2500),
        )
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S109's claim, measured again: calls and time to fill in text, against one token at a time by the same model.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: not used: the method is lossless.
      edits: of the configuration, such as `data.path=shakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    sizes = dict(windows=1, repeats=1, hidden=(0.5,)) if smoke else dict(windows=16, repeats=7)
    return [any_subset.compare_drafters(config, **sizes, log=log)]
