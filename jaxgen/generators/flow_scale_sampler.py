"""From key and labels to images in one compiled function: a flow for each scale, given the coarser ones (S010 FlowAR)."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.guidance import scale_ramp
from jaxgen.decoding.step import View
from jaxgen.generators.flow_scale import FlowScaleTransformer
from jaxgen.generators.next_x_sampler import FlowSampler
from jaxgen.paths_flow import integrate, two_speed_times, uniform_times

__all__ = ["FlowScaleSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowScaleSampler(FlowSampler):
    """Samples latents scale by scale, each by Euler's steps along the head's flow.

    `cfg` is t in (1 + t) conditional - t unconditional velocities, growing from 0 at the first scale to this at the last, and
    this for an only one.

    Attributes:
      generator: features and flow.
      tokenizer: between tokens and pictures.
      steps: of the solver, for each scale.
      guided_below: guidance holds at levels up to this only (the released samplers' 0.9 or 0.7).
      two_speeds: steps are those of `two_speed_times`, not equal ones.

    Example:
      >>> sampler = FlowScaleSampler(generator=generator, tokenizer=tokenizer, steps=24)
      >>> images, drawn = sampler({"generator": variables}, jax.random.key(0), jnp.array([0, 1, 2]), cfg=1.4)
    """

    generator: FlowScaleTransformer
    steps: int = 24
    guided_below: float = 0.9
    two_speeds: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.guided_below <= 1:
            raise ValueError(f"guided_below={self.guided_below}: expected a level in [0, 1]")
        len(self.times), len(self.generator.sizes)  # Bad ones fail here, not in the middle of a run.

    @property
    def times(self):
        """Levels of the solver."""
        return two_speed_times(self.steps) if self.two_speeds else uniform_times(self.steps)

    def tokens(self, variables, labels: Int[Array, "b"], draw, cfg) -> Float[Array, "b l c"]:
        """See `FlowSampler`."""
        generator, order = self.generator, self.generator.order
        apply = functools.partial(generator.apply, variables)
        cond = jnp.concatenate([labels, jnp.full_like(labels, generator.num_classes)])
        caches = generator.init_cache(len(cond))
        x = jnp.zeros((labels.shape[0], order.sizes[0], generator.channels))
        for scale in range(order.steps):
            pos = jnp.arange(*order.span(scale))
            out, caches = apply(caches, View(jnp.concatenate([x, x]), pos, time=scale), cond, method="step")
            caches = tuple(cache.commit(len(pos)) for cache in caches)
            weight = scale_ramp(cfg, scale, order.steps) if order.steps > 1 else cfg

            def velocity(x, t, z=out.params, weight=weight, scale=scale):
                both = apply(z, jnp.concatenate([x, x]), t, scale, method="velocity")
                conditional, unconditional = jnp.split(both, 2)
                return conditional + jnp.where(t <= self.guided_below, weight, 0.0) * (conditional - unconditional)

            begin = apply(x, draw(pos), scale, method="begin")
            x = made = integrate(velocity, begin, jnp.asarray(self.times))
            if scale + 1 < order.steps:
                x = apply(made, scale, method="enlarge")
        return made
