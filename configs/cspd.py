"""S028 CSpD: continuous speculative decoding of masked autoregressive models (Wang et al. 2024, arXiv 2411.11925).

    python scripts/train.py --config configs/cspd.py --variant small --workdir runs/cspd
    python scripts/sample.py --workdir runs/cspd --labels 0,1,2 --num 8 --cfg 0 --out grid.png

A target and a smaller draft are trained on the same continuous tokens, each with a diffusion head (MAR, Li et al. 2024,
arXiv 2406.11838); sampling verifies the draft's steps by the density of the paths that its head took.

Variants: `smoke`; `small` for scikit-learn's 8x8 digits, 16 tokens of 2x2 pixels; `paper` has the published sizes, MAR-H with
MAR-B as the draft, on 16 x 16 tokens of a KL-16 autoencoder, for ImageNet at 256 pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import masked_latent_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.masked_latent import (
    LatentModelConfig,
    LatentTokenizerConfig,
    LatentTrainConfig,
    MaskedLatentConfig,
    SpeculationConfig,
    TokenizerTrainConfig,
)
from jaxgen.recipes.next_scale import ClassifierConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    return {"smoke": smoke, "small": small, "paper": paper}[variant]().recipe()


def smoke() -> MaskedLatentConfig:
    """Seconds; nothing is learnt."""
    sizes = LatentModelConfig(width=32, depth=1, heads=2, buffer=2, dropout=0.0, head_width=16, head_depth=1)
    base = small()
    train = dataclasses.replace(
        base.model_train, steps=10, batch_size=16, repeats=1, optim=dataclasses.replace(base.model_train.optim, warmup_steps=0)
    )
    return dataclasses.replace(
        base,
        model=sizes,
        draft=dataclasses.replace(sizes, width=16),
        model_train=train,
        draft_train=train,
        speculation=SpeculationConfig(steps=6, chain_steps=3, drafts=2),
        classifier=dataclasses.replace(base.classifier, steps=20),
        run=RunConfig(log_every=5),
    )


def small() -> MaskedLatentConfig:
    """Digits, in two minutes on two cores."""
    target = LatentModelConfig(width=64, depth=2, heads=4, buffer=4, dropout=0.0, head_width=96, head_depth=2)
    draft = LatentModelConfig(width=48, depth=1, heads=4, buffer=4, dropout=0.0, head_width=64, head_depth=2)
    optim = OptimConfig(lr=3e-3, warmup_steps=50, schedule="cosine", lr_end=0.02, weight_decay=0.02, clip=1.0)
    train = LatentTrainConfig(steps=800, batch_size=64, least_masked=0.0, repeats=2, ema=0.99, optim=optim)
    return MaskedLatentConfig(
        data=DataConfig(path="digits", channels=1),
        # The mean and the standard deviation of the digits' pixels in [-1, 1].
        tokenizer=LatentTokenizerConfig(image_size=8, patch=2, shift=-0.39, scale=1.33),
        model=target,
        model_train=train,
        draft=draft,
        draft_train=train,
        speculation=SpeculationConfig(steps=16, chain_steps=20, drafts=4),
        prediction="velocity",
        classifier=ClassifierConfig(steps=200, width=16, lr=5e-3),
    )


def paper() -> MaskedLatentConfig:
    """MAR-H and MAR-B as released, 256 steps of generation and 100 of the chain."""
    target = LatentModelConfig(width=1280, depth=20, heads=16, head_width=1536, head_depth=12, scan_layers=True, dtype="bfloat16")
    draft = LatentModelConfig(width=768, depth=12, heads=12, head_width=1024, head_depth=6, scan_layers=True, dtype="bfloat16")
    # 800 epochs of 1,281,167 images in batches of 2048, the first 100 with a growing learning rate; 1e-4 for 256 images.
    epoch = 1_281_167 // 2048
    no_decay = ("class_embed", "mask_token", "position")
    optim = OptimConfig(
        lr=8e-4, warmup_steps=100 * epoch, schedule="constant", lr_start=0.0, weight_decay=0.02, clip=3.0, no_decay=no_decay
    )
    train = LatentTrainConfig(steps=800 * epoch, batch_size=2048, ema=0.9999, optim=optim)
    return MaskedLatentConfig(
        data=DataConfig(path="imagenet", image_size=256, flip=True),
        tokenizer=LatentTokenizerConfig(image_size=256, patch=1, features=16, scale=0.2325),
        # KL-16 is taken as it is.
        tokenizer_train=TokenizerTrainConfig(steps=0),
        model=target,
        model_train=train,
        draft=draft,
        draft_train=train,
        speculation=SpeculationConfig(steps=256, chain_steps=100, drafts=8),
        num_classes=1000,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S028's claim, measured again: the target's samples from fewer of its calls.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (digits).
      seeds: samples are drawn from one pair of models under as many keys.
      edits: of the configuration, such as `speculation.drafts=8`.
      log: takes progress lines.
    """
    config, _ = claim_config(lambda variant: get_config(variant).config, budget, edits)
    samples = 20 if budget == "smoke" else 500
    return [masked_latent_claims.compare_samplers(config, seeds=seeds, samples=samples, log=log)]
