"""The Llama of image tokens as a recipe (LlamaGen): a VQ tokenizer of one grid, then a Llama of its tokens in raster order."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgen import config as config_lib
from jaxgen.data import DataConfig
from jaxgen.generators import ImageLlama
from jaxgen.recipes import language
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.flexible_scales import FlexibleTokenizerConfig
from jaxgen.recipes.next_scale import ModelTrainConfig
from jaxgen.recipes.next_token import NextTokenConfig, check_one_scale
from jaxgen.recipes.tokenizer import TokenizerTrainConfig
from jaxgen.tokenizers import FlexibleTokenizer

__all__ = ["ImageLlamaConfig", "ImageLlamaModelConfig", "LlamaSizesConfig", "RULES", "config_of"]

# Classes are one more than a number that devices divide.
RULES = (
    (r"class_embed", P(None, "fsdp")),
    *language.RULES,
    (r"(heads_before_\d+|join|caption_fc\d)/kernel", P("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class LlamaSizesConfig:
    """Sizes of an `ImageLlama`, whose vocabulary and grid are the tokenizer's, whatever it is told."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    kv_heads: int = 0
    hidden: int = 0
    theta: float = 10000.0
    token_dropout: float = 0.1
    dropout: float = 0.1
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(width=1, depth=1, heads=1, kv_heads=0, hidden=0, theta=1)
        check_fields("model", self, **sizes, shares=("token_dropout", "dropout"))
        check_dtype("model", self.dtype)
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"model.heads={self.heads}: width {self.width} is not so many heads of a multiple of 4 numbers")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")


@dataclasses.dataclass(frozen=True)
class ImageLlamaModelConfig(LlamaSizesConfig):
    """Sizes of an `ImageLlama` of classes."""

    num_classes: int = 10

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, num_classes=1)


@dataclasses.dataclass(frozen=True)
class ImageLlamaConfig(NextTokenConfig):
    """Everything that defines a run. `recipe()` builds it."""

    tokenizer: FlexibleTokenizerConfig = FlexibleTokenizerConfig(vocab=16384, width=8, patch_nums=(16,))
    model: ImageLlamaModelConfig = ImageLlamaModelConfig()

    def __post_init__(self):
        check_one_scale(self.tokenizer.patch_nums)

    def build_tokenizer(self) -> FlexibleTokenizer:
        """The tokenizer module."""
        return self.tokenizer.build(self.data.channels)

    @property
    def rules(self) -> tuple:
        """See `NextScaleConfig.rules`."""
        return RULES

    def build_generator(self) -> ImageLlama:
        """The generator module."""
        return ImageLlama(**self._generator_fields())

    def _generator_fields(self) -> dict:
        fields = dict(vocab=self.tokenizer.vocab, grid=self.tokenizer.patch_nums[0], dtype=jnp.dtype(self.model.dtype))
        return dataclasses.asdict(self.model) | fields


def config_of(
    generator: ImageLlama, tokenizer: FlexibleTokenizer, cls: type[ImageLlamaConfig] = ImageLlamaConfig
) -> ImageLlamaConfig:
    """The configuration of modules that exist already, with nothing left to train.

    Args:
      generator: of the class that `cls` builds.
      tokenizer: of its grid.
      cls: `ImageLlamaConfig`, or one whose model has fields of its own.

    Raises:
      ValueError: a model of captions, whose features come from elsewhere.
    """
    if not generator.num_classes:
        raise ValueError(
            f"caption_width={generator.caption_width}: the files of a model of captions leave out what makes features of them, "
            "which a work directory would need; jaxgen.interop takes the features"
        )

    def fields(config, module):
        return type(config)(**config_lib.fields_of(module, type(config)) | dict(dtype=jnp.dtype(module.dtype).name))

    default = cls()
    return cls(
        data=DataConfig(image_size=tokenizer.image_size[0], channels=tokenizer.channels),
        tokenizer=fields(default.tokenizer, tokenizer),
        tokenizer_train=TokenizerTrainConfig(steps=0, adversarial_weight=0.0),
        model=fields(default.model, generator),
        model_train=ModelTrainConfig(steps=0),
    )
