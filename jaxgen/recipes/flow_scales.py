"""The next-scale system on any autoencoder (S010 FlowAR): its configuration, its stages and its sampler."""

from __future__ import annotations

import dataclasses

from jaxgen.generators.flow_scale import FlowScaleTransformer
from jaxgen.generators.flow_scale_sampler import FlowScaleSampler
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.next_x import FlowConfig, FlowTrainConfig

__all__ = ["FlowScaleConfig", "FlowScaleModelConfig", "ScaleSolverConfig"]


@dataclasses.dataclass(frozen=True)
class FlowScaleModelConfig:
    """Sizes of `FlowScaleTransformer`."""

    width: int = 768
    depth: int = 6
    heads: int = 12
    head_width: int = 1024
    head_depth: int = 2
    head_heads: int = 0
    scales: tuple[int, ...] = ()
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gate_init: float = 1.0
    rest_init: float = 1.0
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(width=1, depth=1, heads=1, head_width=1, head_depth=1, head_heads=0)
        check_fields("model", self, **sizes, mlp_ratio=0.1, shares=("dropout",))
        check_dtype("model", self.dtype)


@dataclasses.dataclass(frozen=True)
class ScaleSolverConfig:
    """How scales are sampled; see `FlowScaleSampler`."""

    steps: int = 24
    guided_below: float = 0.9
    two_speeds: bool = True

    def __post_init__(self):
        check_fields("sampler", self, steps=1, shares=("guided_below",))


@dataclasses.dataclass(frozen=True)
class FlowScaleConfig(FlowConfig):
    """Everything that defines a run. `recipe()` builds it."""

    model: FlowScaleModelConfig = FlowScaleModelConfig()
    model_train: FlowTrainConfig = FlowTrainConfig()
    sampler: ScaleSolverConfig = ScaleSolverConfig()

    def build_generator(self) -> FlowScaleTransformer:
        """The generator module."""
        return FlowScaleTransformer(**self._generator_fields())

    def build_sampler(self) -> FlowScaleSampler:
        """From key and labels to images."""
        return FlowScaleSampler(
            generator=self.build_generator(), tokenizer=self.build_tokenizer(), **dataclasses.asdict(self.sampler)
        )
