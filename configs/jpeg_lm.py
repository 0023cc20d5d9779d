"""S016 JPEG-LM: a plain Llama on the bytes of JPEG files (Han et al. 2024, arXiv 2408.08459).

    python scripts/train.py --config configs/jpeg_lm.py --variant small --workdir runs/jpeg
    python scripts/sample.py --workdir runs/jpeg --labels 0,1,2 --num 8 --cfg 0 --top_p 0.9 --out grid.png

Files have one quality, the standard's tables and no metadata, and the model sees what differs between them. Sampling keeps to
the grammar of JPEG, so that every sample is a whole file; `--option constrained=False` lets go of it. AVC-LM is
`configs/avc_lm.py`.

Variants: `smoke` (seconds on a CPU), `small` (scikit-learn's digits at quality 10, some 13 bytes each, minutes on a CPU), `mnist`
(28 pixels, from `data.path`), and `paper`: Llama 2 7B on images of 256 pixels at quality 25, 4:2:0, with a restart marker behind
every unit, 12,288 tokens. A token of `paper` is a byte or one of 64 byte pairs, as in the paper, which are learnt from the first
training files (`codec.merges`, 0 for the others). The paper's images have no classes. The schedule of `paper` is Llama 2's at its
batch, since the paper's own tables were not to be had. Images of one's own: set `model.num_classes`, `codec.size=0` and
`codec.length`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen.data import DataConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.byte_image_claims import compare_files
from jaxgen.recipes.byte_images import ByteImageConfig, CodecConfig
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.flexible_scales import FlexibleTokenizerConfig
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig
from jaxgen.recipes.next_scale import ClassifierConfig, ModelTrainConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "mnist", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> ByteImageConfig:
    """The configuration of a variant."""
    if variant == "paper":
        return _published()
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    smoke = variant == "smoke"
    optim = OptimConfig(lr=2e-3, warmup_steps=2 if smoke else 40, schedule="cosine", lr_end=0.05, clip=1.0)
    small = ByteImageConfig(
        data=DataConfig(path="digits", channels=1),
        codec=CodecConfig(length=24, size=8, quality=10),
        model=ImageLlamaModelConfig(
            width=16 if smoke else 96, depth=2 if smoke else 3, heads=2 if smoke else 4, token_dropout=0.1, dropout=0.1
        ),
        model_train=ModelTrainConfig(steps=10 if smoke else 800, batch_size=16 if smoke else 64, ema=0.98, optim=optim),
        classifier=ClassifierConfig(steps=10 if smoke else 150, batch_size=16 if smoke else 128, width=8, lr=5e-3),
        run=RunConfig(save_every=500, eval_every=500),
    )
    if variant != "mnist":
        return small
    return dataclasses.replace(
        small,
        data=DataConfig(path="mnist.npz", channels=1),
        codec=CodecConfig(length=256, quality=25, restart=1),
        model=ImageLlamaModelConfig(width=384, depth=8, heads=6),
        model_train=ModelTrainConfig(
            steps=20_000, batch_size=64, ema=0.999, optim=dataclasses.replace(optim, lr=6e-4, warmup_steps=500)
        ),
        classifier=ClassifierConfig(steps=1500, width=32),
        run=RunConfig(save_every=1000, eval_every=1000),
    )


def _published() -> ByteImageConfig:
    """Llama 2 7B, 512 files a batch."""
    return ByteImageConfig(
        data=DataConfig(path="imagenet", image_size=256, channels=3, workers=8),
        codec=CodecConfig(length=12288, merges=64, size=256, quality=25, restart=1, header="frame"),
        model=ImageLlamaModelConfig(
            width=4096,
            depth=32,
            heads=32,
            hidden=11008,
            num_classes=1000,
            token_dropout=0.0,
            dropout=0.0,
            scan_layers=True,
            remat=True,
            dtype="bfloat16",
        ),
        model_train=ModelTrainConfig(
            steps=100_000,
            batch_size=512,
            optim=OptimConfig(lr=3e-4, warmup_steps=2000, schedule="cosine", lr_end=0.1, weight_decay=0.1, b2=0.95, clip=1.0),
        ),
        run=RunConfig(save_every=5000, eval_every=5000),
    )


def in_codes(config: ByteImageConfig, *, smoke: bool) -> ImageLlamaConfig:
    """The same Llama and training on the codes of a VQ tokenizer that halves each side."""
    side = (config.codec.size or config.data.image_size) // 2
    optim = OptimConfig(lr=2e-3, warmup_steps=2 if smoke else 40, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0)
    return ImageLlamaConfig(
        data=config.data,
        tokenizer=FlexibleTokenizerConfig(
            ch=8,
            ch_mult=(1, 2),
            res_blocks=1,
            attention=False,
            groups=4,
            z_channels=16,
            vocab=16 if smoke else 128,
            width=4,
            patch_nums=(side,),
            codebook_init=0.1,
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=10 if smoke else 400,
            batch_size=16 if smoke else 64,
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            revive_every=5 if smoke else 25,
            optim=optim,
        ),
        model=config.model,
        model_train=config.model_train,
        classifier=config.classifier,
        run=config.run,
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S016's claims, measured again: the share of valid files, and quality and rare detail against pixels and VQ codes.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits)
    samples = 100 if smoke else 500
    return [compare_files(config, in_codes(config, smoke=smoke), seeds=seeds, samples=samples, log=log)]
