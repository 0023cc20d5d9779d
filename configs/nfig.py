"""S007 NFIG: next-frequency prediction (Huang et al. 2025, arXiv 2503.07076).

    python scripts/train.py --config configs/nfig.py --variant small --workdir runs/nfig --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/nfig --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke`, `demo` (scikit-learn's digits, minutes on a CPU), `small` (MNIST or CIFAR-10 at 32 pixels), and the published
ImageNet models of 256 pixels, `d16` and `d20`; `paper` is `d16`, the one of 310M parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.frequency_bands import FrequencyConfig, FrequencyTokenizerConfig, tokenizer_columns
from jaxgen.recipes.next_scale import NextScaleConfig

VARIANTS = ("smoke", "demo", "small", "d16", "d20", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> FrequencyConfig:
    if variant in ("smoke", "demo", "small"):
        # On small grids the published division leaves bands empty.
        return _bands(var.get_config(variant).config, division="grid", transform="dct")
    if variant in VARIANTS:
        return _published("d16" if variant == "paper" else variant)
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def _bands(base: NextScaleConfig, **tokenizer) -> FrequencyConfig:
    """The system of `base` over frequency bands, one a scale."""
    fields = config_lib.fields_of(base)
    return FrequencyConfig(**fields | dict(tokenizer=FrequencyTokenizerConfig(**dataclasses.asdict(base.tokenizer), **tokenizer)))


def _published(variant: str) -> FrequencyConfig:
    """VAR's transformer and bands on VAR's grids; 350 epochs of batches of 768 at a learning rate of 8e-5 (their section 4.1).

    The paper names Adam and no schedule, no weight decay and no optimiser of the tokenizer: those are VAR's.
    """
    base = var.get_config(variant).config
    train = base.model_train
    epoch = -(-var.IMAGENET_TRAIN // train.batch_size)
    optim = dataclasses.replace(train.optim, lr=8e-5, warmup_steps=7 * epoch)
    return _bands(dataclasses.replace(base, model_train=dataclasses.replace(train, steps=350 * epoch, optim=optim)))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S007's claim, measured again: as good as VAR in fewer steps.

    All systems end at the same grid and have the same width, depth, images and updates. Both kinds are trained with the scales of
    `demo` and without the last but one, so that it can be told what the bands do and what it costs to leave a step out. (The
    published tables give VAR and NFIG ten steps each; the 1.25x is of a smaller model against a larger one.)

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    ours, smoke = claim_config(_config, budget, edits, small="demo")
    systems = {}
    for patch_nums in (ours.tokenizer.patch_nums, (*ours.tokenizer.patch_nums[:-2], ours.tokenizer.patch_nums[-1])):
        tokenizer = dataclasses.replace(ours.tokenizer, patch_nums=patch_nums)
        bands = dataclasses.replace(ours, tokenizer=tokenizer)
        fields = config_lib.fields_of(bands, NextScaleConfig)
        plain = dataclasses.asdict(tokenizer)
        del plain["division"], plain["transform"]
        steps = len(patch_nums)
        systems[f"S047 VAR, {steps} scales"] = NextScaleConfig(**fields | dict(tokenizer=var.TokenizerConfig(**plain)))
        systems[f"S007 NFIG, {steps} bands"] = bands
    comparison = claims.compare_generators(
        systems,
        seeds=seeds,
        samples=100 if smoke else 1000,
        log=log,
        columns=tokenizer_columns,
        title="Frequency bands against scales on the same final grid, of equal size, data and training budget",
    )
    return [comparison]
