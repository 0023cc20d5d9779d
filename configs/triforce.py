"""S095 TriForce: hierarchical speculation behind long prompts (Sun et al. 2024, arXiv 2404.11912).

    python scripts/train.py --config configs/triforce.py --variant small --workdir runs/triforce
    python scripts/sample.py --workdir runs/triforce --prompt "To be, or" --length 512 --out text.txt

A small model that sees the first and the last tokens drafts for the target with a few chunks of its cache, which drafts for the
target. Variants: `smoke` (seconds on a CPU), `small` (the target of `configs/language.py`, its context lengthened to 512 bytes),
and `paper`: Llama 2 7B with a context of 131,072 tokens, 4,096 of them retrieved, and the draft model of 68 million weights. The
authors lengthen the context by YaRN; here the target just reads on, on longer windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs.spectr import LLAMA2_7B, LLAMA_68M, PUBLISHED_TRAIN, VARIANTS, pair, published
from jaxgen.recipe import Recipe
from jaxgen.recipes import drafted_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.drafted import ContextConfig, LongContextConfig, SparseConfig
from jaxgen.recipes.language import LanguageTrainConfig

__all__ = ["VARIANTS", "claim", "get_config"]


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> LongContextConfig:
    if variant == "paper":
        context = ContextConfig(length=131_072, train=LanguageTrainConfig(steps=400, batch_size=64))
        # 256 tokens for the draft model: 16 sinks, 6 in flight.
        sparse = SparseConfig(length=6, inner=1, sink=16, window=234, budget=4096, chunk=8, recent=256)
        pair_ = dict(draft=LLAMA_68M, draft_train=PUBLISHED_TRAIN)
        return LongContextConfig(**published(LLAMA2_7B), **pair_, context=context, sparse=sparse)
    fields = pair(variant)
    if variant == "smoke":
        sparse = SparseConfig(length=3, sink=2, window=8, budget=8, chunk=4, recent=8)
        return LongContextConfig(**fields, context=ContextConfig(length=48, train=fields["model_train"]), sparse=sparse)
    return LongContextConfig(**fields | dict(draft_train=LanguageTrainConfig(steps=400, batch_size=4)))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S095's claims, measured again: three levels against two and one, and retrieved against first and last positions.

    Args:
      budget: "smoke" (nothing is learnt) or "small".
      seeds: of prompts and sampling; the models are trained once.
      edits: of the configuration, such as `data.path=tinyshakespeare.txt`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    new_tokens = 8 if smoke else 64
    return [
        drafted_claims.compare_levels(config, prompts=2 if smoke else 4, new_tokens=new_tokens, repeats=max(seeds, 1), log=log),
        drafted_claims.compare_caches(config, windows=2 if smoke else 32, new_tokens=new_tokens, log=log),
    ]
