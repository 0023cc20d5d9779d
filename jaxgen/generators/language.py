"""A causal language model on the Llama-style stack: text as bytes, or any other tokens in a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import LlamaModel
from jaxgen.orders import raster

__all__ = ["LanguageModel"]


class LanguageModel(LlamaModel):
    """Tokens -> logits of the next token at each position.

    Attributes:
      experts, experts_used: see `LlamaTransformer`.
      tied: one matrix embeds tokens and scores them.
      vocab, width, ...: see `LlamaModel`.
    """

    experts: int = 0
    experts_used: int = 2
    tied: bool = False

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.setup_blocks(init)  # a head that is tied is not called, and so has no parameters

    def __call__(self, tokens: Int[Array, "b l"], *, active: Bool[Array, "l n"] | None = None) -> Float[Array, "b l v"]:
        """Float32 logits; position i sees tokens <= i. `active` as in `LlamaTransformer`."""
        return self.logits(self.features(tokens, active=active))

    def features(
        self, tokens: Int[Array, "b l"], *, layers: tuple[int, int] | None = None, active: Bool[Array, "l n"] | None = None
    ) -> Float[Array, "b l d"]:
        """The last block's output, or that of block `layers[1]` - 1; before the last norm."""
        pos, mask = jnp.arange(tokens.shape[1]), masks.block_causal(raster(tokens.shape[1]))
        return self.transformer(self.embed(tokens), pos, None, mask, layers=layers, active=active)[0]

    def logits(self, features: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """The last norm and the head, in float32."""
        if not self.tied:
            return super().logits(features)
        return (self.norm(features).astype(self.dtype) @ self.embed.embedding.T.astype(self.dtype)).astype(jnp.float32)

    def step(
        self,
        cache: KVCache,
        view: View,
        cond=None,
        *,
        layers: tuple[int, int] | None = None,
        active: Bool[Array, "n"] | None = None,
        saturation: Mapping[str, Any] | None = None,
        vectors: Float[Array, "b q d"] | None = None,
    ) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`: the law after each token; `Out.feats` are `features`.

        Args:
          cache, view, cond: see `jaxgen.decoding.step`.
          layers: only these blocks run, and the head reads what they make (early exit); the others' cache stays as it is.
          active: see `LlamaTransformer`.
          saturation: options of `LlamaTransformer.saturating`; then `Out.aux` says which MLPs each token passed.
          vectors: read in place of the tokens' embeddings.
        """
        x = self.embed(view.tokens) if vectors is None else vectors
        if saturation is not None:
            x, cache, skipped = self.transformer.saturating(x, view.pos, cache, view.mask, **saturation)
            return Out(self.logits(x), x, skipped), cache
        x, cache = self.transformer(x, view.pos, cache, view.mask, layers=layers, active=active)
        return Out(self.logits(x), x), cache

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` positions."""
        return self.empty_cache(batch, capacity)
