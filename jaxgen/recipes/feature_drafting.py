"""Training a drafter of features: what the text and the vision-language systems share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxgen.generators.feature_drafter import FeatureDrafter, embed_tokens
from jaxgen.objectives.glancing import feature_distillation, glance
from jaxgen.recipes import language
from jaxgen.recipes.fields import check_fields

__all__ = ["DrafterConfig", "RULES", "distil_features"]

# A decoder block as a model's, and what makes its vectors.
RULES = (
    (r"lstm_\d+/(input/)?kernel", P("fsdp", None, "tensor")),
    (r"(mix|look|compressor/conv)/kernel", P("fsdp", "tensor")),
    (r"compressor/[qkv]/kernel", P("fsdp", "tensor", None)),
    (r"compressor/o/kernel", P("tensor", None, "fsdp")),
    *language.RULES,
)


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """A `FeatureDrafter` and its loss.

    Attributes:
      block: k, tokens drafted a pass.
      recurrent: layers of the LSTM; 0 is EAGLE's linear map.
      heads, kv_heads, hidden: of the decoder block; heads=0 takes all three from the target.
      glance: share of the wrong positions that are shown at first; falls to 0 while training. 0 shows none.
      noise: features that are read get uniform noise of this size on top, so that guessed ones do not surprise.
      distil: weight of the loss on laws, against 1 for features.
      soft: of the KL within it, against the likelihood of tokens drawn from the target.
    """

    block: int = 2
    recurrent: int = 2
    heads: int = 0
    kv_heads: int = 0
    hidden: int = 0
    glance: float = 0.4
    noise: float = 0.1
    distil: float = 0.1
    soft: float = 0.9

    def __post_init__(self):
        least = dict(block=1, recurrent=0, heads=0, kv_heads=0, hidden=0, noise=0, distil=0)
        check_fields("drafter", self, **least, shares=("glance", "soft"))

    def build(self, model: Any, **fields) -> FeatureDrafter:
        """The module, for a target of `LanguageModel`'s fields."""
        source = self if self.heads else model
        sizes = dict(heads=source.heads, kv_heads=source.kv_heads, hidden=source.hidden, theta=model.theta)
        return FeatureDrafter(width=model.width, block=self.block, recurrent=self.recurrent, dtype=model.dtype, **sizes, **fields)


def distil_features(
    config: DrafterConfig,
    drafter: FeatureDrafter,
    variables: Any,
    model: Any,
    target: Any,
    tokens: Int[Array, "b l+1"],
    features: Float[Array, "b l d"],
    weights: Float[Array, "b l"],
    key: Key[Array, ""] | None,
    share: float | Float[Array, ""] = 0.0,
    **picture,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """(loss, metrics) of one batch.

    With a key, read features get noise, blocks begin anywhere, and where `share` of the wrong positions is to be shown there is a
    first pass that finds the wrong ones. Positions that were shown do not count: their own answer is what they read.

    Args:
      config: of the loss.
      drafter, variables: the module.
      model, target: the target, with `embed` and `logits`.
      tokens: one more than there are features.
      features: the target's unit features of tokens 0..l-1.
      weights: of features and of the tokens after them.
      key: of a training step.
      share: see `glance`.
      **picture: `prefix` and `count` of `FeatureDrafter.__call__`.
    """
    k, l = drafter.block, features.shape[1]
    logits = model.apply(target, features, method="logits")
    embedded = embed_tokens(model, target, tokens)
    read, shift, labels = features, 0, None
    if key is not None:
        noise_key, shift_key, glance_key, label_key = jax.random.split(key, 4)
        read = features + jax.random.uniform(noise_key, features.shape, minval=-config.noise, maxval=config.noise)
        shift = jax.random.randint(shift_key, (), 0, k)
        labels = jax.random.categorical(label_key, logits)
    # Vector s gives feature s and is pair s - k + 1; the last k - 1 pairs would give features that are not there.
    pairs = embedded[:, : l - k + 1], jnp.pad(read, ((0, 0), (1, 0), (0, 0)))[:, : l - k + 1]

    def guess(pairs):
        guesses = drafter.apply(variables, *pairs, shift=shift, **picture)
        return guesses, model.apply(target, guesses, method="logits")

    # Blocks that are cut off at the front have read no token.
    weights = weights * ((jnp.arange(l) >= k - shift) | (jnp.asarray(shift) == 0))
    shown = jnp.zeros(weights.shape, bool)
    if key is not None and config.glance and k > 1:
        _, first = jax.lax.stop_gradient(guess(pairs))
        wrong = (first.argmax(-1) != logits.argmax(-1)) & (weights > 0)
        shown = glance(glance_key, wrong, share, block=k, shift=shift)
        own = embedded[:, k : l + 1], features[:, k - 1 :]
        pairs = tuple(jnp.where(shown[:, k - 1 :, None], answer, pair) for answer, pair in zip(own, pairs))
    guesses, guessed = guess(pairs)
    weights = jnp.where(shown, 0.0, weights)
    soft = config.soft if labels is not None else 1.0
    loss, metrics = feature_distillation(
        features, guesses, logits, guessed, weights, labels=labels, distil=config.distil, soft=soft
    )
    return loss, metrics | {"shown": shown.mean()}
