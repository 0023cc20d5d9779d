"""LlamaGen of captions: next-token prediction of image tokens behind a text (Sun et al. 2024, arXiv 2406.06525, section 3.3).

    python scripts/train.py --config configs/llamagen_captions.py --variant small --workdir runs/words
    python scripts/sample.py --workdir runs/words --prompt "one red circle; a black background" --num 8 --cfg 2 --out grid.png
    python scripts/evaluate.py --workdir runs/words --num 500 --cfg 2 --top_p 0

Captions are bytes, and what encodes them is trained along; the authors' encoder is FLAN-T5 XL, frozen. A caption is padded to
`data.captions` bytes, which the generator does not see; one that is longer is an error, unless `data.cut_captions=true`. A tenth
of them are dropped for guidance. On the procedural world an oracle says how often samples are what their captions say.

Variants: `smoke` (nothing is learnt) and `small` (an hour on a CPU, after which colours and backgrounds are what captions say and
shapes are not yet) are on the procedural world at 16 and 32 pixels; one's own images take `data.path=...npz
data.image_size=32`, with captions beside them (see `jaxgen.data.DataConfig`).
`paper` is LlamaGen-XL for text at 256 pixels: their first stage, with 120 features of width 2048 a caption.
"""

from __future__ import annotations

from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.captions import CaptionLlamaConfig, TextEncoderConfig
from jaxgen.recipes.flexible_scales import FlexibleTokenizerConfig
from jaxgen.recipes.image_llama import LlamaSizesConfig
from jaxgen.recipes.next_scale import ModelTrainConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "paper")

LONGEST = 120  # bytes; what the world says of one object has 113 at most
NO_DECAY = ("bias", "position", "no_caption")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> CaptionLlamaConfig:
    """The configuration of a variant."""
    builders = {"smoke": _smoke, "small": _small, "paper": _paper}
    if variant not in builders:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    return builders[variant]()


def _smoke() -> CaptionLlamaConfig:
    """Everything tiny: every part runs, nothing is learnt."""
    optim = OptimConfig(lr=1e-3, warmup_steps=2)
    return CaptionLlamaConfig(
        data=DataConfig(path="world", image_size=16, captions=LONGEST),
        tokenizer=FlexibleTokenizerConfig(
            ch=4, ch_mult=(1, 1, 2), res_blocks=1, attention=False, groups=2, z_channels=4, vocab=16, width=4, patch_nums=(4,)
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=10, batch_size=16, perceptual_weight=0.0, adversarial_weight=0.0, revive_every=5, optim=optim
        ),
        model=LlamaSizesConfig(width=16, depth=2, heads=2, token_dropout=0.0, dropout=0.0, scan_layers=True),
        text=TextEncoderConfig(features=12, width=16, depth=1, heads=2, stride=8),
        model_train=ModelTrainConfig(steps=10, batch_size=16, ema=0.9, optim=optim),
        run=RunConfig(save_every=500, eval_every=500),
    )


def _small() -> CaptionLlamaConfig:
    """The world, or one's own images, at 32 pixels: 64 tokens behind up to 15 features."""
    return CaptionLlamaConfig(
        data=DataConfig(path="world", image_size=32, captions=LONGEST),
        tokenizer=FlexibleTokenizerConfig(
            ch=16,
            ch_mult=(1, 2, 4),
            res_blocks=1,
            attention=False,
            groups=8,
            z_channels=32,
            vocab=256,
            width=8,
            patch_nums=(8,),
            codebook_init=0.1,
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=1500,
            batch_size=32,
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            revive_every=25,
            optim=OptimConfig(lr=1e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, weight_decay=0.0, b2=0.99, clip=1.0),
        ),
        model=LlamaSizesConfig(width=128, depth=4, heads=4, token_dropout=0.0, dropout=0.0),
        text=TextEncoderConfig(features=64, width=64, depth=2, heads=4, stride=8),
        model_train=ModelTrainConfig(
            steps=6000,
            batch_size=32,
            ema=0.998,
            optim=OptimConfig(lr=1.5e-3, warmup_steps=100, schedule="cosine", lr_end=0.05, clip=1.0, no_decay=NO_DECAY),
        ),
        run=RunConfig(save_every=500, eval_every=1000),
    )


def _paper() -> CaptionLlamaConfig:
    """LlamaGen-XL on 50 million captioned images at 256 pixels, bf16, with the constant schedule of the authors' script.

    The script's default of 300 passes is that of ImageNet; here there are four. To use their tokenizer (`vq_ds16_t2i.pt`),
    convert it into the work directory first.
    """
    images = 50_000_000
    optim = OptimConfig(lr=1e-4, schedule="constant", weight_decay=0.05, clip=1.0)
    return CaptionLlamaConfig(
        data=DataConfig(path="laion_coco", image_size=256, channels=3, captions=480, cut_captions=True, workers=8),
        tokenizer=FlexibleTokenizerConfig(vocab=16384, width=8, patch_nums=(16,), dtype="bfloat16"),
        tokenizer_train=TokenizerTrainConfig(
            steps=images // 128, batch_size=128, l1_weight=0.0, adversarial_start=20_000, optim=optim
        ),
        model=LlamaSizesConfig(width=1280, depth=36, heads=20, hidden=3584, scan_layers=True, remat=True, dtype="bfloat16"),
        text=TextEncoderConfig(features=2048, width=1024, depth=8, heads=16, stride=4, dtype="bfloat16"),
        model_train=ModelTrainConfig(steps=4 * images // 256, batch_size=256, optim=optim),
        run=RunConfig(save_every=5000, eval_every=5000),
    )
