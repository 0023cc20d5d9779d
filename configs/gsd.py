"""S039 GSD: grouped speculative decoding of image tokens (So et al. 2025, arXiv 2508.07747).

    python scripts/train.py --config configs/gsd.py --variant small --workdir runs/gsd
    python scripts/sample.py --workdir runs/gsd --labels 0,1,2 --num 8 --out grid.png

Speculative Jacobi decoding whose drafts are checked as groups: tokens of nearly the same rank and probability, with codes near
each other count as one. No draft model and no training; the law is not the model's own.
Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits as 64 tokens, minutes on a CPU), and `paper`: the sizes of
Lumina-mGPT 7B at 768 pixels, on this library's blocks, and the published thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import sjd
from jaxgen.decoding.relaxed import Grouped
from jaxgen.recipe import Recipe
from jaxgen.recipes import speculative_image_claims as claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.speculative_images import DecodeConfig, SpeculativeImageConfig

VARIANTS = sjd.VARIANTS


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SpeculativeImageConfig:
    decode = DecodeConfig(proposer="jacobi", length=16, rule="grouped", below=7, above=7, p_radius=0.15, d_radius=0.5)
    if variant == "paper":
        return sjd.lumina(decode)
    # The codebook is trained here, so its distances have another scale than the published one's.
    return sjd.digits(variant, dataclasses.replace(decode, length=4 if variant == "smoke" else 16, d_radius=0.5))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S039's claims, measured again: fewer calls than SJD, groups found anew against fixed ones, and what the law pays for it.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `small`).
      seeds: trainings of the generator.
      edits: of the configuration, such as `decode.d_radius=1`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)
    every = config.tokenizer.vocab

    def groups(**fields):
        return dataclasses.replace(config.decode, **fields)

    methods = {
        "SJD, exact": groups(rule="rejection"),
        "GSD, ranks within 3": groups(below=3, above=3),
        "GSD, ranks within 7": groups(),
        "GSD, ranks within 7, any code": groups(d_radius=1e6),
        "fixed groups by code alone": groups(below=every, above=every, p_radius=2.0),
    }
    title = "Grouped acceptance against exact speculative Jacobi decoding, the same model"
    comparison = claims.compare_decoders(config, methods, title=title, seeds=seeds, samples=100 if smoke else 500, log=log)
    rules = {
        "GSD, ranks within 1": lambda codebook: Grouped(codebook, 1, 2, 0.15, 1e6),
        "GSD, ranks within 2": lambda codebook: Grouped(codebook, 2, 3, 0.15, 1e6),
        "GSD, ranks within 7": lambda codebook: Grouped(codebook, 7, 7, 0.15, 1e6),
        "GSD, ranks within 7, near codes": lambda codebook: Grouped(codebook, 7, 7, 0.15, 2.0),
        "fixed groups by code alone": lambda codebook: Grouped(codebook, 7, 7, 2.0, 2.0),
    }
    return [comparison, claims.compare_laws(rules, samples=4000 if smoke else 40_000, log=log)]
