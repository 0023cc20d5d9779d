"""From key and labels to images whose tokens are diffusion steps: all at once, or a preview after each group of tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Drawn, Settings, begin_tokens, check_settings, draw_tokens, sample_tokens
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.generators.next_token_sampler import NextTokenSampler, check_condition
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.orders import raster
from jaxgen.tokenizers.diffusion import DiffusionTokenizer, Flow

__all__ = ["DiffusionSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionSampler(NextTokenSampler):
    """`NextTokenSampler` whose images exist before their tokens are all there (D-AR, Gao and Shou 2025, section 3.4).

    Attributes:
      groups: of tokens that are made; the images are then previews. 0 makes all.

    Raises:
      ValueError: more groups than the tokenizer has.

    Example:
      >>> for tokens, previews in sampler.stream(params, jax.random.key(0), jnp.array([0, 1, 2])):
      ...     show(previews)                                      # after each group, the last are the images
    """

    generator: ImageLlama
    tokenizer: DiffusionTokenizer
    groups: int = 0

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.groups <= self.tokenizer.groups:
            raise ValueError(f"groups={self.groups}: expected 1 to {self.tokenizer.groups}, or 0 for all")

    def stream(
        self, params: dict, key: Key[Array, ""], cond, settings: Settings = Settings()
    ) -> Iterator[tuple[Int[Array, "b k"], Float[Array, "b H W C"]]]:
        """(tokens so far, previews) after each group; the tokens are those of `__call__`. One compilation for all groups.

        Arguments and errors are those of `NextTokenSampler.__call__`; `groups` of them come.
        """
        cond = check_condition(cond, self.generator)
        check_settings(**settings._asdict(), vocab=self.generator.vocab)
        settings, size = Settings(*map(jnp.float32, settings)), self.tokenizer.group
        drawn, flow, cond = self._start(params, cond)
        for i in range(self.groups or self.tokenizer.groups):
            drawn, flow, previews = self._group(params, key, cond, settings, drawn, flow, jnp.int32(i))
            yield drawn.tokens[:, : (i + 1) * size], previews

    @functools.partial(jax.jit, static_argnums=0)
    def _start(self, params, cond) -> tuple[Drawn, Flow, Array]:
        b, cache, cond = self._prepare(params, cond)
        flow = self.tokenizer.apply(params["tokenizer"], b, method="begin")
        return begin_tokens(cache, b, order=self.generator.order), flow, cond

    @functools.partial(jax.jit, static_argnums=0)
    def _group(self, params, key, cond, settings, drawn, flow, i):
        size, order = self.tokenizer.group, self.generator.order
        options = dict(params=params["generator"], cond=cond, order=order, key=key, settings=settings)
        drawn = draw_tokens(stepper(self.generator), drawn, i * size, (i + 1) * size, **options)
        tokens = drawn.tokens[:, : order.length]
        flow, previews = self.tokenizer.apply(params["tokenizer"], flow, tokens, i, method="advance")
        return drawn, flow, previews

    def _prepare(self, params, cond):
        """(b, an empty cache, the condition and that without one)."""
        b = jax.tree.leaves(cond)[0].shape[0]
        return b, self.generator.init_cache(2 * b), self.conditions(params, None, cond)

    @functools.partial(jax.jit, static_argnums=0)
    def _sample(self, params, key, cond, settings):
        b, cache, cond = self._prepare(params, cond)
        count = (self.groups or self.tokenizer.groups) * self.tokenizer.group
        options = dict(params=params["generator"], cache=cache, cond=cond, key=key)
        settings = settings._replace(cfg=jnp.broadcast_to(settings.cfg, (self.generator.length,))[:count])
        tokens = sample_tokens(stepper(self.generator), batch=b, order=raster(count), settings=settings, **options)
        return self.tokenizer.apply(params["tokenizer"], tokens, method="decode"), tokens
