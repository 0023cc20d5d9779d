"""S093 E-CAR: stages of growing resolution, each only partly denoised by a flow (Yuan et al. 2024, arXiv 2412.14170).

    python scripts/train.py --config configs/ecar.py --variant small --workdir runs/ecar
    python scripts/sample.py --workdir runs/ecar --labels 0,1,2 --num 8 --out grid.png

A transformer makes the features of one token map a stage, and a flow denoises that map to the level at which the next, larger one
takes over; noise and resolution change together.

Variants: `smoke`; `small` for scikit-learn's 8x8 digits on patches of 2x2 pixels, stages (2, 4); `paper` for ImageNet at 256
pixels on KL-16, stages (4, 8, 16). The paper's sizes could not be had: `paper` has about as many parameters as DiT-XL, with which
the authors compare, two thirds of them in the transformer that runs once a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.flow_scales import ScaleSolverConfig
from jaxgen.recipes.masked_latent import LatentConfig, LatentTokenizerConfig, TokenizerTrainConfig
from jaxgen.recipes.next_scale import ClassifierConfig
from jaxgen.recipes.next_x import FlowTrainConfig, NextXConfig, NextXModelConfig, SolverConfig
from jaxgen.recipes.staged_flow import StagedFlowConfig, StagedFlowModelConfig, compare_with_dit
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


def smoke() -> StagedFlowConfig:
    """Seconds; nothing is learnt."""
    base = small()
    sizes = dict(width=16, depth=1, heads=2, head_width=16, head_depth=1, head_heads=2)
    optim = dataclasses.replace(base.model_train.optim, warmup_steps=0)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **sizes),
        model_train=dataclasses.replace(base.model_train, steps=10, batch_size=16, optim=optim),
        sampler=dataclasses.replace(base.sampler, steps=2),
        classifier=dataclasses.replace(base.classifier, steps=20),
        run=RunConfig(log_every=5),
    )


def small() -> StagedFlowConfig:
    """Digits, in two minutes on two cores."""
    optim = OptimConfig(lr=2e-3, warmup_steps=50, schedule="cosine", lr_end=0.02, weight_decay=0.02, clip=1.0)
    return StagedFlowConfig(
        data=DataConfig(path="digits", channels=1),
        # The mean and the standard deviation of the digits' pixels in [-1, 1].
        tokenizer=LatentTokenizerConfig(image_size=8, patch=2, shift=-0.39, scale=1.33),
        model=StagedFlowModelConfig(
            width=64, depth=2, heads=4, head_width=64, head_depth=2, head_heads=4, scales=(2, 4), starts=(1.0, 0.6)
        ),
        model_train=FlowTrainConfig(steps=800, batch_size=64, ema=0.99, optim=optim),
        sampler=ScaleSolverConfig(steps=8, guided_below=1.0, two_speeds=False),
        classifier=ClassifierConfig(steps=200, width=16, lr=5e-3),
    )


def paper() -> StagedFlowConfig:
    """ImageNet at 256 pixels; the optimiser is that of DiT (Peebles & Xie 2023), at its batch of 256."""
    optim = OptimConfig(lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, clip=1.0)
    return StagedFlowConfig(
        data=DataConfig(path="imagenet", image_size=256, flip=True),
        tokenizer=LatentTokenizerConfig(image_size=256, patch=1, features=16, scale=0.2325),
        # KL-16 is taken as it is.
        tokenizer_train=TokenizerTrainConfig(steps=0),
        model=StagedFlowModelConfig(
            width=1152,
            depth=10,
            heads=16,
            head_width=1024,
            head_depth=12,
            head_heads=16,
            scales=(4, 8, 16),
            scan_layers=True,
            dtype="bfloat16",
        ),
        model_train=FlowTrainConfig(steps=400_000, batch_size=256, ema=0.9999, optim=optim),
        sampler=ScaleSolverConfig(steps=10, guided_below=1.0, two_speeds=False),
        num_classes=1000,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S093's claim, measured again: the quality of a diffusion transformer for a fraction of its FLOPs and time.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (digits).
      seeds: trainings of each system.
      edits: of the configuration, such as `model.starts=1.0,0.5`.
      log: takes progress lines.
    """
    config, _ = claim_config(lambda variant: get_config(variant).config, budget, edits)
    counts = dict(steps=(2,), dit_steps=(2, 4)) if budget == "smoke" else dict(steps=(2, 4, 8), dit_steps=(4, 8, 16, 32))
    samples = 20 if budget == "smoke" else 500
    return [compare_with_dit(config, baseline(config, budget), **counts, seeds=seeds, samples=samples, log=log)]


def baseline(config: StagedFlowConfig, budget: str) -> NextXConfig:
    """A flow of the whole grid in one stage, by a transformer of about as many parameters that runs at every step."""
    shared = config_lib.fields_of(config, LatentConfig)
    width, heads, depth = (16, 2, 1) if budget == "smoke" else (64, 4, 3)
    return NextXConfig(
        **shared,
        model=NextXModelConfig(width=width, depth=depth, heads=heads, unit="image", unit_size=0),
        model_train=config.model_train,
        sampler=SolverConfig(steps=16, solver="euler"),
    )
