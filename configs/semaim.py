"""S140 SemAIM: semantic-aware autoregressive image modelling (Song et al. 2024, arXiv 2312.10457).

    python scripts/train.py --config configs/semaim.py --variant small --workdir runs/semaim
    python scripts/sample.py --workdir runs/semaim --labels 0,1,2 --num 8 --option known=0.25 --out made.png

An encoder that learns without labels, by predicting the patches of images outwards from the one that is most like the whole.
`sample.py` completes held-out images of which it is given the first patches.

Variants: `smoke`, `small` (scikit-learn's digits, minutes on a CPU: an encoder is trained to order patches and to be predicted),
and `paper`: the authors' ViT-B on ImageNet, whose targets are the features of a ViT-B/16 (the authors': DINO's or CLIP's) that is
put into the work directory. `model_train.target=pixels` needs no other encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs.var import IMAGENET_TRAIN, NO_DECAY
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig
from jaxgen.recipes.semantic_patch_claims import compare_orders
from jaxgen.recipes.semantic_patches import SemanticModelConfig, SemanticPatchConfig, SemanticTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> SemanticPatchConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant == "paper":
        return _published()
    smoke, (features, features_train) = variant == "smoke", digit_features(variant)
    return SemanticPatchConfig(
        data=DataConfig(path="digits", channels=1),
        image_size=8,
        features=features,
        features_train=features_train,
        model=SemanticModelConfig(
            patch=2, width=16 if smoke else 64, depth=2 if smoke else 3, heads=2, query_depth=1 if smoke else 3, mlp_ratio=2.0
        ),
        model_train=SemanticTrainConfig(
            steps=10 if smoke else 300, batch_size=16 if smoke else 64, blur=0.5, optim=_optim(smoke)
        ),
        run=RunConfig(save_every=500, eval_every=500),
    )


def digit_features(variant: str) -> tuple[FeatureConfig, FeatureTrainConfig]:
    """An encoder of handwritten digits of 8 x 8 pixels, and how it is trained; next to nothing in `smoke`."""
    smoke = variant == "smoke"
    sizes = dict(width=16, depth=1) if smoke else dict(width=64, depth=2)
    config = FeatureConfig(**sizes, heads=2, patch=2, grid=4, mlp_ratio=2.0, layer_scale=0.0)
    train = FeatureTrainConfig(
        steps=10 if smoke else 300,
        batch_size=16 if smoke else 64,
        temperature=0.2,
        masked=0.25,
        projection=8 if smoke else 32,
        optim=_optim(smoke),
    )
    return config, train


def _optim(smoke: bool) -> OptimConfig:
    return OptimConfig(lr=2e-3, warmup_steps=2 if smoke else 40, schedule="cosine", lr_end=0.05, clip=3.0, no_decay=NO_DECAY)


def _published() -> SemanticPatchConfig:
    """800 epochs in batches of 2048 at 1.6e-3, of which 30 to warm up, as in the authors' commands.

    Of their settings for features as targets, which say no others, the encoder is DINO's, 16 pixels a patch.
    """
    epoch = -(-IMAGENET_TRAIN // 2048)
    optim = OptimConfig(
        lr=1.6e-3,
        warmup_steps=30 * epoch,
        schedule="cosine",
        lr_start=0.0,
        lr_end=0.0,
        weight_decay=0.05,
        b2=0.95,
        clip=3.0,
        no_decay=NO_DECAY,
    )
    return SemanticPatchConfig(
        data=DataConfig(path="imagenet", image_size=224, channels=3, flip=True, mid_scale=1.15, workers=8),
        features=FeatureConfig(patch=16, grid=14, layer_scale=0.0, imagenet=True, dtype="bfloat16"),
        features_train=FeatureTrainConfig(steps=0),
        model=SemanticModelConfig(dtype="bfloat16"),
        model_train=SemanticTrainConfig(steps=800 * epoch, batch_size=2048, optim=optim),
        run=RunConfig(save_every=5000, eval_every=5000),
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S140's claim, measured again: a linear classifier reads more from a model of semantic order than of raster order.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `small`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits)
    orders = ("semantic", "raster") if smoke else ("semantic", "similarity", "random", "raster")
    return [compare_orders(config, orders, seeds=seeds, limit=200 if smoke else 10_000, log=log)]
