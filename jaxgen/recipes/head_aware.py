"""A next-scale system sampled with a compressed cache: S165 HACK (Qin et al. 2025). Nothing is trained but the system itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.decoding import HeadPlan, Settings, attention_variance, classify_heads, replay, split_budget
from jaxgen.generators import HeadAware, NextScaleSampler
from jaxgen.hosts import to_host
from jaxgen.orders import scales
from jaxgen.recipe import Recipe, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.next_scale import NextScaleConfig, sample_images

__all__ = ["BudgetConfig", "HeadAwareConfig", "forced_logits"]

# The stream of keys for the samples that the heads are told apart on.
CALIBRATION = 165


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What the heads may keep.

    Attributes:
      keep: the mean budget, as a share of the positions that the full cache holds when the last scale is made.
      contextual_share: alpha, of heads that are contextual.
      contextual_ratio: budget of a contextual head over the mean one, see `split_budget`. The authors' was not to be had; on the
        digits it is contextual heads that suffer most from a small budget.
      samples: images on which the heads are told apart, made by the model itself.
      queries: see `HeadPlan`.
    """

    keep: float = 0.5
    contextual_share: float = 0.5
    contextual_ratio: float = 1.3
    samples: int = 64
    queries: int = 32

    def __post_init__(self):
        check_fields("cache", self, samples=1, queries=1, shares=("contextual_share",))
        if not 0 < self.keep <= 1:
            raise ValueError(f"cache.keep={self.keep}: expected a share of the cache in (0, 1]")
        if self.contextual_ratio <= 0:
            raise ValueError(f"cache.contextual_ratio={self.contextual_ratio}: must be > 0")


@dataclasses.dataclass(frozen=True)
class HeadAwareConfig(NextScaleConfig):
    """`NextScaleConfig` whose sampler compresses the cache."""

    cache: BudgetConfig = BudgetConfig()

    def __post_init__(self):
        self.budgets()

    def positions(self, keep: float | None = None) -> tuple[int, int]:
        """(mean budget, all that the full cache holds when the last scale is made), in positions."""
        order = scales(self.tokenizer.patch_nums)
        most = order.length - order.sizes[-1]
        return round((self.cache.keep if keep is None else keep) * most), most

    def budgets(self, keep: float | None = None) -> tuple[int, int]:
        """Positions that contextual and structural heads keep; `keep` replaces that of the configuration.

        Raises:
          ValueError: see `split_budget`.
        """
        budget, most = self.positions(keep)
        return split_budget(budget, share=self.cache.contextual_share, ratio=self.cache.contextual_ratio, most=most)

    def variance(self, params: Mapping[str, Any], *, seed: int = 0) -> Float[np.ndarray, "n h"]:
        """`attention_variance` on samples of the model, by class in turn, without guidance."""
        labels = jnp.arange(self.cache.samples) % self.num_classes
        key = jax.random.fold_in(jax.random.key(seed), CALIBRATION)
        return to_host(_variance(self.build_sampler(), modules(params), key, labels))

    def plan(self, params: Mapping[str, Any], *, keep: float | None = None) -> HeadPlan:
        """The heads of a trained generator, told apart, and their budgets.

        Args:
          params: by stage.
          keep: in place of that of the configuration.
        """
        structural = classify_heads(self.variance(params), share=self.cache.contextual_share)
        return HeadPlan(structural, *self.budgets(keep), self.cache.queries)

    def planned_sampler(self, plan: HeadPlan) -> NextScaleSampler:
        """From key and labels to images with the cache of a plan."""
        return dataclasses.replace(self.build_sampler(), generator=HeadAware(self.build_generator(), plan))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, sample=_Compressing(self, base.sample))


def _variance(sampler: NextScaleSampler, params, key, labels) -> Float[Array, "n h"]:
    """`attention_variance` of a sampler's generator on what it samples for `labels`."""
    settings = Settings(cfg=0.0)
    _, tokens = sampler(params, key, labels, settings)
    return _measure(sampler, params, labels, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _measure(sampler, params, labels, tokens):
    generator = sampler.generator
    return attention_variance(
        _step(generator),
        generator.order,
        params=params,
        cache=generator.init_cache(len(labels)),
        cond=labels,
        features=sampler.tokenizer.apply(params["tokenizer"], tokens, method="inputs"),
    )


@functools.partial(jax.jit, static_argnums=0)
def forced_logits(
    sampler: NextScaleSampler, params: dict, labels: Int[Array, "b"], tokens: Int[Array, "b l"]
) -> Float[Array, "b l v"]:
    """What a sampler's generator says of given tokens through its cache, scale by scale; with a full cache, as in training."""
    generator = sampler.generator
    features = sampler.tokenizer.apply(params["tokenizer"], tokens, method="inputs")
    cache = generator.init_cache(len(labels))
    laws, _ = replay(_step(generator), generator.order, params=params, cache=cache, cond=labels, features=features)
    return laws


def _step(generator):
    def step(params, cache, view, cond):
        return generator.apply(params["generator"], cache, view, cond, method="step")

    return step


@dataclasses.dataclass(frozen=True, eq=False)
class _Compressing:
    """A recipe's sampler with a compressed cache; the heads are told apart once for a generator."""

    config: HeadAwareConfig
    full: Any
    _last: list = dataclasses.field(default_factory=list, repr=False)

    def __call__(self, params: Mapping[str, Any], key, labels, *, compressed: bool = True, **options) -> dict:
        """As `sample_images`; without `compressed` the cache is the full one.

        Raises:
          ValueError: called while tracing, for a generator whose heads are not told apart yet.
        """
        if not compressed:
            return self.full(params, key, labels, **options)
        return sample_images(self.config.planned_sampler(self._plan(params)), params, key, labels, **options)

    def _plan(self, params) -> HeadPlan:
        leaf = jax.tree.leaves(modules(params)["generator"])[0]
        if isinstance(leaf, jax.core.Tracer):
            # The heads' kinds decide shapes, so that values are needed; sampling once outside of a trace is enough.
            if not self._last:
                raise ValueError("params are traced: sample once with their values, to tell the heads apart")
        elif not self._last or self._last[0] is not leaf:
            self._last[:] = [leaf, self.config.plan(params)]
        return self._last[1]
