"""S099 Direct alignment: a draft model distilled on its target's own responses, by TVD++ (Goel et al. 2024, arXiv 2403.00858).

    python scripts/train.py --config configs/direct_alignment.py --variant small --workdir runs/aligned
    python scripts/sample.py --workdir runs/aligned --prompt "To be, or" --num 3 --out text.txt

The pair of `configs/spectr.py`; after its own training, the draft model learns from responses that the target samples. Variants:
`smoke` (seconds on a CPU), `small` (minutes), and `paper`: Llama 2 7B with its Chat Drafter of 115 million weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs.spectr import LLAMA2_7B, PUBLISHED_TRAIN, VARIANTS, pair, published
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import drafted_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.drafted import AlignConfig, AlignedConfig, DraftingConfig
from jaxgen.recipes.language import LanguageModelConfig

__all__ = ["VARIANTS", "claim", "get_config"]

CHAT_DRAFTER_115M = LanguageModelConfig(vocab=32000, width=1024, heads=8, depth=4, hidden=2816, dtype="bfloat16")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> AlignedConfig:
    drafting = DraftingConfig(length=3)
    if variant == "paper":
        optim = OptimConfig(lr=1e-4, warmup_steps=500, schedule="cosine", clip=1.0, no_decay=("scale",))
        align = AlignConfig(
            steps=20_000, batch_size=64, prompt=256, temperatures=(0.3, 0.7, 1.0), top_p=0.95, pool=1024, refresh=200, optim=optim
        )
        return AlignedConfig(
            **published(LLAMA2_7B), draft=CHAT_DRAFTER_115M, draft_train=PUBLISHED_TRAIN, drafting=drafting, align=align
        )
    if variant == "smoke":
        optim = dataclasses.replace(AlignConfig().optim, warmup_steps=2)
        align = AlignConfig(steps=4, batch_size=4, prompt=4, pool=8, refresh=3, optim=optim)
    else:
        align = AlignConfig(steps=200, pool=128, refresh=50)
    return AlignedConfig(**pair(variant), drafting=drafting, align=align)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S099's claim, measured again: block efficiency of one draft model before and after distillation with several losses.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: trainings with each loss; target and draft model before it are trained once.
      edits: of the configuration, such as `data.path=tinyshakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    settings = dict(prompts=2 if smoke else 16, new_tokens=8 if smoke else 64, repeats=1 if smoke else 3, log=log)
    return [drafted_claims.compare_alignment(config, seeds=seeds, lengths=(3,) if smoke else (3, 5), **settings)]
