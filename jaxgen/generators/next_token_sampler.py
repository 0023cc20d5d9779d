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
from jaxgen.nn.cross_attention import Context
from jaxgen.tokenizers.flexible import FlexibleTokenizer
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer

__all__ = ["NextTokenSampler", "check_condition"]


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
          cond: labels [b]; for a model of captions a `Context` of their features [b, p, c], see `ImageLlama`.
          settings: traced.

        Raises:
          ValueError: labels or settings out of range, or captions of another shape.
        """
        cond = check_condition(cond, self.generator)
        shape = np.shape(settings.cfg)
        if shape not in ((), (self.weights,)):
            raise ValueError(f"cfg of shape {shape}: expected one weight, or {self.weights}, one a {self.weighed}")
        check_settings(**settings._asdict(), vocab=self.generator.vocab)
        return self._sample(params, key, cond, Settings(*map(jnp.float32, settings)))

    @property
    def weights(self) -> int:
        """How many guidance weights a call can be given."""
        return self.generator.length

    def conditions(self, params, key, cond):
        """What the generator is told, [2b, ...]: the conditions, then as many that say nothing; `params` as in a call."""
        null = self.generator.apply(params["generator"], cond, jnp.ones(_rows(cond), bool), method="drop")
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), cond, null)

    def tokens(self, variables, key, cond, settings) -> Int[Array, "b l"]:
        """Tokens in the order in which the generator makes them; `cond` as from `conditions`."""
        rows = _rows(cond)
        cache = self.generator.apply(variables, self.generator.init_cache(rows), cond, method="begin")
        return sample_tokens(
            stepper(self.generator),
            params=variables,
            cache=cache,
            cond=cond,
            batch=rows // 2,
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


def check_condition(cond, model: TokenModel) -> Int[Array, "b"] | Context:
    """`cond` as `model` reads it: int32 labels [b], or a `Context` of captions.

    Raises:
      ValueError: see `check_labels`; no `Context`, or one of other shapes than the model's.
    """
    if model.num_classes:
        return check_labels(cond, model.num_classes)
    if not isinstance(cond, Context):
        raise ValueError(f"captions of type {type(cond).__name__}: expected a Context of features and a mask")
    features, mask = jnp.asarray(cond.features, jnp.float32), jnp.asarray(cond.mask, bool)
    if features.ndim != 3 or features.shape[1:] != (model.prefix, model.caption_width) or mask.shape != features.shape[:2]:
        expected = f"features [b, {model.prefix}, {model.caption_width}] and a mask [b, {model.prefix}]"
        raise ValueError(f"captions {features.shape} with a mask {mask.shape}: expected {expected}")
    return Context(features, mask)


def _rows(cond) -> int:
    """2b or b, of labels or captions."""
    return jax.tree.leaves(cond)[0].shape[0]
