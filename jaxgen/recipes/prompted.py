"""Full-view prompts as a recipe (S018 VF prompt): that of the Llama of image tokens, with a prompt before the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxgen import config as config_lib
from jaxgen.generators import PromptedLlama, PromptedSampler
from jaxgen.generators.prompted_llama import check_prompt_fields
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig

__all__ = ["PromptedConfig", "PromptedModelConfig", "compare_prompts", "unprompted"]


@dataclasses.dataclass(frozen=True)
class PromptedModelConfig(ImageLlamaModelConfig):
    """Sizes of `PromptedLlama`; `prompts` and `prompt` are explained there."""

    prompts: int = 256
    prompt: str = "learned"

    def __post_init__(self):
        super().__post_init__()
        check_prompt_fields(self.prompts, self.prompt)


@dataclasses.dataclass(frozen=True)
class PromptedConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it."""

    model: PromptedModelConfig = PromptedModelConfig()

    def build_generator(self) -> PromptedLlama:
        """The generator module."""
        return PromptedLlama(**self._generator_fields())

    def build_sampler(self) -> PromptedSampler:
        """From key and labels to images."""
        return PromptedSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())


def unprompted(config: PromptedConfig) -> ImageLlamaConfig:
    """The Llama of the same data, tokenizer, sizes and training without a prompt."""
    model = ImageLlamaModelConfig(**config_lib.fields_of(config.model, ImageLlamaModelConfig))
    return ImageLlamaConfig(**config_lib.fields_of(config) | dict(model=model))


def compare_prompts(config: PromptedConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """Likelihood, quality and cost with a learned prompt, with one of random codes, and without any.

    Args:
      config: of the prompted systems, whatever its kind of prompt.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
    """

    def kind(name: str) -> PromptedConfig:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, prompt=name))

    systems = {
        "S018 VF prompt, learned": kind("learned"),
        "S018 VF prompt, random codes": kind("codes"),
        "LlamaGen, no prompt": unprompted(config),
    }
    title = "Full-view prompts against none at equal blocks, data and training budget"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=_columns, title=title)
    notes = "The likelihood under a prompt of random codes is that of one draw for each test image."
    return claim._replace(notes=f"{claim.notes} {notes}")


def _columns(recipe, params) -> dict:
    told = recipe.config.build_generator().told
    return {"vectors before the image": told, "test nats a token": round(claims.test_nats(recipe, params), 4)}
