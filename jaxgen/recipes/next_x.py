"""The next-X system (S048 xAR): its configuration, its stages and its sampler."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxgen.generators.next_x import CONTEXTS, NextXTransformer
from jaxgen.generators.next_x_sampler import NextXSampler
from jaxgen.optim import OptimConfig
from jaxgen.paths_flow import METHODS
from jaxgen.recipe import Stage
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.masked_latent import LatentConfig, tokens_stage
from jaxgen.units import KINDS, Units

__all__ = ["FlowConfig", "FlowTrainConfig", "NextXConfig", "NextXModelConfig", "SolverConfig"]


@dataclasses.dataclass(frozen=True)
class NextXModelConfig:
    """Sizes of `NextXTransformer`, and what it predicts."""

    width: int = 768
    depth: int = 8
    heads: int = 12
    unit: str = "cell"
    unit_size: int = 8
    context: str = "noisy"
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gate_init: float = 1.0
    rest_init: float = 1.0
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self, width=1, depth=1, heads=1, unit_size=0, mlp_ratio=0.1, shares=("dropout",))
        check_dtype("model", self.dtype)
        for name, known in (("unit", KINDS), ("context", CONTEXTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class FlowTrainConfig:
    """How a generator of flows is trained.

    Attributes:
      steps: updates; 0 takes it from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      class_drop: share of labels dropped for guidance.
      optim: AdamW and its schedule.
    """

    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1
    ema: float = 0.0
    class_drop: float = 0.1
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        check_fields("model_train", self, steps=0, batch_size=1, accumulate=1, shares=("ema", "class_drop"))


@dataclasses.dataclass(frozen=True)
class SolverConfig:
    """How entities are sampled; see `NextXSampler`."""

    steps: int = 50
    solver: str = "noisy"

    def __post_init__(self):
        check_fields("sampler", self, steps=1)
        if self.solver not in METHODS:
            raise ValueError(f"sampler.solver={self.solver!r}: expected one of {', '.join(METHODS)}")


class FlowConfig(LatentConfig):
    """What systems on a `FlowModel` have in common; each has the fields `model` and `model_train`."""

    def generator_stages(self) -> list[Stage]:
        """The generator's."""
        return [tokens_stage(self, "generator", self.build_generator(), self.model_train, lambda key, *batch: (*batch, key))]

    def _generator_fields(self) -> dict:
        tokenizer, sizes = self.build_tokenizer(), dataclasses.asdict(self.model) | dict(dtype=jnp.dtype(self.model.dtype))
        return dict(channels=tokenizer.token_channels, grid=tokenizer.grid, num_classes=self.num_classes, **sizes)


@dataclasses.dataclass(frozen=True)
class NextXConfig(FlowConfig):
    """Everything that defines a run. `recipe()` builds it."""

    model: NextXModelConfig = NextXModelConfig()
    model_train: FlowTrainConfig = FlowTrainConfig()
    sampler: SolverConfig = SolverConfig()

    def build_generator(self) -> NextXTransformer:
        """The generator module.

        Raises:
          ValueError: entities that do not fill the latent.
        """
        fields = self._generator_fields()
        try:
            Units(self.model.unit, fields["grid"], self.model.unit_size)
        except ValueError as error:
            raise ValueError(f"model.unit={self.model.unit!r}, model.unit_size={self.model.unit_size}: {error}") from error
        return NextXTransformer(**fields)

    def build_sampler(self) -> NextXSampler:
        """From key and labels to images."""
        return NextXSampler(
            generator=self.build_generator(), tokenizer=self.build_tokenizer(), **dataclasses.asdict(self.sampler)
        )
