"""From key and labels to images in one compiled function: a generator of tokens, one or a few a step, and its tokenizer."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Automaton, Settings, check_settings, sample_tokens
from jaxgen.generators.bases import TokenModel
from jaxgen.generators.next_scale_sampler import check_labels
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.tokenizers.flexible import FlexibleTokenizer
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer

__all__ = ["NextTokenSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenSampler:
    """Samples images token by token, or by the steps of another order. Used like `NextScaleSampler`; `Settings.cfg` is constant,
    or [l], one for each position.

    Attributes:
      generator: predicts the tokens, such as a `NextTokenTransformer` or an `ImageLlama`.
      tokenizer: of one scale; turns them into pictures. None where tokens are all that is wanted.
      grammar: what may follow what, see `sample_tokens`; hashable.
      stop: a token that ends a row, see `sample_tokens`.
    """

    generator: TokenModel
    tokenizer: MultiScaleTokenizer | FlexibleTokenizer | None
    grammar: Automaton | None = None
    stop: int | None = None

    merged = False  # see `sample_tokens`; a fact of the class, not a field
    weighed = "position"  # what has a guidance weight of its own

    def __post_init__(self):
        if self.tokenizer is None:
            return
        if self.tokenizer.order.length != self.generator.length or self.generator.vocab != self.tokenizer.vocab:
            raise ValueError(
                f"generator (length={self.generator.length}, vocab={self.generator.vocab}) does not fit "
                f"tokenizer (length={self.tokenizer.order.length}, vocab={self.tokenizer.vocab})"
            )

    def __call__(
        self, params: dict, key: Key[Array, ""], cond, settings: Settings = Settings()
    ) -> tuple[Float[Array, "b H W C"] | None, Int[Array, "b l"]]:
        """(images in [-1, 1], None without a tokenizer; tokens in raster order), one image a condition; see `NextScaleSampler`.

        Args:
          params: `{"generator": ..., "tokenizer": ...}`.
          key: the i-th image depends on the key, i, its condition and the settings, not on the rest of the batch.
          cond: labels [b]; for a model of captions their features [b, p, c].
          settings: traced.

        Raises:
          ValueError: labels or settings out of range, or features of another shape.
        """
        cond = self._checked(cond)
        shape = np.shape(settings.cfg)
        if shape not in ((), (self.weights,)):
            raise ValueError(f"cfg of shape {shape}: expected one weight, or {self.weights}, one a {self.weighed}")
        check_settings(**settings._asdict(), vocab=self.generator.vocab)
        return self._sample(params, key, cond, Settings(*map(jnp.float32, settings)))

    @property
    def weights(self) -> int:
        """How many guidance weights a call can be given."""
        return self.generator.length

    def _checked(self, cond):
        model = self.generator
        if model.num_classes:
            return check_labels(cond, model.num_classes)
        cond = jnp.asarray(cond, jnp.float32)
        if cond.ndim != 3 or cond.shape[1:] != (model.prefix, model.caption_width):
            raise ValueError(f"captions {cond.shape}: expected features [b, {model.prefix}, {model.caption_width}]")
        return cond

    def conditions(self, params, key, cond):
        """What the generator is told, [2b, ...]: the conditions, then as many that say nothing; `params` as in a call."""
        null = self.generator.apply(params["generator"], cond.shape[0], method="unconditional")
        return jnp.concatenate([cond, null.astype(cond.dtype)])

    def tokens(self, variables, key, cond, settings) -> Int[Array, "b l"]:
        """Tokens in the order in which the generator makes them; `cond` as from `conditions`."""
        cache = self.generator.apply(variables, self.generator.init_cache(len(cond)), cond, method="begin")
        return sample_tokens(
            stepper(self.generator),
            params=variables,
            cache=cache,
            cond=cond,
            batch=len(cond) // 2,
            order=self.generator.order,
            key=key,
            settings=settings,
            merged=self.merged,
            grammar=self.grammar,
            stop=self.stop,
        )

    @functools.partial(jax.jit, static_argnums=0)
    def _sample(self, params, key, cond, settings):
        variables = params["generator"]
        tokens = self.tokens(variables, key, self.conditions(params, key, cond), settings)
        tokens = self.generator.arrange(tokens)
        if self.tokenizer is None:
            return None, tokens
        # Pixels need no parameters.
        return self.tokenizer.apply(params.get("tokenizer", {}), tokens, method="decode"), tokens
