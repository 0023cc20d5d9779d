"""Full-view prompts as a recipe (S018 VF prompt): that of the Llama of image tokens, with a prompt before the image."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxgen import config as config_lib
from jaxgen.data import make_source, pixels
from jaxgen.decoding import Settings
from jaxgen.generators import ClassCodes, PromptedLlama, PromptedSampler
from jaxgen.generators.prompted_llama import check_prompt_fields
from jaxgen.objectives.likelihood import drop_labels
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig
from jaxgen.recipes.next_scale import likelihoods
from jaxgen.recipes.retrieval import images_of
from jaxgen.recipes.token_cache import check_no_cache

__all__ = ["PromptedConfig", "PromptedModelConfig", "class_prompt_stage", "compare_prompts", "unprompted"]


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
    """Everything that defines a run. `recipe()` builds it.

    Attributes:
      class_images: training images that prompts of the kind "class" are drawn from, at most; they are kept as tokens.

    Raises:
      ValueError: a prompt of the kind "class" that is not as long as an image, or with a token cache, or fewer than two images.
    """

    model: PromptedModelConfig = PromptedModelConfig()
    class_images: int = 100_000

    def __post_init__(self):
        super().__post_init__()
        if self.class_images < 2:
            raise ValueError(f"class_images={self.class_images}: expected at least 2")
        if self.by_class:
            check_no_cache(self.data, "prompts of the kind 'class' are images of the class")
            self.build_generator()

    @property
    def by_class(self) -> bool:
        """Whether prompts are images of the class."""
        return self.model.prompt == "class"

    def build_generator(self) -> PromptedLlama:
        """The generator module."""
        return PromptedLlama(**self._generator_fields())

    def build_sampler(self) -> PromptedSampler:
        """From key and labels to images."""
        return PromptedSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def build_prompts(self, variables: Mapping[str, Any]) -> ClassCodes:
        """What prompts of the kind "class" are drawn from.

        Args:
          variables: by module, the tokenizer's among them.

        Raises:
          ValueError: a class with fewer than two images.
        """
        tokenizer, tokens, labels = self.build_tokenizer(), [], []
        for images, own in images_of(self.data, (), self.class_images):
            tokens.append(_encoded(tokenizer, variables["tokenizer"], images))
            labels.append(own)
        labels = np.concatenate(labels)
        places = np.argsort(labels, kind="stable")
        return ClassCodes.of(jnp.concatenate(tokens)[places], labels[places], self.num_classes)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        if not self.by_class:
            return base
        stages = (class_prompt_stage(self, stage) if stage.name == "generator" else stage for stage in base.stages)
        return dataclasses.replace(base, stages=tuple(stages), sample=functools.partial(_sample, self, {}))


@functools.partial(jax.jit, static_argnums=0)
def _encoded(tokenizer, variables, images) -> Int[Array, "b l"]:
    return tokenizer.apply(variables, pixels(images), method="encode")


def class_prompt_stage(config: PromptedConfig, base: Stage) -> Stage:
    """Maximum likelihood of an image's tokens after those of another image of its class, drawn anew in each update.

    The images are what the stage keeps beside its parameters; whoever samples encodes them again. They are as held-out ones are
    prepared: where training flips or crops, an image may meet another view of itself.
    """
    train, tokenizer, generator = config.model_train, config.build_tokenizer(), config.build_generator()

    def init(key, frozen):
        cond, tokens = (jnp.zeros((1, n), jnp.int32) for n in (1 + generator.prompts, generator.length))
        count = min(len(make_source(config.data, "train")), config.class_images)
        blank = ClassCodes(*(jnp.zeros(n, jnp.int32) for n in ((count, generator.length), *(generator.num_classes + 1,) * 2)))
        return {"generator": generator.init(key, cond, tokens)}, blank

    def read(batch, labels, prompts, key, frozen):
        """(Labels with prompts, tokens)."""
        tokens = tokenizer.apply(modules(frozen)["tokenizer"], pixels(batch["image"]), method="encode")
        return jnp.concatenate([labels[:, None], prompts.draw(key, labels, tokens)], axis=1), tokens

    def loss(params, prompts, batch, key, step, frozen):
        drop_key, path_key, prompt_key = jax.random.split(key, 3)
        labels = drop_labels(drop_key, batch["label"], generator.num_classes, train.class_drop)
        cond, tokens = read(batch, labels, prompts, prompt_key, frozen)

        def predict(tokens):
            return generator.apply(params["generator"], cond, tokens, train=True, rngs={"dropout": path_key})

        value, metrics = config.objective(predict, tokens, tokens, step)
        return value, (metrics, prompts)

    def eval_loss(params, prompts, batch, key, frozen):
        cond, tokens = read(batch, batch["label"], prompts, key, frozen)
        metrics = likelihoods(generator.apply(params["generator"], cond, tokens), tokens, last=1)
        return {"loss": metrics["nll"], **metrics}

    def fill(frozen):
        return config.build_prompts(modules(frozen))

    return dataclasses.replace(base, init=init, fill=fill, loss=loss, eval_loss=eval_loss)


def _sample(config: PromptedConfig, kept: dict, params, key, labels, *, prompts: ClassCodes | None = None, **settings) -> dict:
    """`NextTokenConfig`'s, with prompts from `prompts`; None is the training images, encoded once for a tokenizer."""
    variables = modules(params)
    if prompts is None:
        if kept.get("tokenizer") is not variables["tokenizer"]:
            kept.update(tokenizer=variables["tokenizer"], prompts=config.build_prompts(variables))
        prompts = kept["prompts"]
    images, tokens = config.build_sampler()(variables | {"prompts": prompts}, key, labels, Settings(**settings))
    return {"images": images, "tokens": tokens}


def unprompted(config: PromptedConfig) -> ImageLlamaConfig:
    """The Llama of the same data, tokenizer, sizes and training without a prompt."""
    model = ImageLlamaModelConfig(**config_lib.fields_of(config.model, ImageLlamaModelConfig))
    return ImageLlamaConfig(**config_lib.fields_of(config, ImageLlamaConfig) | dict(model=model))


def compare_prompts(config: PromptedConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """Likelihood, quality and cost with each kind of prompt, and without any.

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
        "S018 VF prompt, an image of the class": kind("class"),
        "LlamaGen, no prompt": unprompted(config),
    }
    title = "Full-view prompts against none at equal blocks, data and training budget"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=_columns, title=title)
    notes = (
        "The likelihood under a prompt of random codes, or of an image of the class, is that of one draw for each test image. "
        "Encoding the training images that prompts are drawn from is not counted."
    )
    return claim._replace(notes=f"{claim.notes} {notes}")


def _columns(recipe: Recipe, params: Mapping) -> dict:
    row = {"vectors before the image": recipe.config.build_generator().told}
    if not getattr(recipe.config, "by_class", False):
        return row | {"test nats a token": round(claims.test_nats(recipe, params), 4)}
    prompts = recipe.config.build_prompts(modules(params))
    given = dataclasses.replace(recipe, sample=functools.partial(recipe.sample, prompts=prompts))
    row["test nats a token"] = round(claims.test_nats(recipe, params, prompts), 4)
    return row | claims.sampling_costs(given, params)
