"""S029 ARRA as a recipe: the Llama of image tokens, trained to know the whole image as an encoder does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxgen import config as config_lib
from jaxgen.data import pixels
from jaxgen.generators import AlignedLlama
from jaxgen.objectives.alignment import cosine_distance
from jaxgen.objectives.likelihood import drop_labels
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig, feature_stage, image_features
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.token_cache import check_no_cache

__all__ = ["AlignConfig", "AlignedConfig", "Describe", "aligned_stage", "unaligned"]

Describe = Callable[[Mapping[str, Any], Float[Array, "b H W C"]], Float[Array, "b c"]]
"""From the variables of the frozen modules by name and images in [-1, 1] to features of the whole images."""


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """How much the whole image counts.

    Attributes:
      weight: of the mean of 1 - cos(what a position says, what the encoder says), beside the likelihood.
      after: blocks before the hidden states that are compared.
    """

    weight: float = 1.0
    after: int = 1

    def __post_init__(self):
        check_fields("align", self, weight=0, after=1)


@dataclasses.dataclass(frozen=True)
class AlignedConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it."""

    features: FeatureConfig = FeatureConfig()
    features_train: FeatureTrainConfig = FeatureTrainConfig()
    align: AlignConfig = AlignConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.align.after > self.model.depth:
            raise ValueError(f"align.after={self.align.after}: the model has model.depth={self.model.depth} blocks")
        if self.model.scan_layers:
            raise ValueError("model.scan_layers=True: hidden states between blocks need unrolled ones")

    def build_generator(self) -> AlignedLlama:
        """The generator module."""
        return AlignedLlama(**self._generator_fields(), align_width=self.features.width, align_after=self.align.after)

    def describe(self, variables: Mapping[str, Any], images: Float[Array, "b H W C"]) -> Float[Array, "b c"]:
        """What the frozen encoder says of whole images."""
        return image_features(self.features, variables["encoder"], images)[:, 0]

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        check_no_cache(self.data, "hidden states are aligned with the features of images")
        base = super().recipe()
        encoder = feature_stage(self.features, self.features_train, self.data)
        stages = []
        for stage in base.stages:
            stages += [encoder, aligned_stage(self, stage, self.describe)] if stage.name == "generator" else [stage]
        return dataclasses.replace(base, stages=tuple(stages))


def aligned_stage(config: AlignedConfig, base: Stage, describe: Describe, *, needs: tuple[str, ...] = ("encoder",)) -> Stage:
    """The training of the generator with the distance from an encoder's features beside its likelihood.

    Args:
      config: of the generator.
      base: the training without it.
      describe: the encoder, any callable; no gradient passes.
      needs: stages whose modules it reads.
    """
    tokenizer, generator, train = config.build_tokenizer(), config.build_generator(), config.model_train

    def loss(params, state, batch, key, step, frozen):
        drop_key, path_key = jax.random.split(key)
        labels = drop_labels(drop_key, batch["label"], generator.num_classes, train.class_drop)
        variables, images = modules(frozen), pixels(batch["image"])
        tokens = tokenizer.apply(variables["tokenizer"], images, method="encode")
        wanted = jax.lax.stop_gradient(describe(variables, images))
        options = dict(train=True, rngs={"dropout": path_key}, method="aligned")
        logits, told = generator.apply(params["generator"], labels, tokens, **options)
        value, metrics = config.objective(lambda tokens: logits, tokens, tokens, step)
        distance = cosine_distance(told, wanted[:, None]).mean()
        return value + config.align.weight * distance, (metrics | {"alignment": 1 - distance}, state)

    return dataclasses.replace(base, loss=loss, needs=(*base.needs, *needs))


def unaligned(config: AlignedConfig) -> ImageLlamaConfig:
    """The same model, data and training without the encoder."""
    return ImageLlamaConfig(**config_lib.fields_of(config, ImageLlamaConfig))
