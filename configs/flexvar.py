"""S064 FlexVAR: next-scale prediction without residuals, of any size and number of steps (Jiao et al. 2025, arXiv 2502.20313).

    python scripts/train.py --config configs/flexvar.py --variant small --workdir runs/flex --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/flex --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke`, `demo` and `small` have the sizes and budgets of `configs/var.py`; `d16`, `d20` and `paper` (d24, a billion
parameters) are the published ImageNet models. The sampler of a trained recipe takes another list of scales at every call:
`recipe.sample(params, key, labels, patch_nums=(1, 2, (3, 4), (4, 6)))`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims, flexible_claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.flexible_scales import FlexibleConfig, FlexibleTokenizerConfig
from jaxgen.recipes.next_scale import ModelConfig, ModelTrainConfig, NextScaleConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.scale_lists import DrawRule
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "demo", "small", "d16", "d20", "paper")

# Depth, epochs, base learning rate for 256 images, alng and final learning rate (the authors' scripts).
PUBLISHED = {
    "d16": (16, 180, 1e-4, 1e-3, 0.1),
    "d20": (20, 250, 1e-4, 1e-3, 0.1),
    "paper": (24, 350, 8e-5, 1e-4, 0.01),
}

# Scales whose tokens the authors draw; they take others greedily.
DRAWN = (*var.SCALES_256, 23, 24, 32)


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> FlexibleConfig:
    """The configuration of a variant."""
    if variant in PUBLISHED:
        return _published(variant)
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant == "small":
        lists = DrawRule(low=(3, 5), low_count=2, high=(6, 7), high_count=1, usual=0.2)
        return like(var.get_config("small").config, lists, z_channels=64, map_size=16)
    lists = DrawRule(always=(1,), low=(2, 3), low_count=1, high=(4, 4), high_count=0, usual=0.5)
    return like(var.get_config(variant).config, lists, z_channels=8 if variant == "smoke" else 32, map_size=8)


def like(base: NextScaleConfig, lists: DrawRule, *, z_channels: int, map_size: int) -> FlexibleConfig:
    """A VAR's counterpart: the same data, sizes and budgets."""
    shared = config_lib.fields_of(base.tokenizer, FlexibleTokenizerConfig)
    tokenizer = FlexibleTokenizerConfig(**shared, z_channels=z_channels, decoded=2)  # two, for the time that compiling takes
    fields = config_lib.fields_of(base, FlexibleConfig) | dict(tokenizer=tokenizer, lists=lists, map_size=map_size)
    return FlexibleConfig(**fields)


def unlike(ours: FlexibleConfig, base: NextScaleConfig) -> NextScaleConfig:
    """The VAR of all that `ours` shares with it, and `base` for the rest."""
    tokenizer = dataclasses.replace(base.tokenizer, **config_lib.fields_of(ours.tokenizer, type(base.tokenizer)))
    return NextScaleConfig(**config_lib.fields_of(ours, NextScaleConfig) | dict(tokenizer=tokenizer))


def _published(variant: str) -> FlexibleConfig:
    """ImageNet at 256 pixels, bf16, with the schedule of the authors' scripts.

    They published no training of the tokenizer, whose loss the paper takes from LlamaGen; its schedule here is LlamaGen's. To
    use their tokenizer, convert it into the work directory first: the tokenizer stage is then done.
    """
    depth, epochs, base_lr, gate_init, lr_end = PUBLISHED[variant]
    batch = 768
    updates = -(-var.IMAGENET_TRAIN // batch)
    return FlexibleConfig(
        data=DataConfig(path="imagenet", image_size=256, channels=3, mid_scale=1.125, workers=8),
        tokenizer=FlexibleTokenizerConfig(dtype="bfloat16"),
        tokenizer_train=TokenizerTrainConfig(
            steps=40 * var.IMAGENET_TRAIN // 128,
            batch_size=128,
            adversarial_start=20_000,
            optim=OptimConfig(lr=1e-4, schedule="constant", weight_decay=0.0),
        ),
        model=ModelConfig(
            depth=depth,
            num_classes=1000,
            gate_init=gate_init,
            drop_path_rate=0.1 * depth / 24,
            scan_layers=True,
            remat=depth >= 24,
            dtype="bfloat16",
        ),
        model_train=ModelTrainConfig(
            steps=epochs * updates,
            batch_size=batch,
            optim=OptimConfig(
                lr=base_lr * batch / 256,
                warmup_steps=round(epochs / 50 * updates),
                schedule="lin0",
                lr_end=lr_end,
                clip=2.0,
                no_decay=var.NO_DECAY,
            ),
        ),
        run=RunConfig(save_every=5000, eval_every=5000),
        drawn=DRAWN,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S064's claims, measured again: VAR of equal size and budget, and one model on lists of scales it was not trained on.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`; what VAR has of it too is edited there as well.
      log: takes progress lines.
    """
    if budget not in ("smoke", "small"):
        raise ValueError(f"budget {budget!r} is not one of smoke, small")
    variant, samples = ("smoke", 100) if budget == "smoke" else ("demo", 1000)
    ours = config_lib.override(build(variant), edits).resolve()
    baseline = unlike(ours, var.get_config(variant).config)
    last = {}
    comparison = claims.compare_generators(
        {"S047 VAR": baseline, "S064 FlexVAR": ours},
        seeds=seeds,
        samples=samples,
        log=log,
        columns=lambda recipe, params: last.update(params) or {},
    )
    return [comparison, flexible_claims.compare_lists(ours, last, seeds=seeds, samples=samples, log=log)]
