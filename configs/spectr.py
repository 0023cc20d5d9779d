"""S046 SpecTr: several drafts a position, selected by K-SEQ (Sun et al. 2023, arXiv 2310.15141).

    python scripts/train.py --config configs/spectr.py --variant small --workdir runs/spectr --set data.path=tinyshakespeare.txt
    python scripts/sample.py --workdir runs/spectr --prompt "To be, or" --num 3 --out text.txt

A language model on bytes and a draft model a tenth as deep and a third as wide, which draws independent chains of drafts.
Variants: `smoke` (seconds on a CPU), `small` (minutes), and `paper`: 8 chains of 8 drafts, as in the paper. Its models, PALM-2
Bison and Gecko, are of unpublished sizes; Llama 2 7B and the 68 million weights of SpecInfer's draft model stand for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs import language
from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import drafted_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.drafted import DraftedConfig, DraftingConfig
from jaxgen.recipes.language import LanguageConfig, LanguageModelConfig, LanguageTrainConfig

VARIANTS = ("smoke", "small", "paper")

LLAMA2_7B = LanguageModelConfig(
    vocab=32000, width=4096, heads=32, depth=32, hidden=11008, scan_layers=True, remat=True, dtype="bfloat16"
)
# The draft model that SpecInfer (Miao et al. 2024) published for Llama models.
LLAMA_68M = LanguageModelConfig(vocab=32000, width=768, heads=12, depth=2, hidden=3072, dtype="bfloat16")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> DraftedConfig:
    if variant == "paper":
        drafting = DraftingConfig(paths=8, length=8, rule="k_seq")
        return DraftedConfig(**published(LLAMA2_7B), draft=LLAMA_68M, draft_train=PUBLISHED_TRAIN, drafting=drafting)
    return DraftedConfig(**pair(variant), drafting=DraftingConfig(paths=4, length=4, rule="k_seq"))


PUBLISHED_TRAIN = LanguageTrainConfig(steps=100_000, batch_size=512)


def published(model: LanguageModelConfig) -> dict:
    """The fields of a configuration whose target is `model`, on windows of Llama 2's 4,096 tokens."""
    return dict(data=TextConfig(length=4096), model=model, model_train=PUBLISHED_TRAIN)


def pair(variant: str) -> dict:
    """The fields of a configuration with the target of `configs/language.py` and a small draft model.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base: LanguageConfig = language.base(variant)
    smoke = variant == "smoke"
    draft = LanguageModelConfig(width=16 if smoke else 64, heads=2, depth=1)
    train = base.model_train if smoke else LanguageTrainConfig(steps=400)
    return dict(data=base.data, model=base.model, model_train=base.model_train, run=base.run, draft=draft, draft_train=train)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S046's claim, measured again: K-SEQ against one chain and against recursive rejection of the same drafts.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: of prompts and sampling; the models are trained once.
      edits: of the configuration, such as `data.path=tinyshakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    settings = dict(prompts=2 if smoke else 16, new_tokens=8 if smoke else 64, repeats=1 if smoke else max(seeds, 1), log=log)
    return drafted_claims.compare_selection(config, paths=(2,) if smoke else (2, 4), **settings)
