"""Next-scale sampling with test-time search (S086 TTS-VAR): many candidates an image, the best of which is returned."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Int, Key

from jaxgen.decoding import Found, Known, Reward, SearchPlan, Settings, search_scales
from jaxgen.generators.next_scale_sampler import NextScaleSampler
from jaxgen.hosts import to_host

__all__ = ["SearchedSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchedSampler(NextScaleSampler):
    """`NextScaleSampler` with a plan of candidates.

    Attributes:
      plan: how many candidates go on from each scale, and how they are chosen.

    Raises:
      ValueError: a plan of another number of scales.

    Example:
      >>> sampler = SearchedSampler(generator=generator, tokenizer=tokenizer, plan=SearchPlan.best_of(4, 3))
      >>> found = sampler(params, jax.random.key(0), jnp.array([0, 1, 2]), reward=reward)    # doctest: +SKIP
    """

    plan: SearchPlan

    def __post_init__(self):
        super().__post_init__()
        if len(self.plan.widths) != self.generator.order.steps:
            raise ValueError(f"widths={self.plan.widths}: expected one for each of {self.generator.order.steps} scales")

    def __call__(
        self,
        params: dict,
        key: Key[Array, ""],
        labels: Int[Array, "m"],
        settings: Settings = Settings(),
        known: Known | None = None,
        *,
        reward: Reward,
        features: Reward | None = None,
    ) -> Found:
        """Searches for one image a label.

        Args:
          params, key, labels, settings, known: see `NextScaleSampler`.
          reward: `(images, labels) -> [b]`. A function, which compiles once, or a pytree that can be called, such as a frozen
            dataclass registered with `jax.tree_util`, whose arrays may change without compiling anything.
          features: `images -> [b, d]`, likewise; needed where the plan clusters.

        Raises:
          ValueError: see `NextScaleSampler` and `search_scales`; a reward that is NaN.
        """
        labels, settings = self._checked(labels, settings, known)
        reward, features = (_as_pytree(f) for f in (reward, features))
        found = self._search(params, key, labels, settings, known, reward, features)
        for scale, scores in zip((*sorted(self.plan.resample), self.generator.order.steps - 1), found.scores):
            bad = () if isinstance(scores, jax.core.Tracer) else np.argwhere(np.isnan(to_host(scores)))
            if len(bad):
                raise ValueError(f"reward: NaN for image {bad[0][0]} after scale {scale}")
        return found

    @functools.partial(jax.jit, static_argnums=0)
    def _search(self, params, key, labels, settings, known, reward, features):
        def decode(params, picture):
            return self.tokenizer.apply(params["tokenizer"], picture, method="decode_features")

        def sample(*parts, **options):
            judges = dict(decode=decode, reward=reward, features=features)
            return search_scales(*parts, plan=self.plan, labels=labels, **judges, **options)

        rows, known = jax.tree.map(lambda x: jnp.repeat(x, self.plan.widths[0], axis=0), (labels, known))
        return self._scales(params, key, rows, settings, known, sample)


def _as_pytree(function):
    """A plain function as a pytree without leaves, so that it can be passed to a compiled one."""
    return Partial(function) if function is not None and jax.tree_util.all_leaves([function]) else function
