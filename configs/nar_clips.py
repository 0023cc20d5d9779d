"""S022 NAR of clips: next-neighbour prediction in space and time (He et al. 2025, arXiv 2503.10696).

    python scripts/train.py --config configs/nar_clips.py --variant small --workdir runs/nar_clips
    python scripts/sample.py --workdir runs/nar_clips --labels 0,1,2 --num 4 --cfg 1 --out clips.gif
    python scripts/claim.py "S022 NAR of clips" --budget smoke --seeds 1

f frames of h x w tokens take f + h + w - 2 calls of the model. NAR of images is `configs/nar.py`, which explains `--cfg`.

Variants: `smoke` (seconds on a CPU), `small` (handwritten digits that move, 4 frames of 16 x 32 pixels, minutes on a CPU),
`films` (the films of an npz file, each a class: `--set data.path=clips.npz`), and `paper`: NAR-L for the 101 classes of UCF-101,
4 x 16 x 16 tokens of 8192 codes. The authors take LARP's tokenizer, which makes these tokens of 16 frames of 128 x 128 pixels;
here a frame is read by itself, so that a clip is every fourth of them. Their models add learned positions, which here turn, and
their MLPs have no gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxgen.data.clips import ClipConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.clip_tokens import ClipLlamaConfig, ClipNeighbourConfig
from jaxgen.recipes.flexible_scales import FlexibleTokenizerConfig
from jaxgen.recipes.neighbours import NeighbourModelConfig, in_raster_order
from jaxgen.recipes.next_scale import ClassifierConfig, ModelTrainConfig
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.train.loop import RunConfig

VARIANTS = ("smoke", "small", "films", "paper")

UCF101_TRAIN = 9537  # clips of the first training list


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> ClipNeighbourConfig:
    """The configuration of a variant."""
    if variant == "paper":
        return _published()
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    smoke, films = variant == "smoke", variant == "films"
    digits = ClipConfig(path="digits", motions=1 if smoke else 16, frames=2 if smoke else 4, height=16, width=32)
    optim = OptimConfig(lr=2e-3, warmup_steps=2 if smoke else 40, schedule="cosine", lr_end=0.05, weight_decay=0.0, clip=1.0)
    return ClipNeighbourConfig(
        data=ClipConfig(path="clips.npz", frames=4, every=4, height=16, width=28) if films else digits,
        tokenizer=FlexibleTokenizerConfig(
            ch=4 if smoke else 16,
            ch_mult=(1, 2, 2),
            res_blocks=1,
            attention=False,
            groups=4,
            z_channels=8 if smoke else 32,
            vocab=16 if smoke else 128,
            width=4 if smoke else 8,
            patch_nums=(4,),
            codebook_init=0.1,
        ),
        tokenizer_train=TokenizerTrainConfig(
            steps=10 if smoke else 1000,
            batch_size=16 if smoke else 64,
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            revive_every=5 if smoke else 25,
            optim=optim,
        ),
        model=NeighbourModelConfig(
            width=16 if smoke else 96,
            depth=1,
            heads=2 if smoke else 4,
            num_classes=2 if films else 10,
            token_dropout=0.1,
            dropout=0.1,
        ),
        model_train=ModelTrainConfig(steps=10 if smoke else 1500, batch_size=16 if smoke else 32, ema=0.98, optim=optim),
        classifier=ClassifierConfig(
            steps=10 if smoke else 400, batch_size=16 if smoke else 128, width=8 if smoke else 16, lr=5e-3
        ),
        run=RunConfig(save_every=500, eval_every=500),
    )


def _published() -> ClipNeighbourConfig:
    """NAR-L (343M) and its schedule: 1000 passes at a batch of 32 clips, 4 of them for the warm-up."""
    epoch = UCF101_TRAIN // 32
    optim = OptimConfig(lr=6e-4, warmup_steps=4 * epoch, schedule="cosine", lr_end=0.01, weight_decay=0.05, b2=0.95)
    return ClipNeighbourConfig(
        data=ClipConfig(path="clips.npz", frames=4, every=4, height=128, width=128, workers=8),
        tokenizer=FlexibleTokenizerConfig(ch_mult=(1, 2, 2, 4), vocab=8192, width=16, patch_nums=(16,), dtype="bfloat16"),
        tokenizer_train=TokenizerTrainConfig(
            steps=100_000, batch_size=128, l1_weight=1.0, l2_weight=0.0, optim=OptimConfig(lr=1e-4)
        ),
        model=NeighbourModelConfig(
            width=1024, depth=24, heads=16, num_classes=101, scan_layers=True, remat=True, dtype="bfloat16"
        ),
        model_train=ModelTrainConfig(steps=1000 * epoch, batch_size=32, optim=optim),
        run=RunConfig(save_every=5000, eval_every=5000),
    )


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S022's claim of clips, measured again: f + h + w - 2 calls against f h w at equal size, data and updates.

    The baseline is the Llama that makes one token a call, with as many blocks and two heads less.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (digits that move).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    ours, smoke = claim_config(build, budget, edits)
    systems = {"S022 NAR, next neighbour": ours, "Llama, next token": in_raster_order(ours, ClipLlamaConfig)}
    title = "Clips in next-neighbour and in raster order; equal blocks, tokenizer, data and updates"
    return [claims.compare_generators(systems, seeds=seeds, samples=100 if smoke else 500, log=log, title=title)]
