"""Masked autoregression with low-resolution pivots (S014 Hi-MAR): configuration, stages, sampler, and the claim against MAR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen import config as config_lib
from jaxgen.benchmark import count_flops
from jaxgen.decoding.masked_latents import sample_latents
from jaxgen.generators.masked_latent import random_known
from jaxgen.generators.masked_latent_sampler import latent_model
from jaxgen.generators.pivoted_latent import PivotedLatentTransformer, cosine_known
from jaxgen.generators.pivoted_latent_sampler import PivotedLatentSampler
from jaxgen.paths_vp import VPPath
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.masked_latent import (
    LatentConfig,
    LatentModelConfig,
    LatentTrainConfig,
    MaskedLatentConfig,
    SpeculationConfig,
    tokens_stage,
)
from jaxgen.resample import resize
from jaxgen.tokenizers.latents import LatentTokenizer

__all__ = ["PivotConfig", "PivotModelConfig", "PivotSamplingConfig", "PivotTrainConfig", "compare_with_mar"]


@dataclasses.dataclass(frozen=True)
class PivotModelConfig(LatentModelConfig):
    """Sizes of `PivotedLatentTransformer`."""

    dense_width: int = 512
    dense_depth: int = 6
    dense_heads: int = 8

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, dense_width=4, dense_depth=1, dense_heads=1)


@dataclasses.dataclass(frozen=True)
class PivotTrainConfig(LatentTrainConfig):
    """How a generator is trained.

    Attributes:
      least_masked: of the pivots, see `random_known`; dense tokens follow `cosine_known`.
      shown: share of rows whose dense phase is shown the pivots. (The released training goes up to its share in 100 epochs.)
    """

    shown: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        check_fields("train", self, shares=("shown",))


@dataclasses.dataclass(frozen=True)
class PivotSamplingConfig:
    """How images are sampled; fields are those of `PivotedLatentSampler`."""

    pivot_steps: int = 32
    steps: int = 4
    pivot_chain_steps: int = 100
    chain_steps: int = 250
    pivot_guidance: float = 1.0
    variance: float = 1.0

    def __post_init__(self):
        counts = dict(pivot_steps=1, steps=1, pivot_chain_steps=2, chain_steps=2)
        check_fields("sampling", self, **counts, pivot_guidance=0, shares=("variance",))


@dataclasses.dataclass(frozen=True)
class PivotConfig(LatentConfig):
    """Everything that defines a run. `recipe()` builds it.

    Attributes:
      pivot_image_size: side of the small images whose tokens are the pivots.
      prediction: see `DiffusionHead`.
      schedule: see `VPPath`; 1000 steps in training.
    """

    model: PivotModelConfig = PivotModelConfig()
    model_train: PivotTrainConfig = PivotTrainConfig()
    sampling: PivotSamplingConfig = PivotSamplingConfig()
    pivot_image_size: int = 4
    prediction: str = "noise"
    schedule: str = "cosine"

    def __post_init__(self):
        if not 1 <= self.pivot_image_size < self.tokenizer.image_size:
            raise ValueError(
                f"pivot_image_size={self.pivot_image_size}: expected less than tokenizer.image_size={self.tokenizer.image_size}"
            )

    def build_pivot_tokenizer(self) -> LatentTokenizer:
        """The same tokenizer for small images."""
        return self.build_tokenizer().clone(image_size=self.pivot_image_size)

    def build_generator(self) -> PivotedLatentTransformer:
        """The generator."""
        tokenizer = self.build_tokenizer()
        return PivotedLatentTransformer(
            channels=tokenizer.token_channels,
            grid=tokenizer.grid,
            pivot_grid=self.build_pivot_tokenizer().grid,
            num_classes=self.num_classes,
            prediction=self.prediction,
            path=VPPath(self.schedule),
            **dataclasses.asdict(self.model) | dict(dtype=jnp.dtype(self.model.dtype)),
        )

    def build_sampler(self) -> PivotedLatentSampler:
        """From key and labels to images."""
        parts = dict(generator=self.build_generator(), tokenizer=self.build_tokenizer())
        return PivotedLatentSampler(**parts, **dataclasses.asdict(self.sampling))

    def generator_stages(self) -> list[Stage]:
        """Both phases, trained together."""
        tokenizer, small, train = self.build_tokenizer(), self.build_pivot_tokenizer(), self.model_train

        def encode(variables, images):
            side = (self.pivot_image_size,) * 2
            pivots = small.apply(variables, resize(images, side, "area"), method="encode")
            return tokenizer.apply(variables, images, method="encode"), pivots

        def inputs(key, labels, both):
            tokens, pivots = both
            keys = jax.random.split(key, 4)
            known = cosine_known(keys[0], *tokens.shape[:2])
            known_pivots = random_known(keys[1], *pivots.shape[:2], train.least_masked)
            shown = jax.random.bernoulli(keys[2], train.shown, labels.shape)
            return labels, tokens, pivots, known, known_pivots, shown, keys[3]

        module = self.build_generator()
        return [tokens_stage(self, "generator", module, train, inputs, encode=encode, repeats=train.repeats)]


def compare_with_mar(
    config: PivotConfig, mar: LatentModelConfig, *, seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """The system against masked autoregression without pivots, with the same data, tokens, updates and chains of its head.

    MAR is sampled with a step for each token, and with as many steps as both phases have together.

    Args:
      config: the system's.
      mar: sizes of MAR, which should have as many parameters.
      seeds, samples, log: see `compare_generators`.
    """
    shared = config_lib.fields_of(config, LatentConfig)
    # Fields that MAR has, too.
    train = config_lib.fields_of(config.model_train, LatentTrainConfig)
    shared |= dict(model=mar, model_train=LatentTrainConfig(**train), prediction=config.prediction, schedule=config.schedule)
    length = config.build_tokenizer().length
    calls = config.sampling.pivot_steps + config.sampling.steps

    def baseline(steps: int) -> MaskedLatentConfig:
        chain = config.sampling.pivot_chain_steps
        return MaskedLatentConfig(**shared, speculation=SpeculationConfig(steps=steps, chain_steps=chain, drafts=0))

    systems = {"S014 Hi-MAR": config, "baseline, MAR": baseline(length), "MAR, as many calls": baseline(min(calls, length))}
    title = "Masked autoregression over continuous tokens, with and without low-resolution pivots"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=_columns, title=title)
    pivots = config.build_pivot_tokenizer().length
    calls = " against ".join(str(row["model calls"]) for row in claim.rows)
    notes = (
        f"{seeds} seeds; mean (spread). Calls of the transformer an image: {calls}; {pivots} of {pivots + length} tokens are "
        "pivots. Hi-MAR's dense head is a transformer that runs over the whole grid at every step of its chain, MAR's an MLP on "
        "the tokens of the step alone, in groups that are padded to the widest: FLOPs count all of it."
    )
    return claim._replace(notes=notes)


def _columns(recipe: Recipe, params: dict) -> dict:
    config = recipe.config
    length = config.build_tokenizer().length
    if isinstance(config, PivotConfig):
        calls = config.sampling.pivot_steps + config.sampling.steps
        return {"model calls": calls, "tokens": config.build_pivot_tokenizer().length + length}
    flops = round(_mar_flops(config, modules(params)) / 1e9, 4)
    return {"model calls": config.speculation.steps, "tokens": length, "sampling GFLOP/image": flops}


def _mar_flops(config: MaskedLatentConfig, variables: Mapping[str, Any], batch: int = 16) -> float:
    """FLOPs an image: its sampler can speculate, and so has a loop without a known end, which `count_flops` counts once."""
    sampler, generator = config.build_sampler(), config.build_generator()
    path, order = generator.path.respaced(sampler.chain_steps), sampler.order

    def draw(variables, labels, noise):
        given = dict(order=order, positions=jnp.tile(jnp.arange(order.length), (batch, 1)), noise=noise)
        tokens, _ = sample_latents(latent_model(generator, path, order), params=variables["generator"], cond=labels, **given)
        return sampler.tokenizer.apply(variables.get("tokenizer", {}), tokens, method="decode")

    noise = jax.ShapeDtypeStruct((batch, order.length, path.length + 1, generator.channels), jnp.float32)
    return count_flops(draw, variables, jax.ShapeDtypeStruct((batch,), jnp.int32), noise) / batch
