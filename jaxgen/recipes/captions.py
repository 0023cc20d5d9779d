"""Images of captions: the Llama of image tokens with a text encoder that is trained along (LlamaGen's models of text)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgen.data.captions import Captioned, caption_array
from jaxgen.decoding import Settings
from jaxgen.generators import ImageLlama
from jaxgen.nn import Context, TextEncoder
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig, LlamaSizesConfig

__all__ = ["CaptionLlamaConfig", "TextEncoderConfig"]

TEXT_RULES = (
    (r"text/.*qkv/kernel", P("fsdp", None, "tensor", None)),
    (r"text/.*proj/kernel", P("tensor", None, "fsdp")),
    (r"text/.*fc1/kernel", P("fsdp", "tensor")),
    (r"text/.*fc2/kernel", P("tensor", "fsdp")),
    (r"text/.*join/kernel", P("fsdp", "tensor")),
    (r"text/", P()),
)


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of `TextEncoder`, which reads captions of `data.captions` bytes."""

    features: int = 256
    width: int = 256
    depth: int = 2
    heads: int = 4
    stride: int = 4
    dtype: str = "float32"

    def __post_init__(self):
        check_fields("text", self, features=1, width=1, depth=1, heads=1, stride=1)
        check_dtype("text", self.dtype)
        if self.width % self.heads:
            raise ValueError(f"text.heads={self.heads} does not divide text.width={self.width}")


@dataclasses.dataclass(frozen=True)
class CaptionLlamaConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it. Whatever classes the data have are not read."""

    model: LlamaSizesConfig = LlamaSizesConfig()
    text: TextEncoderConfig = TextEncoderConfig()

    def __post_init__(self):
        super().__post_init__()
        if not self.data.captions or self.data.captions % self.text.stride:
            raise ValueError(
                f"data.captions={self.data.captions}: expected the bytes of the longest caption, a multiple of "
                f"text.stride={self.text.stride}"
            )
        if self.classifier.steps:
            raise ValueError(f"classifier.steps={self.classifier.steps}: samples of captions have no classes to be judged by")

    def resolve(self) -> CaptionLlamaConfig:
        """The configuration as it is.

        Raises:
          ValueError: the data cannot be read, have no captions, or images of another size than the tokenizer's.
        """
        Captioned(self.checked_source(), self.data.captions)
        return self

    @property
    def num_classes(self) -> int:
        """None are read."""
        return 0

    @property
    def rules(self) -> tuple:
        """See `NextScaleConfig.rules`."""
        return (*TEXT_RULES, *super().rules)

    def build_text(self) -> TextEncoder:
        """From captions to what the generator is told."""
        return TextEncoder(**dataclasses.asdict(self.text) | dict(length=self.data.captions, dtype=jnp.dtype(self.text.dtype)))

    def build_generator(self) -> ImageLlama:
        """The generator module."""
        return ImageLlama(**self._generator_fields(), caption_width=self.text.features, prefix=self.build_text().positions)

    def init_generator(self, key, inputs) -> dict[str, Any]:
        """See `NextScaleConfig`; the text encoder's are "text"."""
        text_key, key = jax.random.split(key)
        words, text = self.build_text().init_with_output(text_key, jnp.ones((1, self.data.captions), jnp.uint8))
        return {"generator": self.build_generator().init(key, words, inputs), "text": text}

    def condition(self, params: Mapping[str, Any], batch: Mapping[str, Any], key=None) -> Context:
        """See `NextScaleConfig`; the features of captions."""
        words = self.build_text().apply(params["text"], batch["caption"])
        if key is None:
            return words
        rows = jax.random.bernoulli(key, self.model_train.class_drop, words.mask.shape[:1])
        return self.build_generator().apply(params["generator"], words, rows, method="drop")

    def recipe(self) -> Recipe:
        """The stages, the sampler and what reads prompts."""
        prompts = functools.partial(caption_array, length=self.data.captions)
        return dataclasses.replace(super().recipe(), sample=functools.partial(_sample, self), prompts=prompts)


def _sample(config: CaptionLlamaConfig, params, key, captions, **settings) -> dict:
    """Images of captions, uint8 [b, n] as from `Recipe.prompts`; settings are those of `jaxgen.decoding.Settings`."""
    variables = modules(params)
    words = _read(config.build_text(), variables["text"], captions)
    images, tokens = config.build_sampler()(variables, key, words, Settings(**settings))
    return {"images": images, "tokens": tokens}


@functools.partial(jax.jit, static_argnums=0)
def _read(text: TextEncoder, variables, captions) -> Context:
    return text.apply(variables, captions)
