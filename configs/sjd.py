"""S089 SJD: speculative Jacobi decoding of image tokens (Teng et al. 2025, arXiv 2410.01699).

    python scripts/train.py --config configs/sjd.py --variant small --workdir runs/sjd
    python scripts/sample.py --workdir runs/sjd --labels 0,1,2 --num 8 --out grid.png

A class-conditional next-token model of raster tokens, sampled without a draft model: the law is the model's own, in fewer calls.
Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits as 64 tokens, minutes on a CPU), and `paper`: the sizes of
Lumina-mGPT 7B at 768 pixels, on this library's blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs.var import IMAGENET_TRAIN, NO_DECAY
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import speculative_image_claims as claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.next_scale import ClassifierConfig, ModelConfig, ModelTrainConfig, TokenizerConfig
from jaxgen.recipes.speculative_images import DecodeConfig, SpeculativeImageConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SpeculativeImageConfig:
    if variant == "paper":
        return lumina(DecodeConfig(length=16, initial="repeat_left"))
    return digits(variant, DecodeConfig(length=4 if variant == "smoke" else 16, initial="repeat_left"))


def digits(variant: str, decode: DecodeConfig) -> SpeculativeImageConfig:
    """Handwritten digits of 16 x 16 pixels as 8 x 8 tokens of a plain vector quantiser; `smoke` has 4 x 4 and learns nothing.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    smoke = variant == "smoke"
    warmup = 2 if smoke else 40

    def trained(steps, ema):
        optim = OptimConfig(lr=2e-3, warmup_steps=warmup, schedule="cosine", lr_end=0.05, clip=2.0, no_decay=NO_DECAY)
        return ModelTrainConfig(steps=10 if smoke else steps, batch_size=16 if smoke else 32, ema=ema, optim=optim)

    return SpeculativeImageConfig(
        data=DataConfig(path="digits", image_size=8 if smoke else 16, channels=1),
        tokenizer=TokenizerConfig(
            ch=8,
            ch_mult=(1, 2),
            res_blocks=1,
            attention=False,
            groups=8,
            vocab=16 if smoke else 64,
            width=4,
            patch_nums=(4 if smoke else 8,),
            phis=1,
            phi_ratio=0.0,
            codebook_init=0.1,
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=10 if smoke else 300,
            batch_size=16 if smoke else 32,
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            revive_every=5 if smoke else 25,
            optim=OptimConfig(lr=2e-3, warmup_steps=warmup, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0),
        ),
        model=ModelConfig(depth=2 if smoke else 3, width=16 if smoke else 64, heads=2, num_classes=10, gate_init=0.1),
        model_train=trained(400, 0.98),
        classifier=ClassifierConfig(steps=10 if smoke else 150, batch_size=16 if smoke else 128, width=8, lr=5e-3),
        run=RunConfig(save_every=500, eval_every=500),
        decode=decode,
        draft=ModelConfig(depth=1, width=16 if smoke else 32, heads=2, gate_init=0.1),
        draft_train=trained(300, 0.98),
    )


def published(
    decode: DecodeConfig, *, tokenizer: TokenizerConfig, model: ModelConfig, draft: ModelConfig, image_size: int
) -> SpeculativeImageConfig:
    """ImageNet, with the schedule that LlamaGen's class-conditional models were published with (Sun et al. 2024)."""
    optim = OptimConfig(lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.05, b2=0.95, clip=1.0, no_decay=NO_DECAY)
    train = ModelTrainConfig(steps=300 * -(-IMAGENET_TRAIN // 256), batch_size=256, optim=optim)
    return SpeculativeImageConfig(
        data=DataConfig(path="imagenet", image_size=image_size, channels=3, mid_scale=1.1, workers=8),
        tokenizer=tokenizer,
        tokenizer_train=TokenizerTrainConfig(
            steps=40 * -(-IMAGENET_TRAIN // 128),
            batch_size=128,
            adversarial_start=20_000,
            optim=OptimConfig(lr=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, b2=0.95, clip=1.0),
        ),
        model=model,
        model_train=train,
        run=RunConfig(save_every=5000, eval_every=5000),
        decode=decode,
        draft=draft,
        draft_train=dataclasses.replace(train, steps=20 * -(-IMAGENET_TRAIN // 256)),
    )


def lumina(decode: DecodeConfig) -> SpeculativeImageConfig:
    """Lumina-mGPT 7B's layers, codebook and 48 x 48 tokens."""
    model = ModelConfig(
        depth=32, width=4096, heads=32, num_classes=1000, mlp_ratio=11008 / 4096, scan_layers=True, remat=True, dtype="bfloat16"
    )
    tokenizer = TokenizerConfig(
        ch=128, ch_mult=(1, 1, 2, 2, 4), vocab=8192, width=256, patch_nums=(48,), phis=1, phi_ratio=0.0, dtype="bfloat16"
    )
    return published(decode, tokenizer=tokenizer, model=model, draft=ModelConfig(depth=1), image_size=768)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S089's claims, measured again: fewer calls at the same law, and what initial tokens from the neighbourhood add.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `small`).
      seeds: trainings of the generator.
      edits: of the configuration, such as `decode.length=8`.
      log: takes progress lines.
    """
    config, smoke = claim_config(_config, budget, edits)

    def window(initial, **fields):
        return dataclasses.replace(config.decode, proposer="jacobi", initial=initial, **fields)

    names = {
        "uniform": "uniform tokens enter",
        "repeat_left": "left token repeated",
        "repeat_above": "token above repeated",
        "sample_left": "left token's law",
        "sample_above": "law of the token above",
    }
    methods = {"speculate, no drafts": DecodeConfig(proposer="none")}
    methods |= {f"SJD, {text}": window(initial) for initial, text in names.items()}
    methods |= {"Jacobi fixed point of the same noise": window("uniform", rule="coupled")}
    samples = 100 if smoke else 500
    title = "Speculative Jacobi decoding against one token a call, the same model"
    return [claims.compare_decoders(config, methods, title=title, seeds=seeds, samples=samples, log=log)]
