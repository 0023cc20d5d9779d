"""S047 VAR: next-scale prediction (Tian et al. 2024, arXiv 2404.02905).

    python scripts/train.py --config configs/var.py --variant small --workdir runs/mnist --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/mnist --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke` (seconds on a CPU), `demo` (scikit-learn's digits, minutes on a CPU), `small` (MNIST or CIFAR-10 at 32
pixels), and the published ImageNet models `d16`, `d20`, `d24`, `d30` (256 pixels) and `d36_512`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.next_scale import ClassifierConfig, ModelConfig, ModelTrainConfig, NextScaleConfig, TokenizerConfig
from jaxgen.recipes.next_token import NextTokenConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "demo", "small", "d16", "d20", "d24", "d30", "d36_512")

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
IMAGENET_TRAIN = 1_281_167

# Parameters that the authors do not decay, by a part of their path.
NO_DECAY = ("bias", "position", "start", "level", "offset", "log_scale")

# Depth: epochs, batch, base learning rate for 256 images, alng, final learning rate and weight decay (their README).
PUBLISHED = {
    "d16": (16, 200, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d20": (20, 250, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d24": (24, 350, 768, 8e-5, 1e-4, 0.01, 0.05),
    "d30": (30, 350, 1024, 8e-5, 1e-5, 0.01, 0.08),
    "d36_512": (36, 350, 768, 8e-5, 5e-6, 0.01, 0.08),
}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    if variant in PUBLISHED:
        return _published(variant).recipe()
    if variant == "smoke":
        return _smoke().recipe()
    if variant == "demo":
        return _digits(tokenizer_steps=500, model_steps=400).recipe()
    if variant == "small":
        return _small().recipe()
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def _digits(tokenizer_steps: int = 600, model_steps: int = 500) -> NextScaleConfig:
    """Handwritten digits of 8x8 pixels, in four scales; `demo` trains a little less, to be done in minutes."""
    return NextScaleConfig(
        data=DataConfig(path="digits", channels=1),
        tokenizer=TokenizerConfig(
            ch=32, ch_mult=(1, 2), res_blocks=1, groups=8, vocab=128, width=8, patch_nums=(1, 2, 3, 4), codebook_init=0.1
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=tokenizer_steps,
            batch_size=64,
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            revive_every=25,
            optim=OptimConfig(lr=1e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0),
        ),
        model=ModelConfig(depth=3, width=128, heads=4, num_classes=10, gate_init=0.1),
        model_train=ModelTrainConfig(
            steps=model_steps,
            batch_size=64,
            ema=0.99,
            optim=OptimConfig(lr=1e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, clip=2.0, no_decay=NO_DECAY),
        ),
        classifier=ClassifierConfig(steps=200, batch_size=128, width=16, lr=5e-3),
        run=RunConfig(save_every=500, eval_every=500),
    )


def _smoke() -> NextScaleConfig:
    """The digits with everything tiny: every part runs, nothing is learnt."""
    config = _digits()

    def tiny(train, **kwargs):
        optim = dataclasses.replace(train.optim, warmup_steps=2)
        return dataclasses.replace(train, steps=10, batch_size=16, optim=optim, **kwargs)

    return dataclasses.replace(
        config,
        tokenizer=dataclasses.replace(config.tokenizer, ch=8, attention=False, vocab=16, width=4, patch_nums=(1, 2, 4)),
        tokenizer_train=tiny(config.tokenizer_train, revive_every=5),
        model=dataclasses.replace(config.model, depth=2, width=16, heads=2, scan_layers=True),
        model_train=tiny(config.model_train, ema=0.9),
        classifier=ClassifierConfig(steps=10, batch_size=16, width=8),
    )


def _small() -> NextScaleConfig:
    """32-pixel images in six scales: MNIST, CIFAR-10 or one's own, from `data.path`."""
    return NextScaleConfig(
        data=DataConfig(path="mnist.npz", image_size=32, channels=3),
        tokenizer=TokenizerConfig(
            ch=64, ch_mult=(1, 2, 2), res_blocks=1, vocab=512, width=16, patch_nums=(1, 2, 3, 4, 6, 8), codebook_init=0.1
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=6000,
            batch_size=64,
            revive_every=50,
            adversarial_start=3000,
            optim=OptimConfig(lr=4e-4, warmup_steps=100, schedule="cosine", lr_end=0.05, weight_decay=0.0, b2=0.99, clip=1.0),
        ),
        model=ModelConfig(depth=8, width=384, heads=6, gate_init=1e-2, drop_path_rate=0.03),
        model_train=ModelTrainConfig(
            steps=12_000,
            batch_size=128,
            ema=0.999,
            optim=OptimConfig(lr=3e-4, warmup_steps=250, schedule="lin0", lr_end=0.05, clip=2.0, no_decay=NO_DECAY),
        ),
        classifier=ClassifierConfig(steps=1500, width=32),
        run=RunConfig(save_every=1000, eval_every=1000),
    )


