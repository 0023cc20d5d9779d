"""S054 LANTERN: relaxed speculative decoding of image tokens (Jang et al. 2025, arXiv 2410.03355).

    python scripts/train.py --config configs/lantern.py --variant small --workdir runs/lantern
    python scripts/sample.py --workdir runs/lantern --labels 0,1,2 --num 8 --out grid.png

A small generator drafts, and a draft counts with the probability of tokens whose codes are near its own. `decode.delta` bounds
how far a draft's own law moves, not what is emitted: the claim says how far that is.
Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits as 64 tokens, minutes on a CPU), and `paper`: the sizes of
LlamaGen-XL at 256 pixels with a drafter of one layer and a tree of 60 drafts, on this library's blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import sjd
from jaxgen.decoding.relaxed import Lantern, nearest_codes
from jaxgen.recipe import Recipe
from jaxgen.recipes import speculative_image_claims as claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import ModelConfig, TokenizerConfig
from jaxgen.recipes.speculative_images import DecodeConfig, SpeculativeImageConfig

VARIANTS = sjd.VARIANTS


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SpeculativeImageConfig:
    decode = DecodeConfig(proposer="draft", length=4, rule="lantern", neighbours=1000, delta=0.1)
    if variant == "paper":
        return llamagen(dataclasses.replace(decode, branches=(4, 2, 2, 1, 1)))
    # A neighbourhood of the same share of the codebook as published.
    return sjd.digits(variant, dataclasses.replace(decode, neighbours=4))


def llamagen(decode: DecodeConfig) -> SpeculativeImageConfig:
    """LlamaGen-XL's layers, codebook and 16 x 16 tokens (Sun et al. 2024), and a drafter of one such layer."""
    model = ModelConfig(depth=36, width=1280, heads=20, num_classes=1000, scan_layers=True, dtype="bfloat16")
    tokenizer = TokenizerConfig(
        ch=128, ch_mult=(1, 1, 2, 2, 4), vocab=16384, width=8, patch_nums=(16,), phis=1, phi_ratio=0.0, dtype="bfloat16"
    )
    draft = dataclasses.replace(model, depth=1)
    return sjd.published(decode, tokenizer=tokenizer, model=model, draft=draft, image_size=256)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S054's claims, measured again: tokens a call against the exact rule with the same draft, and what the law pays for them.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `small`).
      seeds: trainings of the generators.
      edits: of the configuration, such as `decode.neighbours=8`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)

    def draft(**fields):
        return dataclasses.replace(config.decode, **fields)

    methods = {
        "chain of 4, exact": draft(rule="rejection"),
        "LANTERN, delta 0.05": draft(delta=0.05),
        "LANTERN, delta 0.1": draft(delta=0.1),
        "LANTERN, delta 0.3": draft(delta=0.3),
        "LANTERN++, delta 2 p(x)": draft(delta=2.0, relative=True),
        "tree of 2, 2, 1, 1, exact": draft(rule="rejection", branches=(2, 2, 1, 1)),
        "LANTERN, tree, delta 0.1": draft(delta=0.1, branches=(2, 2, 1, 1)),
    }
    title = "Relaxed acceptance over neighbouring codes against exact speculative sampling, the same two models"
    comparison = claims.compare_decoders(config, methods, title=title, seeds=seeds, samples=100 if smoke else 500, log=log)

    def bounded(delta, relative=False):
        return lambda codebook: Lantern(nearest_codes(codebook, 3), delta, relative)

    rules = {f"LANTERN, delta {delta}": bounded(delta) for delta in (0.0, 0.05, 0.1, 0.2, 0.4)}
    rules |= {"LANTERN++, delta 1 p(x)": bounded(1.0, True)}
    return [comparison, claims.compare_laws(rules, samples=4000 if smoke else 40_000, log=log)]
