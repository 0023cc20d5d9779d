"""Next-token systems whose tokens may be the pixels themselves: no tokenizer is trained then."""

from __future__ import annotations

import dataclasses

from jaxgen.recipe import Recipe
from jaxgen.recipes.next_token import NextTokenConfig
from jaxgen.tokenizers import MultiScaleTokenizer, PixelTokenizer

__all__ = ["PixelConfig"]


@dataclasses.dataclass(frozen=True)
class PixelConfig(NextTokenConfig):
    """`NextTokenConfig` of a tokenizer's tokens, or of pixels.

    Attributes:
      levels: values of a pixel, see `PixelTokenizer`; `tokenizer.patch_nums` is then the side of the images, and nothing else of
        the tokenizer matters. 0 is a tokenizer.

    Raises:
      ValueError: one level, or less than none, or see `NextTokenConfig`.
    """

    levels: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.levels == 1 or self.levels < 0:
            raise ValueError(f"levels={self.levels}: expected 0, or at least 2")

    def build_tokenizer(self) -> MultiScaleTokenizer | PixelTokenizer:
        """The tokenizer module."""
        if not self.levels:
            return super().build_tokenizer()
        return PixelTokenizer(channels=self.data.channels, size=self.tokenizer.patch_nums * 2, levels=self.levels)

    def _generator_fields(self) -> dict:
        return super()._generator_fields() | dict(vocab=self.build_tokenizer().vocab)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        if not self.levels:
            return base
        stages = (dataclasses.replace(stage, needs=()) for stage in base.stages if stage.name != "tokenizer")
        return dataclasses.replace(base, stages=tuple(stages))
