"""A next-token system on the same tokenizer, blocks and training as the next-scale one: what S047 is measured against."""

from __future__ import annotations

import dataclasses
import functools

from jax.sharding import PartitionSpec as P

from jaxgen.decoding import Settings
from jaxgen.generators import NextTokenSampler, NextTokenTransformer
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes import next_scale
from jaxgen.recipes.next_scale import NextScaleConfig

__all__ = ["NextTokenConfig", "RULES", "check_one_scale"]

# Classes are one more than a number that devices divide.
RULES = (
    *next_scale.RULES,
    (r"token_embed/embedding", P("tensor", "fsdp")),
    (r"(class_embed/embedding|generator/params/position)$", P(None, "fsdp")),
)


def check_one_scale(patch_nums: tuple[int, ...]) -> None:
    """That a tokenizer has one grid of tokens.

    Raises:
      ValueError: none, or several.
    """
    if len(patch_nums) != 1:
        raise ValueError(f"tokenizer.patch_nums={patch_nums}: next-token models take one scale")


@dataclasses.dataclass(frozen=True)
class NextTokenConfig(NextScaleConfig):
    """`NextScaleConfig` with one scale, whose tokens come one by one in raster order."""

    def __post_init__(self):
        check_one_scale(self.tokenizer.patch_nums)
        if self.model.shared_adaln:
            raise ValueError("model.shared_adaln=True: next-token models have one modulation a block")

    @property
    def rules(self) -> tuple:
        """See `NextScaleConfig.rules`."""
        return RULES

    def _generator_fields(self) -> dict:
        fields = super()._generator_fields() | dict(length=self.build_tokenizer().order.length)
        return {name: value for name, value in fields.items() if name != "shared_adaln"}

    def build_generator(self) -> NextTokenTransformer:
        """The generator module."""
        return NextTokenTransformer(**self._generator_fields())

    def build_sampler(self) -> NextTokenSampler:
        """From key and labels to images."""
        return NextTokenSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def teacher_inputs(self, tokenizer, variables, tokens):
        """The tokens themselves; the model shifts them."""
        return tokens

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        return dataclasses.replace(super().recipe(), sample=functools.partial(_sample, self.build_sampler()))


def _sample(sampler: NextTokenSampler, params, key, labels, **settings) -> dict:
    images, tokens = sampler(modules(params), key, labels, Settings(**settings))
    return {"images": images, "tokens": tokens}
