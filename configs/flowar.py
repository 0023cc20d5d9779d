"""S010 FlowAR: scales that double on any autoencoder, each drawn by a flow (Ren et al. 2024, arXiv 2412.15205).

    python scripts/train.py --config configs/flowar.py --variant small --workdir runs/flowar
    python scripts/sample.py --workdir runs/flowar --labels 0,1,2 --num 8 --out grid.png

Variants: `smoke`; `small` for scikit-learn's 8x8 digits on patches of 2x2 pixels, scales (1, 2, 4), and `small_kl` for the same
on the features of a small autoencoder; `paper`, `large` and `huge` are FlowAR-S, -L and -H for ImageNet at 256 pixels on KL-16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import var
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.flow_scales import FlowScaleConfig, FlowScaleModelConfig, ScaleSolverConfig
from jaxgen.recipes.masked_latent import LatentTokenizerConfig, TokenizerTrainConfig
from jaxgen.recipes.next_scale import ClassifierConfig
from jaxgen.recipes.next_x import FlowTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "small_kl", "paper", "large", "huge")

# Width, blocks of either stack, heads, width and blocks of the head, steps, guidance up to this level, two speeds (their models
# and README; their 25 steps are 24, and 50 steps are equal ones).
PUBLISHED = {
    "paper": (768, 6, 12, 1024, 2, 24, 0.9, True),
    "large": (1024, 8, 16, 1024, 12, 24, 0.9, True),
    "huge": (1536, 15, 16, 1536, 12, 50, 0.7, False),
}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if variant in PUBLISHED:
        return published(*PUBLISHED[variant]).recipe()
    return {"smoke": smoke, "small": small, "small_kl": small_kl}[variant]().recipe()


def smoke() -> FlowScaleConfig:
    """Seconds; nothing is learnt."""
    base = small()
    optim = dataclasses.replace(base.model_train.optim, warmup_steps=0)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, width=16, depth=1, heads=2, head_width=16, head_depth=1, head_heads=2),
        model_train=dataclasses.replace(base.model_train, steps=10, batch_size=16, optim=optim),
        sampler=ScaleSolverConfig(steps=4),
        classifier=dataclasses.replace(base.classifier, steps=20),
        run=RunConfig(log_every=5),
    )


def small() -> FlowScaleConfig:
    """Digits, in two or three minutes on two cores."""
    optim = OptimConfig(lr=2e-3, warmup_steps=50, schedule="cosine", lr_end=0.02, weight_decay=0.02, clip=1.0)
    return FlowScaleConfig(
        data=DataConfig(path="digits", channels=1),
        # The mean and the standard deviation of the digits' pixels in [-1, 1].
        tokenizer=LatentTokenizerConfig(image_size=8, patch=2, shift=-0.39, scale=1.33),
        model=FlowScaleModelConfig(width=64, depth=1, heads=4, head_width=64, head_depth=2, head_heads=4),
        model_train=FlowTrainConfig(steps=800, batch_size=64, ema=0.99, optim=optim),
        sampler=ScaleSolverConfig(steps=20),
        classifier=ClassifierConfig(steps=200, width=16, lr=5e-3),
    )


def small_kl(base: FlowScaleConfig | None = None) -> FlowScaleConfig:
    """`small`, or another such, on features of a small autoencoder: half the size, four numbers each."""
    base = small() if base is None else base
    optim = OptimConfig(lr=1e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0)
    return dataclasses.replace(
        base,
        tokenizer=LatentTokenizerConfig(image_size=8, patch=1, features=4, ch=32, ch_mult=(1, 2), res_blocks=1, groups=8),
        # The weight of the KL term keeps features near unit variance, which is what the flow expects.
        tokenizer_train=TokenizerTrainConfig(steps=600, batch_size=64, kl_weight=0.02, optim=optim),
    )


def published(
    width: int, depth: int, heads: int, head_width: int, head_depth: int, steps: int, guided_below: float, two_speeds: bool
) -> FlowScaleConfig:
    """A released model with its schedule.

    The larger heads of the release have cross-attention besides, and so more parameters than these; the authors drop a tenth of
    the weights of attention, too, where this library drops a tenth of the branches' outputs alone.
    """
    # 400 epochs of 1,281,167 images in batches of 2048, the first 100 with a growing learning rate; 5e-5 for 256 images.
    epoch = 1_281_167 // 2048
    optim = OptimConfig(
        lr=4e-4, warmup_steps=100 * epoch, schedule="cosine", lr_start=0.0, lr_end=0.025, weight_decay=0.02, clip=3.0
    )
    return FlowScaleConfig(
        data=DataConfig(path="imagenet", image_size=256, flip=True),
        tokenizer=LatentTokenizerConfig(image_size=256, patch=1, features=16, scale=0.2325),
        # KL-16 is taken as it is.
        tokenizer_train=TokenizerTrainConfig(steps=0),
        model=FlowScaleModelConfig(
            width=width,
            depth=depth,
            heads=heads,
            head_width=head_width,
            head_depth=head_depth,
            dropout=0.1,
            scan_layers=True,
            remat=head_depth > 2,
            dtype="bfloat16",
        ),
        model_train=FlowTrainConfig(steps=400 * epoch, batch_size=2048, ema=0.9999, optim=optim),
        sampler=ScaleSolverConfig(steps, guided_below, two_speeds),
        num_classes=1000,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S010's claim, measured again: the same generator on pixels and on an autoencoder, against VAR with its own tokenizer.

    All generators have about as many parameters, and the same data, updates and batch.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (digits).
      seeds: trainings of each system.
      edits: of FlowAR's configuration, such as `sampler.steps=40`; those of `data` and `model_train` hold for VAR, too.
      log: takes progress lines.
    """
    base, _ = claim_config(lambda variant: get_config(variant).config, budget, edits)
    small_tokenizer = small_kl(base)
    if budget == "smoke":
        train = dataclasses.replace(small_tokenizer.tokenizer_train, steps=10, optim=base.model_train.optim)
        small_tokenizer = dataclasses.replace(small_tokenizer, tokenizer_train=train)
    systems = {
        "S010 FlowAR on patches of pixels": base,
        "S010 FlowAR on an autoencoder": small_tokenizer,
        "S047 VAR on its multi-scale tokenizer": rival(base, budget),
    }
    title = "Next-scale prediction: a flow on any tokenizer against codes of a multi-scale one"
    samples = 100 if budget == "smoke" else 1000
    return [claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=calls, title=title)]


def rival(base: FlowScaleConfig, budget: str):
    """VAR on the same data with about as many parameters and the same updates."""
    config = (var.get_config("smoke") if budget == "smoke" else var.get_config("demo")).config
    train, sizes = base.model_train, dataclasses.replace(config.model, num_classes=base.num_classes)
    if budget == "small":
        sizes = dataclasses.replace(sizes, width=64, heads=4, depth=4)
    shared = {name: getattr(train, name) for name in ("steps", "batch_size", "accumulate", "ema", "class_drop")}
    return dataclasses.replace(
        config,
        data=base.data,
        model=sizes,
        model_train=dataclasses.replace(config.model_train, **shared),
        classifier=base.classifier,
        run=base.run,
    )


def calls(recipe: Recipe, params: dict) -> dict:
    """Calls an image: of VAR's network, or of FlowAR's transformer and its head."""
    config = recipe.config
    if not isinstance(config, FlowScaleConfig):
        return {}
    scales = config.build_generator().order.steps
    return {"model calls": f"{scales} + {scales * config.sampler.steps} of the head"}
