"""LlamaGen: next-token prediction of image tokens with a plain Llama (Sun et al. 2024, arXiv 2406.06525).

    python scripts/train.py --config configs/llamagen.py --variant small --workdir runs/llama --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/llama --labels 0,1,2 --num 8 --cfg 1 --out grid.png

What the next-token systems start from; of captions: `configs/llamagen_captions.py`. `--cfg` is constant over the image: the
published scales are 1 + cfg.

Variants: `smoke`, `demo` and `small` have the data and budgets of `configs/var.py`; `paper` is LlamaGen-B, `large` LlamaGen-L on
ImageNet at 256 pixels; `xl`, `xxl` and `3b` take 384 pixels. Images of one's own: set `model.num_classes`.
"""

from __future__ import annotations

from configs import var
from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.flexible_scales import FlexibleTokenizerConfig
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig
from jaxgen.recipes.next_scale import ModelTrainConfig, NextScaleConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "demo", "small", "paper", "large", "xl", "xxl", "3b")

# Width, blocks, heads, hidden width and tokens along a side (their models, and the grids of their table of weights).
PUBLISHED = {
    "paper": (768, 12, 12, 2048, 16),
    "large": (1024, 24, 16, 2816, 16),
    "xl": (1280, 36, 20, 3584, 24),
    "xxl": (1536, 48, 24, 4096, 24),
    "3b": (3200, 24, 32, 8704, 24),
}


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> ImageLlamaConfig:
    """The configuration of a variant."""
    if variant in PUBLISHED:
        return published(*PUBLISHED[variant])
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    z_channels, dropout = {"smoke": (8, 0.0), "demo": (32, 0.0), "small": (64, 0.1)}[variant]
    return like(var.get_config(variant).config, z_channels=z_channels, dropout=dropout)


def like(base: NextScaleConfig, *, z_channels: int, dropout: float) -> ImageLlamaConfig:
    """A VAR's counterpart: the same data, width, depth and budgets, and the last of its grids."""
    tokenizer = config_lib.fields_of(base.tokenizer, FlexibleTokenizerConfig)
    tokenizer |= dict(patch_nums=base.tokenizer.patch_nums[-1:], z_channels=z_channels)
    model = config_lib.fields_of(base.model, ImageLlamaModelConfig)
    model |= dict(num_classes=10, token_dropout=dropout, dropout=dropout)
    parts = dict(tokenizer=FlexibleTokenizerConfig(**tokenizer), model=ImageLlamaModelConfig(**model))
    return ImageLlamaConfig(**config_lib.fields_of(base) | parts)


def published(width: int, depth: int, heads: int, hidden: int, grid: int) -> ImageLlamaConfig:
    """ImageNet, bf16, with the schedules of the authors' scripts.

    They train on the tokens of ten crops of each image and their mirror images, computed before; here crops are random. To use
    their tokenizer, convert it into the work directory first: the tokenizer stage is then done.
    """
    epoch = var.IMAGENET_TRAIN // 256
    optim = OptimConfig(lr=1e-4, schedule="constant", weight_decay=0.05, clip=1.0)
    return ImageLlamaConfig(
        data=DataConfig(path="imagenet", image_size=16 * grid, channels=3, flip=True, mid_scale=1.1, workers=8),
        tokenizer=FlexibleTokenizerConfig(vocab=16384, width=8, patch_nums=(grid,), dtype="bfloat16"),
        tokenizer_train=TokenizerTrainConfig(
            steps=40 * var.IMAGENET_TRAIN // 128, batch_size=128, l1_weight=0.0, adversarial_start=20_000, optim=optim
        ),
        model=ImageLlamaModelConfig(
            width=width,
            depth=depth,
            heads=heads,
            hidden=hidden,
            num_classes=1000,
            scan_layers=True,
            remat=depth >= 24,
            dtype="bfloat16",
        ),
        model_train=ModelTrainConfig(steps=300 * epoch, batch_size=256, optim=optim),
        run=RunConfig(save_every=5000, eval_every=5000),
    )
