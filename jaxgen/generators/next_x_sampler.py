"""From key and labels to images in one compiled function: the samplers of flows over continuous tokens."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding.next_x import sample_entities
from jaxgen.decoding.noise import TARGET, normal
from jaxgen.decoding.transforms import check_settings
from jaxgen.generators.bases import FlowModel
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.generators.next_x import NextXTransformer
from jaxgen.paths_flow import METHODS, times_with_jump, uniform_times
from jaxgen.tokenizers.latents import LatentTokenizer

__all__ = ["Drawn", "FlowSampler", "NextXSampler", "check_fit"]


class Drawn(NamedTuple):
    """What a sampler of continuous tokens tells besides the images.

    Attributes:
      tokens: of the finest grid, row by row.
    """

    tokens: Float[Array, "b l c"]


def check_fit(generator: Any, tokenizer: LatentTokenizer) -> None:
    """That a generator's tokens are the tokenizer's.

    Raises:
      ValueError: another grid or number of channels.
    """
    ours, theirs = (generator.grid, generator.channels), (tokenizer.grid, tokenizer.token_channels)
    if ours != theirs:
        raise ValueError(
            f"generator (grid={ours[0]}, channels={ours[1]}) does not fit the tokenizer (grid={theirs[0]}, channels={theirs[1]})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSampler:
    """What samplers of flows over continuous tokens have in common; each has its own `tokens`.

    Attributes:
      generator: the flow.
      tokenizer: between tokens and pictures.
    """

    generator: FlowModel
    tokenizer: LatentTokenizer

    def __post_init__(self):
        check_fit(self.generator, self.tokenizer)

    def __call__(
        self, params: dict[str, Any], key: Key[Array, ""], labels: Int[Array, "b"], *, cfg=0.0, temperature=1.0
    ) -> tuple[Float[Array, "b H W C"], Drawn]:
        """(images in [-1, 1], their tokens), one image a label.

        Args:
          params: variables by module: "generator" and, if it has any, "tokenizer".
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: classes; `num_classes` is unconditional.
          cfg: guidance, as the sampler has it; the published scales are 1 + cfg.
          temperature: factor on all noise.

        Raises:
          ValueError: labels or settings out of range.
        """
        labels = check_labels(labels, self.generator.num_classes)
        check_settings(cfg=cfg, temperature=temperature)
        return self._sample(params, key, labels, jnp.float32(cfg), jnp.float32(temperature))

    @functools.partial(jax.jit, static_argnums=0)
    def _sample(self, params, key, labels, cfg, temperature):
        rows = jnp.arange(labels.shape[0])

        def draw(pos, stream=TARGET):
            return temperature * normal(key, rows, pos, self.generator.channels, stream=stream)

        tokens = self.tokens(params["generator"], labels, draw, cfg)
        return self.tokenizer.apply(params.get("tokenizer", {}), tokens, method="decode"), Drawn(tokens)

    def tokens(self, variables, labels: Int[Array, "b"], draw, cfg) -> Float[Array, "b l c"]:
        """The tokens of the finest grid; `draw` gives noise [b, q, c] for positions [q], of one stream or another."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextXSampler(FlowSampler):
    """Samples images entity by entity, with the guidance of `sample_entities`.

    Attributes:
      generator: the flow.
      tokenizer: between tokens and pictures.
      steps: of the solver, for each entity.
      solver: see `sample_entities`; "noisy" takes `times_with_jump`, the others take equal steps.

    Example:
      >>> sampler = NextXSampler(generator=generator, tokenizer=tokenizer, steps=50)
      >>> images, drawn = sampler({"generator": variables}, jax.random.key(0), jnp.array([0, 1, 2]), cfg=1.7)
    """

    generator: NextXTransformer
    steps: int = 50
    solver: str = "noisy"

    def __post_init__(self):
        super().__post_init__()
        if self.solver not in METHODS:
            raise ValueError(f"solver={self.solver!r}: expected one of {', '.join(METHODS)}")
        len(self.times)  # Too few steps fail here, not in the middle of a run.

    @property
    def times(self):
        """Levels of the solver."""
        return times_with_jump(self.steps) if self.solver == "noisy" else uniform_times(self.steps)

    def tokens(self, variables, labels: Int[Array, "b"], draw, cfg) -> Float[Array, "b l c"]:
        """See `FlowSampler`; streams are those of `sample_entities`."""
        generator = self.generator

        def step(params, cache, view, cond):
            return generator.apply(params, cache, view, cond, method="step")

        x = sample_entities(
            step,
            generator.order,
            draw,
            params=variables,
            cache=generator.init_cache(2 * labels.shape[0]),
            cond=jnp.concatenate([labels, jnp.full_like(labels, generator.num_classes)]),
            times=self.times,
            solver=self.solver,
            cfg=cfg,
        )
        return generator.units.join(x)
