"""From key and labels to images in one compiled function: a next-token generator and its tokenizer together."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Settings, check_settings, sample_tokens
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.generators.next_token import NextTokenTransformer
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer

__all__ = ["NextTokenSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenSampler:
    """Samples images token by token. Used like `NextScaleSampler`; `Settings.cfg` is constant over the positions.

    Attributes:
      generator: predicts the tokens in raster order.
      tokenizer: turns them into pictures.
    """

    generator: NextTokenTransformer
    tokenizer: MultiScaleTokenizer

    def __post_init__(self):
        if self.tokenizer.order.length != self.generator.length or self.generator.vocab != self.tokenizer.vocab:
            raise ValueError(
                f"generator (length={self.generator.length}, vocab={self.generator.vocab}) does not fit "
                f"tokenizer (length={self.tokenizer.order.length}, vocab={self.tokenizer.vocab})"
            )

    def __call__(
        self, params: dict, key: Key[Array, ""], labels: Int[Array, "b"], settings: Settings = Settings()
    ) -> tuple[Float[Array, "b H W C"], Int[Array, "b l"]]:
        """(images in [-1, 1], tokens), one image a label; see `NextScaleSampler.__call__`."""
        labels = check_labels(labels, self.generator.num_classes)
        check_settings(**{k: v for k, v in settings._asdict().items() if k != "cfg"}, vocab=self.generator.vocab)
        return self._sample(params, key, labels, Settings(*map(jnp.float32, settings)))

    @functools.partial(jax.jit, static_argnums=0)
    def _sample(self, params, key, labels, settings):
        b = labels.shape[0]

        def step(params, cache, view, cond):
            return self.generator.apply(params["generator"], cache, view, cond, method="step")

        tokens = sample_tokens(
            step,
            params=params,
            cache=self.generator.init_cache(2 * b),
            cond=jnp.concatenate([labels, jnp.full_like(labels, self.generator.num_classes)]),
            batch=b,
            length=self.generator.length,
            key=key,
            settings=settings,
        )
        return self.tokenizer.apply(params["tokenizer"], tokens, method="decode"), tokens
