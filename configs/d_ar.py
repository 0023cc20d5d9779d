"""S020 D-AR: diffusion via autoregressive models, whose prefixes are previews (Gao and Shou 2025, arXiv 2505.23660).

    python scripts/train.py --config configs/d_ar.py --variant small --workdir runs/d_ar
    python scripts/sample.py --workdir runs/d_ar --labels 0,1,2 --num 8 --cfg 1 --out grid.png
    python scripts/sample.py --workdir runs/d_ar --labels 0,1,2 --num 8 --cfg 1 --option groups=2 --out preview.png

A tokenizer reads an image as a row of tokens, of which each group steers one step of a flow from noise to pixels; a plain Llama
predicts the row. `groups` stops early; `DiffusionSampler.stream` shows a preview after each group.
`tokenizer_train.align_weight` aligns the decoder with an encoder of images: DINOv2's ViT-B/14 at 224 pixels in `paper` and `xl`,
which `jaxgen.interop.dinov2` reads and is put into the work directory; elsewhere, where it is off, one trained without labels.

Variants: `smoke` (seconds on a CPU), `small` (the digits of scikit-learn as 4 groups of 4 tokens, minutes), `mnist` (32
pixels, from `data.path`), and the published ImageNet models `paper` (LlamaGen-L on 8 groups of 32 tokens) and `xl`. Images
of one's own: set `model.num_classes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import jpeg_lm, llamagen, semaim, var
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.diffusion_token_claims import sharpening
from jaxgen.recipes.diffusion_tokens import DiffusionTokenizerConfig, DiffusionTokenizerTrainConfig, DiffusionTokensConfig
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig
from jaxgen.recipes.next_scale import ClassifierConfig, ModelTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "mnist", "paper", "xl")
ALIGN_WEIGHT = 0.5  # theirs


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> DiffusionTokensConfig:
    """The configuration of a variant."""
    if variant in ("paper", "xl"):
        return _published({"paper": "large", "xl": "xl"}[variant])
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant == "mnist":
        return _mnist()
    smoke = variant == "smoke"
    optim = OptimConfig(lr=2e-3, warmup_steps=2 if smoke else 40, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0)
    depth, (features, features_train) = 1 if smoke else 2, semaim.digit_features(variant)
    return DiffusionTokensConfig(
        data=DataConfig(path="digits", channels=1),
        tokenizer=DiffusionTokenizerConfig(
            side=8,
            patch=2,
            length=16,
            groups=4,
            vocab=16 if smoke else 128,
            width=4,
            codebook_init=0.1,
            hidden=16 if smoke else 64,
            heads=2 if smoke else 4,
            encoder_depth=depth,
            causal_depth=1,
            decoder_depth=depth,
            decoder_patch=2,
        ),
        tokenizer_train=DiffusionTokenizerTrainConfig(
            steps=10 if smoke else 1500,
            batch_size=16 if smoke else 64,
            ema=0.98,
            perceptual_weight=0.0,
            align_after=1,
            align_hidden=32 if smoke else 128,
            revive_every=5 if smoke else 25,
            optim=optim,
        ),
        features=features,
        features_train=features_train,
        model=ImageLlamaModelConfig(
            width=16 if smoke else 96, depth=2 if smoke else 3, heads=2 if smoke else 4, token_dropout=0.1, dropout=0.1
        ),
        model_train=ModelTrainConfig(steps=10 if smoke else 400, batch_size=16 if smoke else 64, ema=0.98, optim=optim),
        classifier=ClassifierConfig(steps=10 if smoke else 150, batch_size=16 if smoke else 128, width=8, lr=5e-3),
        run=RunConfig(save_every=500, eval_every=500),
    )


def _mnist() -> DiffusionTokensConfig:
    """32-pixel images as 8 groups of 8 tokens."""
    optim = OptimConfig(lr=5e-4, warmup_steps=500, schedule="cosine", lr_end=0.05, clip=1.0)
    return DiffusionTokensConfig(
        data=DataConfig(path="mnist.npz", image_size=32, channels=1),
        tokenizer=DiffusionTokenizerConfig(
            side=32,
            patch=4,
            length=64,
            vocab=1024,
            codebook_init=0.1,
            hidden=256,
            heads=4,
            encoder_depth=4,
            causal_depth=2,
            decoder_depth=6,
            decoder_patch=4,
        ),
        tokenizer_train=DiffusionTokenizerTrainConfig(
            steps=20_000,
            batch_size=64,
            ema=0.999,
            perceptual_weight=0.0,
            align_after=4,
            align_hidden=512,
            revive_every=50,
            optim=optim,
        ),
        features=FeatureConfig(width=128, depth=4, heads=4, patch=4, grid=8),
        features_train=FeatureTrainConfig(steps=4000, optim=optim),
        model=ImageLlamaModelConfig(width=384, depth=8, heads=6),
        model_train=ModelTrainConfig(steps=12_000, batch_size=128, ema=0.999, optim=optim),
        classifier=ClassifierConfig(steps=1500, width=32),
        run=RunConfig(save_every=1000, eval_every=1000),
    )


def _published(size: str) -> DiffusionTokensConfig:
    """ImageNet at 256 pixels, bf16: their tokenizer's configuration, and LlamaGen's models and schedule.

    The tokenizer's losses besides flow matching and codes are LPIPS and an alignment with DINOv2, placed and weighted as in their
    scripts. How long it was trained is not said in their code, whose script never ends by itself: here LlamaGen's 40 epochs.
    """
    width, depth, heads, hidden, _ = llamagen.PUBLISHED[size]
    base = llamagen.published(width, depth, heads, hidden, 16)
    return DiffusionTokensConfig(
        data=base.data,
        tokenizer=DiffusionTokenizerConfig(scan_layers=True, remat=True, dtype="bfloat16"),
        tokenizer_train=DiffusionTokenizerTrainConfig(
            steps=40 * var.IMAGENET_TRAIN // 512,
            batch_size=512,
            ema=0.9999,
            align_weight=ALIGN_WEIGHT,
            optim=OptimConfig(lr=2e-4, warmup_steps=500, schedule="constant", weight_decay=0.0, b2=0.95, clip=1.0),
        ),
        features=FeatureConfig(positions=37, imagenet=True, dtype="bfloat16"),
        model=base.model,
        model_train=base.model_train,
        run=base.run,
    )


def in_space(config: DiffusionTokensConfig, *, smoke: bool) -> ImageLlamaConfig:
    """LlamaGen on as many codes, in raster order, with the same Llama, data and updates of both stages."""
    base = jpeg_lm.in_codes(jpeg_lm.build("smoke" if smoke else "small"), smoke=smoke)
    train = dataclasses.replace(
        base.tokenizer_train, steps=config.tokenizer_train.steps, batch_size=config.tokenizer_train.batch_size
    )
    parts = {name: getattr(config, name) for name in ("data", "model", "model_train", "classifier", "run")}
    return dataclasses.replace(base, tokenizer_train=train, **parts)


def aligned(config: DiffusionTokensConfig, weight: float) -> DiffusionTokensConfig:
    """The same with this weight of the alignment; 0 is without."""
    return dataclasses.replace(config, tokenizer_train=dataclasses.replace(config.tokenizer_train, align_weight=weight))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S020's claims, measured again: previews sharpen with the length of the prefix; and quality against codes in space.

    The second table has the tokenizer with an alignment, too, of the published weight unless an edit gives another.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits)
    samples = 100 if smoke else 500
    previews = sharpening(config, seeds=seeds, samples=samples, log=log)
    weight = config.tokenizer_train.align_weight or ALIGN_WEIGHT
    systems = {
        "S020 D-AR": aligned(config, 0.0),
        "S020 D-AR, aligned": aligned(config, weight),
        "LlamaGen, codes in space": in_space(config, smoke=smoke),
    }
    title = "Tokens of diffusion steps against codes in space; equal Llamas, data, updates and numbers of tokens"
    return [previews, claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, title=title)]
