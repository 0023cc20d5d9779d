"""S016 AVC-LM: a plain Llama on the bytes of H.264 streams, short clips (Han et al. 2024, arXiv 2408.08459).

    python scripts/train.py --config configs/avc_lm.py --variant small --workdir runs/avc
    python scripts/sample.py --workdir runs/avc --labels 0,1,2 --num 4 --cfg 0 --top_p 0.9 --out clips.gif --files samples/
    python scripts/claim.py "S016 AVC-LM" --budget smoke --seeds 1

Needs PyAV (`pip install 'jaxgen[video]'`). Streams have one quantiser, a baseline profile whose macroblocks are predicted as a
whole, and no metadata, and the model sees what differs between them. Sampling keeps to the whole syntax, down to the bits of
CAVLC's codes (`jaxgen.decoding.H264Grammar`): a decoder reads every sample, of any weights, without an error. `--option
constrained=False` lets go of it; what is then not valid is shown grey and saved as raw bytes (`.bin`), though readers make up
what is missing in much of it.

Variants: `smoke` (seconds on a CPU), `small` (handwritten digits that move, 4 frames of 16 x 32 pixels, 16 motions of each),
`films` (the films of an npz file, each a class: `--set data.path=clips.npz`), and `paper`: Llama 2 7B on 15 frames of 144 x 256
pixels, of 3 a second (of films with 24), at quantiser 37, with 768 byte pairs beside the bytes (`codec.merges`) and no classes. A
slice for each macroblock, the vocabulary and the window of 32,768 tokens are as a reproduction of the paper has them, and the
schedule is Llama 2's, since the paper's own tables were not to be had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import jpeg_lm, nar_clips
from jaxgen.data.clips import ClipConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.byte_clip_claims import compare_clips
from jaxgen.recipes.byte_clips import ByteClipConfig, ClipCodecConfig
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.clip_tokens import ClipLlamaConfig

VARIANTS = ("smoke", "small", "films", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant, or PyAV is not installed.
    """
    return build(variant).recipe()


def build(variant: str) -> ByteClipConfig:
    """The configuration of a variant."""
    if variant == "paper":
        return _published()
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    smoke = variant == "smoke"
    images = jpeg_lm.build("smoke" if smoke else "small")
    small = ByteClipConfig(
        data=ClipConfig(path="digits", motions=1 if smoke else 16, frames=2 if smoke else 4),
        codec=ClipCodecConfig(length=96 if smoke else 160, quantiser=40),
        model=images.model,
        model_train=images.model_train if smoke else dataclasses.replace(images.model_train, steps=1500, batch_size=32),
        classifier=nar_clips.build("smoke" if smoke else "small").classifier,
        run=images.run,
    )
    if variant != "films":
        return small
    return dataclasses.replace(
        small,
        data=ClipConfig(path="clips.npz", frames=4, every=4, height=16, width=28),
        codec=ClipCodecConfig(length=224, quantiser=42),
        model=dataclasses.replace(small.model, num_classes=2),
    )


def _published() -> ByteClipConfig:
    """The Llama 2 7B of `jpeg_lm`, a clip of five seconds a row."""
    images = jpeg_lm.build("paper")
    return ByteClipConfig(
        data=ClipConfig(path="clips.npz", labelled=False, frames=15, every=8, height=144, width=256, workers=8),
        codec=ClipCodecConfig(length=32768, merges=768, quantiser=37, restart=1),
        model=dataclasses.replace(images.model, num_classes=1),
        model_train=dataclasses.replace(images.model_train, batch_size=128),
        run=images.run,
    )


def in_codes(config: ByteClipConfig, *, smoke: bool) -> ClipLlamaConfig:
    """The same Llama and training on the codes of a VQ tokenizer of frames, one for 4 x 4 pixels."""
    base = nar_clips.build("smoke" if smoke else "small")
    tokenizer = dataclasses.replace(base.tokenizer, patch_nums=(config.data.height // 4,))
    parts = dict(model=config.model, model_train=config.model_train, classifier=config.classifier, run=config.run)
    return ClipLlamaConfig(data=config.data, tokenizer=tokenizer, tokenizer_train=base.tokenizer_train, **parts)


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S016's claims of clips, measured again: the share of valid ones with the grammar and without it, and quality against codes.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (digits that move).
      seeds: trainings.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    config, smoke = claim_config(build, budget, edits)
    codes = in_codes(config, smoke=smoke)
    return [compare_clips(config, codes, seeds=seeds, samples=50 if smoke else 300, log=log)]
