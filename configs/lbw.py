"""S013 LBW: lexical-bias watermark of autoregressive images (Hui et al. 2025, arXiv 2506.01011).

    python scripts/train.py --config configs/lbw.py --variant small --workdir runs/lbw
    python scripts/sample.py --workdir runs/lbw --labels 0,1,2 --num 8 --out grid.png

Codes of a secret green list, one of a pool for each image, are made likelier while sampling; `config.find(params, images)` looks
for them in pictures. Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits as 64 tokens, minutes on a CPU), and
`paper`: ImageNet at 256 pixels with RAR-B's sizes, one of the models that the authors mark, on this library's blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import sjd
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import watermarked_claims as claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import ModelConfig, TokenizerConfig
from jaxgen.recipes.speculative_images import DecodeConfig, SpeculativeImageConfig
from jaxgen.recipes.watermarked import LexicalConfig, LexicalMarkConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> LexicalConfig:
    base = imagenet(TOKENIZER, ModelConfig(depth=24, width=768, heads=16)) if variant == "paper" else digits(variant)
    fields = config_lib.fields_of(base)
    return LexicalConfig(**fields, mark=LexicalMarkConfig())


# MaskGIT's tokenizer, which RAR uses (Yu et al. 2024, table 1).
TOKENIZER = TokenizerConfig(ch=128, vocab=1024, width=256, patch_nums=(16,), phis=1, phi_ratio=0.0, dtype="bfloat16")


def digits(variant: str) -> SpeculativeImageConfig:
    """The small next-token system of `configs/sjd.py`, one token a call.

    Raises:
      ValueError: an unknown variant.
    """
    return sjd.digits(variant, DecodeConfig(proposer="none"))


def imagenet(tokenizer: TokenizerConfig, model: ModelConfig) -> SpeculativeImageConfig:
    """ImageNet at 256 pixels as 256 tokens of a plain vector quantiser."""
    model = dataclasses.replace(model, num_classes=1000, scan_layers=True, dtype="bfloat16")
    decode = DecodeConfig(proposer="none")
    return sjd.published(decode, tokenizer=tokenizer, model=model, draft=ModelConfig(depth=1), image_size=256)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S013's claim, measured again: detection at a set false-positive rate, which outlives regeneration, and its price.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits).
      seeds: trainings of the generator.
      edits: of the configuration, such as `mark.pool=1`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    deltas = (0.0, float("inf")) if smoke else (0.0, 2.0, 4.0, float("inf"))
    samples = 20 if smoke else 300
    return [claims.compare_biases(config, deltas=deltas, seeds=seeds, samples=samples, decoys=999, log=log)]
