"""S159 RDM: semi-parametric image synthesis, the autoregressive model (Blattmann et al. 2022, arXiv 2204.11824).

    python scripts/train.py --config configs/rdm.py --variant small --workdir runs/rdm
    python scripts/sample.py --workdir runs/rdm --labels 0,1,2 --num 8 --cfg 1 --out grid.png
    python scripts/sample.py --workdir runs/rdm --labels 3,8 --num 8 --option "database='other.npz'" --out other.png

A next-token transformer that sees the features of those images in a database that are most like the one it is to make. It is told
no class: `--labels` says of which class the entry is that neighbours are looked for. `database` is another one's path,
`classes=(3,8)` takes only some of it; `retrieval.k` is the number of neighbours.

Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits as 64 tokens, minutes on a CPU, an encoder without labels
included), and `paper`: the sizes of the released model of dogs (18 blocks, 4 neighbours) on ImageNet, with the features of
DINOv2's ViT-B/14, put into the work directory, in place of CLIP's, and a database of ImageNet's own images in place of 20 million
crops of OpenImages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import arra, llamagen, semaim
from jaxgen import config as config_lib
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig
from jaxgen.recipes.retrieval import RetrievalConfig, RetrievalLlamaConfig
from jaxgen.recipes.retrieval_claims import swap_databases

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> RetrievalLlamaConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant == "paper":
        return _published()
    features, features_train = semaim.digit_features(variant)
    fields = config_lib.fields_of(arra.digits(variant))
    return RetrievalLlamaConfig(**fields, features=features, features_train=features_train)


def _published() -> RetrievalLlamaConfig:
    """AdamW at 5e-4 in batches of 100, as in the released configuration, which says no number of updates: 100 epochs of dogs."""
    base = llamagen.published(*llamagen.PUBLISHED["paper"])
    optim = OptimConfig(lr=5e-4, schedule="constant", weight_decay=0.01, b2=0.95, clip=0.0)
    return RetrievalLlamaConfig(
        **config_lib.fields_of(base)
        | dict(
            model=dataclasses.replace(base.model, depth=18, hidden=0, token_dropout=0.0, dropout=0.0),
            model_train=dataclasses.replace(base.model_train, steps=100 * 1660, batch_size=100, optim=optim),
        ),
        features=FeatureConfig(positions=37, imagenet=True, dtype="bfloat16"),
        features_train=FeatureTrainConfig(steps=0),
        retrieval=RetrievalConfig(trained=tuple(range(151, 281))),
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S159's claim, measured again: another database moves the samples to its domain, unseen classes included.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `small`).
      seeds: trainings of each model.
      edits: of the configuration, such as `retrieval.k=8`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits)
    half = config.num_classes // 2
    low, high = tuple(range(half)), tuple(range(half, config.num_classes))
    databases = {"all classes": (), f"classes 0 to {half - 1}": low, f"classes {half} and up": high}
    samples = 100 if smoke else 1000
    return [swap_databases(config, databases, unseen=high[-2:], seeds=seeds, samples=samples, log=log)]
