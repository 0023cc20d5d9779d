"""S132 SpecVLM: speculative captions, drafted from compressed visual tokens (Huang et al. 2025, arXiv 2509.11815).

    python scripts/train.py --config configs/spec_vlm.py --variant mnist --workdir runs/vlm --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/vlm --prompt "describe: " --num 3 --length 100 --out text.txt

Pictures are rows of handwritten digits, and prompts are questions about them (`jaxgen.data.digit_captions.QUESTIONS`), which
`sample.py` asks about the first held-out ones. Variants: `smoke`, `small` (8 x 8 digits, 16 visual tokens), `mnist` (28 x 28
digits, 64 visual tokens), and `paper` (the language model of LLaVA-1.6-7B, and 576 visual tokens, as many as its encoder makes
of a tile).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxgen import config as config_lib
from jaxgen.data.digit_captions import DigitCaptionConfig
from jaxgen.optim import OptimConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes import spec_vlm_claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.language import LanguageTrainConfig
from jaxgen.recipes.spec_vlm import CompressorConfig, SpecVLMConfig, TreeConfig, VisionModelConfig

VARIANTS = ("smoke", "small", "mnist", "paper")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return _config(variant).recipe()


def _config(variant: str) -> SpecVLMConfig:
    if variant == "smoke":
        optim = dataclasses.replace(SpecVLMConfig().model_train.optim, warmup_steps=2)
        train = LanguageTrainConfig(steps=4, batch_size=4, optim=optim)
        model = VisionModelConfig(width=32, heads=2, depth=2, channels=(4, 8))
        return SpecVLMConfig(model=model, model_train=train, drafter_train=train, tree=TreeConfig(drafts=5, height=3, beam=2))
    if variant == "small":
        return SpecVLMConfig()
    if variant == "mnist":
        return SpecVLMConfig(data=DigitCaptionConfig(cell=32), model=VisionModelConfig(channels=(16, 32, 64)))
    if variant == "paper":
        optim = OptimConfig(lr=3e-5, warmup_steps=2000, schedule="lin0", b1=0.9, b2=0.95, clip=0.5)
        return SpecVLMConfig(
            data=DigitCaptionConfig(digits=1, cell=384, length=2048),
            model=VisionModelConfig(
                vocab=32000,
                width=4096,
                heads=32,
                depth=32,
                hidden=11008,
                channels=(128, 256, 512, 1024),
                scan_layers=True,
                dtype="bfloat16",
            ),
            model_train=LanguageTrainConfig(steps=0),
            compressor=CompressorConfig(heads=32),
            drafter_train=LanguageTrainConfig(steps=200_000, batch_size=16, optim=optim),
            tree=TreeConfig(drafts=59, height=6, beam=10),
        )
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")


def claim(budget: str = "small", *, seeds: int = 1, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S132's claims, measured again: a tree of drafts against chains and plain sampling, and what each compression costs.

    Args:
      budget: "smoke" (nothing is learnt), "small" or "mnist".
      seeds: of the drafters' training; the target is trained once.
      edits: of the configuration.
      log: takes progress lines.
    """
    if budget not in ("smoke", "small", "mnist"):
        raise ValueError(f"budget {budget!r} is not one of smoke, small, mnist")
    config = config_lib.override(_config(budget), edits).resolve()
    return [spec_vlm_claims.compare_compressions(config, seeds=seeds, count=4 if budget == "smoke" else 64, log=log)]
