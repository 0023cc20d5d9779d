"""S162 Axial Transformer: attention along rows and columns, exact factorisation (Ho et al. 2019, arXiv 1912.12180).

    python scripts/train.py --config configs/axial.py --variant small --workdir runs/axial --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/axial --labels 0,1,2 --num 8 --out grid.png

Of the blocks in `model.depth`, `outer` pairs are the outer decoder's, the rest the inner one's. The tokens are a tokenizer's, or
with `levels=256` pixels, whose side `tokenizer.patch_nums` then is.

Variants: `smoke`, `demo` and `small` have the data, tokenizer, sizes and budgets of `configs/var.py`, with one scale and a block
more; `paper` has the sizes and schedule of the authors' script for the pixels of ImageNet at 32. Of their two ways with channels
it takes the one where they are rows; their script takes the other, with 8 more blocks that read the channels before the present
one. `deep` is `paper` with 8 more blocks, so that it is as large as theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.axial import AxialConfig, compare_axial, costs_by_size, dependences
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import ModelConfig, ModelTrainConfig, NextScaleConfig, TokenizerConfig

VARIANTS = ("smoke", "demo", "small", "paper", "deep")

# Pairs of outer blocks; those of the inner decoder are as many as make at least one block more than VAR has.
OUTER = {"smoke": 1, "demo": 1, "small": 2}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> AxialConfig:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant in ("paper", "deep"):
        return _published(*{"paper": (16, 4), "deep": (24, 6)}[variant])
    base = var.get_config(variant).config
    one = dataclasses.replace(base.tokenizer, patch_nums=base.tokenizer.patch_nums[-1:])
    model = dataclasses.replace(base.model, depth=base.model.depth + 1)
    fields = config_lib.fields_of(base, NextScaleConfig) | dict(tokenizer=one, model=model)
    return AxialConfig(**fields, outer=OUTER[variant])


def _published(depth: int, outer: int) -> AxialConfig:
    """Width 1536, 16 heads and MLPs as wide; Adam at 1e-4 after 5000 updates, EMA of 0.99995; how many updates is a guess."""
    base = var.get_config("d16").config
    return AxialConfig(
        data=DataConfig(path="imagenet", image_size=32, channels=3, workers=8),
        tokenizer=TokenizerConfig(patch_nums=(32,)),
        model=ModelConfig(
            depth=depth, width=1536, heads=16, mlp_ratio=1.0, num_classes=1000, l2_norm=False, remat=True, dtype="bfloat16"
        ),
        model_train=ModelTrainConfig(
            steps=500_000,
            batch_size=64,
            ema=0.99995,
            optim=OptimConfig(lr=1e-4, warmup_steps=5000, schedule="constant", weight_decay=0.0, b2=0.999, clip=1.0),
        ),
        run=base.run,
        outer=outer,
        levels=256,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S162's claims, measured again: quality at equal depth, the factorisation, and what a grid's size costs.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits, small="demo")
    comparison = compare_axial(config, seeds=seeds, samples=100 if smoke else 1000, log=log)
    return [comparison, dependences(config), costs_by_size(config, (4, 8) if smoke else (8, 16, 32))]
