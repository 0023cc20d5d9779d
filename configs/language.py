"""A Llama-style language model on bytes: the target that the decoding methods of the text systems are measured on.

    python scripts/train.py --config configs/language.py --variant small --workdir runs/text --set data.path=tinyshakespeare.txt
    python scripts/sample.py --workdir runs/text --prompt "To be, or" --num 3 --out text.txt

Variants: `smoke` (seconds on a CPU), `small` (minutes on a CPU, on Python's own manual unless `data.path` names a text), and
`25m` (25 million weights).
"""

from __future__ import annotations

from jaxgen.data.text import TextConfig
from jaxgen.recipe import Recipe
from jaxgen.recipes.language import LanguageConfig, LanguageModelConfig, LanguageTrainConfig, tiny

VARIANTS = ("smoke", "small", "25m")


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return base(variant).recipe()


def base(variant: str) -> LanguageConfig:
    """The configuration of a variant, which the text systems extend."""
    if variant == "smoke":
        return tiny(LanguageConfig())
    if variant == "small":
        return LanguageConfig()
    if variant == "25m":
        return LanguageConfig(
            data=TextConfig(length=512),
            model=LanguageModelConfig(width=512, heads=8, depth=8, scan_layers=True),
            model_train=LanguageTrainConfig(steps=20000, batch_size=64),
        )
    raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
