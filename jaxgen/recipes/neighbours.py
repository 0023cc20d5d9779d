"""Next-neighbour prediction as a recipe (S022 NAR): that of the Llama of image tokens, with another order and more heads."""

from __future__ import annotations

import dataclasses

from jaxgen import config as config_lib
from jaxgen.generators import NeighbourLlama
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig

__all__ = ["NeighbourConfig", "NeighbourModelConfig", "in_raster_order"]


@dataclasses.dataclass(frozen=True)
class NeighbourModelConfig(ImageLlamaModelConfig):
    """Sizes of `NeighbourLlama`; `depth` counts the blocks before the first head."""

    head_depth: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, head_depth=1)


@dataclasses.dataclass(frozen=True)
class NeighbourConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it."""

    model: NeighbourModelConfig = NeighbourModelConfig()

    def build_generator(self) -> NeighbourLlama:
        """The generator module."""
        return NeighbourLlama(**self._generator_fields())


def in_raster_order(config: NeighbourConfig, cls: type[ImageLlamaConfig] = ImageLlamaConfig) -> ImageLlamaConfig:
    """The Llama of the same data, tokenizer, training and number of blocks that makes one token a call.

    Args:
      config: of the other order.
      cls: of the result, for the same data.
    """
    model = config_lib.fields_of(config.model, ImageLlamaModelConfig)
    model["depth"] = config.build_generator().layers
    return cls(**config_lib.fields_of(config) | dict(model=ImageLlamaModelConfig(**model)))
