"""S029 ARRA: autoregressive representation alignment (Xie et al. 2025, arXiv 2503.07334).

    python scripts/train.py --config configs/arra.py --variant small --workdir runs/arra
    python scripts/sample.py --workdir runs/arra --labels 0,1,2 --num 8 --cfg 1 --out grid.png

LlamaGen whose hidden states are drawn to what an encoder says of the whole image while it learns; sampling is LlamaGen's.
`align.weight` says how strongly, `align.after` behind which block.

Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits as 64 tokens, minutes on a CPU, an encoder without labels
included), and `paper`: LlamaGen-B on ImageNet at 256 pixels with DINOv2's ViT-B/14 at 224, which `jaxgen.interop.dinov2` reads
and is put into the work directory. Which size and encoder the published runs on ImageNet have was not to be had; the loss, its
weight and its block are those of the released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import llamagen, semaim, sjd
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.aligned import AlignedConfig, unaligned
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.next_scale import plain

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> AlignedConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant == "paper":
        base = llamagen.published(*llamagen.PUBLISHED["paper"])
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, scan_layers=False))
        features, features_train = FeatureConfig(positions=37, imagenet=True, dtype="bfloat16"), FeatureTrainConfig(steps=0)
    else:
        base, (features, features_train) = digits(variant), semaim.digit_features(variant)
    return AlignedConfig(**config_lib.fields_of(base), features=features, features_train=features_train)


def digits(variant: str) -> ImageLlamaConfig:
    """LlamaGen on handwritten digits of 16 x 16 pixels as 8 x 8 tokens, with the sizes and budgets of `configs/sjd.py`."""
    base = plain(sjd.digits(variant, sjd.DecodeConfig()))
    return llamagen.like(base, z_channels=8 if variant == "smoke" else 16, dropout=0.0)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S029's claim, measured again: a lower Frechet distance than the same model's without the encoder.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `small`).
      seeds: trainings of each system.
      edits: of the configuration, such as `align.weight=0.5`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits)
    systems = {"S029 ARRA": config, "LlamaGen, without alignment": unaligned(config)}
    title = "Alignment with an encoder of whole images against the same model, data and training budget without it"
    claim = claims.compare_generators(systems, seeds=seeds, samples=100 if smoke else 1000, log=log, title=title)
    return [claim._replace(notes=f"{claim.notes} ARRA's parameters count the two layers that only training has.")]