def _published(variant: str) -> NextScaleConfig:
    """ImageNet at 256 or 512 pixels, bf16, with the authors' schedule.

    They published no training of the tokenizer; its schedule here is that of VQGAN (Esser et al. 2021) at the same batch.
    To use their tokenizer, convert it into the work directory first: the tokenizer stage is then done.
    """
    depth, epochs, batch, base_lr, gate_init, lr_end, decay_end = PUBLISHED[variant]
    updates = -(-IMAGENET_TRAIN // batch)  # an epoch's; their sampler fills the last batch
    steps = epochs * updates
    large = variant == "d36_512"
    return NextScaleConfig(
        data=DataConfig(path="imagenet", image_size=512 if large else 256, channels=3, mid_scale=1.125, workers=8),
        tokenizer=TokenizerConfig(patch_nums=SCALES_512 if large else SCALES_256, dtype="bfloat16"),
        tokenizer_train=TokenizerTrainConfig(
            steps=250_000,
            batch_size=256,
            adversarial_start=50_000,
            optim=OptimConfig(lr=4.5e-6 * 256 / 8, warmup_steps=1000, schedule="constant", weight_decay=0.0, b1=0.5, b2=0.9),
        ),
        model=ModelConfig(
            depth=depth,
            num_classes=1000,
            gate_init=gate_init,
            drop_path_rate=0.1 * depth / 24,
            shared_adaln=large,
            scan_layers=True,
            remat=depth >= 24,
            dtype="bfloat16",
        ),
        model_train=ModelTrainConfig(
            steps=steps,
            batch_size=batch,
            optim=OptimConfig(
                lr=base_lr * batch / 256,
                warmup_steps=round(epochs / 50 * updates),
                schedule="lin0",
                lr_start=0.005,
                lr_end=lr_end,
                weight_decay=0.05,
                weight_decay_end=decay_end,
                clip=2.0,
                no_decay=NO_DECAY,
            ),
        ),
        run=RunConfig(save_every=5000, eval_every=5000),
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S047's claims, measured again: few steps at equal size, and a scaling law.

    Both systems get the same images, autoencoder, blocks, training budget and final grid of tokens; the baseline predicts
    that grid in raster order, one token a call.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`; a long coffee on two cores).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    if budget not in ("smoke", "small"):
        raise ValueError(f"budget {budget!r} is not one of smoke, small")
    base = config_lib.override(_smoke() if budget == "smoke" else _digits(), edits).resolve()
    fields = config_lib.fields_of(base)
    last = dataclasses.replace(base.tokenizer, patch_nums=base.tokenizer.patch_nums[-1:])
    baseline = NextTokenConfig(**fields | dict(tokenizer=last))
    samples = 100 if budget == "smoke" else 1000
    systems = {"S047 VAR, next scale": base, "baseline, next token": baseline}
    comparison = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log)

    def sized(depth):
        return dataclasses.replace(base, model=dataclasses.replace(base.model, depth=depth, width=32 * depth, heads=depth))

    depths = (1, 2, 3, 4) if budget == "smoke" else (1, 2, 3, 4, 6)
    scaling = claims.scaling_law({f"d{depth}": sized(depth) for depth in depths}, log=log)
    return [comparison, scaling]
