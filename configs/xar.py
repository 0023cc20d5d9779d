"""S048 xAR: next-X prediction with flows and noisy contexts (Ren et al. 2025, arXiv 2502.20388).

    python scripts/train.py --config configs/xar.py --variant small --workdir runs/xar
    python scripts/sample.py --workdir runs/xar --labels 0,1,2 --num 8 --out grid.png

X, what one step makes, is `model.unit`: token, cell, subsample, scale or image, the first three of `model.unit_size`.
`model.context=clean` is teacher forcing in place of noisy contexts.

Variants: `smoke`; `small` for scikit-learn's 8x8 digits, four cells of 2x2 tokens, each of 2x2 pixels, 500 updates as in the
claim (on MNIST at 8 pixels 0.48 of guided samples are named as asked; with `model_train.steps=4000`, minutes, 0.96);
`paper`, `large` and `huge` are xAR-B, -L and -H for ImageNet at 256 pixels, four cells of 8x8 tokens of the KL-16 autoencoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.masked_latent import LatentTokenizerConfig, TokenizerTrainConfig
from jaxgen.recipes.next_scale import ClassifierConfig
from jaxgen.recipes.next_x import FlowTrainConfig, NextXConfig, NextXModelConfig, SolverConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "paper", "large", "huge")

# Width, blocks of either stack, heads, steps of the solver (their models and their README).
PUBLISHED = {"paper": (768, 8, 12, 40), "large": (1024, 16, 16, 50), "huge": (1280, 20, 16, 50)}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant in PUBLISHED:
        return published(*PUBLISHED[variant]).recipe()
    return {"smoke": smoke, "small": small}[variant]().recipe()


def smoke() -> NextXConfig:
    """Seconds; nothing is learnt."""
    base = small()
    optim = dataclasses.replace(base.model_train.optim, warmup_steps=0)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, width=16, depth=1, heads=2),
        model_train=dataclasses.replace(base.model_train, steps=10, batch_size=16, optim=optim),
        sampler=SolverConfig(steps=3),
        classifier=dataclasses.replace(base.classifier, steps=20),
        run=RunConfig(log_every=5),
    )


def small() -> NextXConfig:
    """Digits, in a minute or two on two cores."""
    optim = OptimConfig(lr=2e-3, warmup_steps=50, schedule="cosine", lr_end=0.02, weight_decay=0.02, clip=1.0)
    return NextXConfig(
        data=DataConfig(path="digits", channels=1),
        # The mean and the standard deviation of the digits' pixels in [-1, 1].
        tokenizer=LatentTokenizerConfig(image_size=8, patch=2, shift=-0.39, scale=1.33),
        model=NextXModelConfig(width=64, depth=2, heads=4, unit_size=2),
        model_train=FlowTrainConfig(steps=500, batch_size=64, ema=0.99, optim=optim),
        sampler=SolverConfig(steps=20),
        classifier=ClassifierConfig(steps=200, width=16, lr=5e-3),
    )


def published(width: int, depth: int, heads: int, steps: int) -> NextXConfig:
    """A released model with its schedule, as far as `OptimConfig` has it.

    The authors keep the learning rate from epoch 100 to 600 of 800 and lower it to 1e-5 in half a cosine after that, which here
    stays; they drop a tenth of the weights of attention, too, where this library drops a tenth of the branches' outputs alone.
    """
    # 800 epochs of 1,281,167 images in batches of 2048, the first 100 with a growing learning rate; 5e-5 for 256 images.
    epoch = 1_281_167 // 2048
    optim = OptimConfig(
        lr=4e-4, warmup_steps=100 * epoch, schedule="constant", lr_start=0.0, weight_decay=0.02, b2=0.96, clip=1.0
    )
    return NextXConfig(
        data=DataConfig(path="imagenet", image_size=256, flip=True),
        tokenizer=LatentTokenizerConfig(image_size=256, patch=1, features=16, scale=0.2325),
        # KL-16 is taken as it is.
        tokenizer_train=TokenizerTrainConfig(steps=0),
        model=NextXModelConfig(width=width, depth=depth, heads=heads, dropout=0.1, scan_layers=True, dtype="bfloat16"),
        model_train=FlowTrainConfig(steps=800 * epoch, batch_size=2048, ema=0.9999, optim=optim),
        sampler=SolverConfig(steps=steps),
        num_classes=1000,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S048's claims, measured again: cells against tokens and the other entities, noisy contexts against teacher forcing.

    All systems have the same network, data and updates; with clean contexts an update reads twice the tokens.

    Args:
      budget: "smoke" (nothing is learnt, and by three of the systems), or "small" (digits).
      seeds: trainings of each system.
      edits: of the configuration, such as `sampler.steps=40`.
      log: takes progress lines.
    """
    base, _ = claim_config(lambda variant: get_config(variant).config, budget, edits)

    def of(unit, size=0, context="noisy"):
        return dataclasses.replace(base, model=dataclasses.replace(base.model, unit=unit, unit_size=size, context=context))

    size = base.model.unit_size
    systems = {
        "S048 xAR, cells, noisy context": of("cell", size),
        "tokens, noisy context": of("token"),
        "cells, teacher forcing": of("cell", size, "clean"),
        "tokens, teacher forcing": of("token", 0, "clean"),
        "subsamples, noisy context": of("subsample", size),
        "scales, noisy context": of("scale"),
        "the whole image": of("image"),
    }
    if budget == "smoke":
        systems = dict(list(systems.items())[:3])
    title = "What a step predicts, and what it sees of the steps before: flows of equal size, data and updates"
    return [claims.compare_generators(systems, seeds=seeds, samples=samples(budget), log=log, columns=calls, title=title)]


def samples(budget: str) -> int:
    """Images that are judged."""
    return 100 if budget == "smoke" else 1000


def calls(recipe: Recipe, params: dict) -> dict:
    """Calls of the network an image: those of the solver, and one for each finished entity but the last."""
    entities, steps = recipe.config.build_generator().order.steps, recipe.config.sampler.steps
    twice = 2 if recipe.config.sampler.solver == "heun" else 1
    return {"model calls": entities * steps * twice + entities - 1}
