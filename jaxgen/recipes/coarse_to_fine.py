"""Coarse to fine tokens as a recipe (S019 CTF): the codebook is clustered, then one model predicts clusters, one tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen import config as config_lib
from jaxgen import metrics
from jaxgen.data import pixels
from jaxgen.decoding import Settings
from jaxgen.generators import CoarseToFineLlama, CoarseToFineSampler
from jaxgen.nn.classifier import Classifier
from jaxgen.quantizers import cluster_codes
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.evaluation import held_out, sample_many
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.image_llama import ImageLlamaConfig, ImageLlamaModelConfig

__all__ = ["CoarseToFineConfig", "CoarseToFineModelConfig", "compare_flat", "flat", "replaced_codes"]


@dataclasses.dataclass(frozen=True)
class CoarseToFineModelConfig(ImageLlamaModelConfig):
    """Sizes of `CoarseToFineLlama`; `depth` counts the blocks of the model of clusters."""

    clusters: int = 512
    fine_depth: int = 12

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, clusters=1, fine_depth=1)


@dataclasses.dataclass(frozen=True)
class CoarseToFineConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it."""

    model: CoarseToFineModelConfig = CoarseToFineModelConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.model.clusters > self.tokenizer.vocab:
            raise ValueError(f"model.clusters={self.model.clusters}: the codebook has {self.tokenizer.vocab} codes")

    def build_generator(self) -> CoarseToFineLlama:
        """The generator module."""
        return CoarseToFineLlama(**self._generator_fields())

    def build_sampler(self) -> CoarseToFineSampler:
        """From key and labels to images."""
        return CoarseToFineSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def cluster(self, variables) -> Int[Array, "v"]:
        """The clusters of a trained tokenizer's codes."""
        codes = self.build_tokenizer().apply(
            variables, jnp.arange(self.tokenizer.vocab), method=lambda tokenizer, ids: tokenizer.quantizer.lookup(ids)
        )
        return cluster_codes(codes, self.model.clusters)

    def recipe(self) -> Recipe:
        """The stages and the sampler; clusters are found when the generator's stage begins, and kept with its parameters."""
        base = super().recipe()
        plain, model = base.stage("generator"), self.build_generator()

        def init(key, frozen):
            params, state = plain.init(key, frozen)
            labels = self.cluster(modules(frozen)["tokenizer"])
            return params | {"generator": model.with_labels(params["generator"], labels)}, state

        stages = tuple(dataclasses.replace(plain, init=init) if stage is plain else stage for stage in base.stages)
        return dataclasses.replace(base, stages=stages, sample=functools.partial(_sample, self.build_sampler()))


def _sample(sampler: CoarseToFineSampler, params, key, labels, *, fine: Mapping[str, float] | None = None, **settings) -> dict:
    """Samples of `CoarseToFineSampler`; `fine` are settings of the second model, None is see there."""
    fine = None if fine is None else Settings(**fine)
    images, tokens = sampler(modules(params), key, labels, Settings(**settings), fine)
    return {"images": images, "tokens": tokens}


def flat(config: CoarseToFineConfig) -> ImageLlamaConfig:
    """The Llama of the same data, tokenizer, training and number of blocks that predicts codes in turn."""
    model = config_lib.fields_of(config.model, ImageLlamaModelConfig)
    model["depth"] += config.model.fine_depth
    return ImageLlamaConfig(**config_lib.fields_of(config) | dict(model=ImageLlamaModelConfig(**model)))


def compare_flat(config: CoarseToFineConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """Quality, likelihood and speed against one model of the whole codebook.

    Args:
      config: of the system with clusters.
      seeds: trainings of each.
      samples: images that are judged.
      log: takes progress lines.
    """

    def columns(recipe: Recipe, params: dict) -> dict:
        clustered = isinstance(recipe.config, CoarseToFineConfig)
        length = config.build_generator().length
        return {
            "model calls": f"{length} + 1" if clustered else length,
            "codes to choose from": config.model.clusters if clustered else config.tokenizer.vocab,
            "test nats a token": round(claims.test_nats(recipe, params), 4),
            "inception score, own classifier": round(_inception_score(recipe, params, samples), 4),
        } | (replaced_codes(recipe, params) if clustered else {})

    systems = {"S019 CTF, clusters then codes": config, "LlamaGen, codes": flat(config)}
    title = "Coarse to fine against a flat codebook at equal blocks, data and training budget"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=columns, title=title)
    notes = (
        "The codes of an image are drawn independently of one another given all clusters. The inception score and the PSNR with "
        "other codes, of the same clusters or of any, are of the last seed."
    )
    return claim._replace(notes=f"{claim.notes} {notes}")


def _inception_score(recipe: Recipe, params: dict, samples: int) -> float:
    config = recipe.config
    labels = np.sort(np.arange(samples, dtype=np.int32) % config.num_classes)
    images = sample_many(recipe, params, jax.random.key(0), labels, batch_size=min(100, samples))
    classifier = Classifier(num_classes=config.num_classes, width=config.classifier.width)
    return metrics.inception_score(np.asarray(jax.nn.softmax(classifier.apply(modules(params)["classifier"], images))))


def replaced_codes(recipe: Recipe, params: dict) -> dict:
    """PSNR of test images whose codes are swapped for any of the same cluster, and for any at all (the paper's figure 1b)."""
    config, variables = recipe.config, modules(params)
    tokenizer, model = config.build_tokenizer(), config.build_generator()
    cluster = model.apply(variables["generator"], method="labels_of")

    @jax.jit
    def psnrs(images: Float[Array, "b H W C"]):
        tokens = tokenizer.apply(variables["tokenizer"], images, method="encode")
        alike = jnp.where(cluster == cluster[tokens][..., None], 0.0, -jnp.inf)
        swapped = {"cluster": jax.random.categorical(jax.random.key(0), alike)}
        swapped["codebook"] = jax.random.randint(jax.random.key(1), tokens.shape, 0, config.tokenizer.vocab)
        pictures = {name: tokenizer.apply(variables["tokenizer"], ids, method="decode") for name, ids in swapped.items()}
        return {name: metrics.psnr(images, picture) for name, picture in pictures.items()}

    found = [psnrs(pixels(batch["image"])) for batch in held_out(config.data, batch_size=64, limit=1000)]
    means = {name: float(np.concatenate([part[name] for part in found]).mean()) for name in found[0]}
    return {f"PSNR, other codes of the {name}": round(value, 2) for name, value in means.items()}
