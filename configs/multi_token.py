"""S021 Multi-token prediction by masks, gated adapters and a sampler head (Samragh et al. 2025, arXiv 2507.11851).

    python scripts/train.py --config configs/multi_token.py --variant small --workdir runs/mtp --set data.path=shakespeare.txt
    python scripts/sample.py --workdir runs/mtp --prompt "To be, or" --num 3 --out text.txt

A language model is trained as in `configs/language.py` and frozen; then masks learn to say the tokens after the next one.
Variants: `smoke`, `small`, and `paper`: a model of 8 billion weights, 8 masks, adapters of rank 128.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import multi_token
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.language import LanguageModelConfig, tiny
from jaxgen.recipes.multi_token import MaskConfig, MultiTokenConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> MultiTokenConfig:
    if variant == "smoke":
        small = tiny(MultiTokenConfig())
        return dataclasses.replace(small, mask=MaskConfig(count=2, rank=2, anchors=3), mask_train=small.model_train)
    if variant == "small":
        return MultiTokenConfig()
    if variant == "paper":
        # Llama-3-8B's sizes, which the paper's Tulu 3 models have; the adapters are trained for 50,000 updates.
        model = LanguageModelConfig(
            vocab=128256, width=4096, heads=32, kv_heads=8, depth=32, hidden=14336, theta=500000.0, remat=True, dtype="bfloat16"
        )
        mask = MaskConfig(count=8, rank=128, anchors=128)
        return MultiTokenConfig(data=TextConfig(length=2048), model=model, mask=mask)
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S021's claim, measured again: tokens a target call, target calls and time against plain sampling.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: not used: the method is lossless, quality is that of the frozen model.
      edits: of the configuration, such as `data.path=shakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    sizes = dict(prompts=1, new_tokens=4, repeats=1) if smoke else dict(prompts=16, new_tokens=128, repeats=5)
    return [multi_token.compare_masks(config, **sizes, log=log)]
