"""A class-conditional next-token transformer on the blocks of the next-scale one: the baseline that it is measured against."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import AdaLNModel, TokenModel
from jaxgen.orders import Order, raster

__all__ = ["NextTokenTransformer"]


class NextTokenTransformer(TokenModel, AdaLNModel):
    """Class label and the tokens so far -> logits of the next token.

    Attributes:
      num_classes: classes; the label `num_classes` means unconditional.
      length: l, tokens of a sample.
      vocab, width, ...: see `AdaLNModel`.
    """

    num_classes: int
    length: int

    @property
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    def setup(self):
        init, steps = nn.initializers.normal(self.init_std), self.order.steps
        self.token_embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.position = self.param("position", init, (steps, self.width))
        self.transformer = self.build_transformer(mask=masks.block_causal(raster(steps)))
        self.head = self.build_head()

    def read(self, tokens: Int[Array, "b q"]) -> Float[Array, "b q d"]:
        """What the blocks read of the tokens of q steps."""
        return self.token_embed(tokens)

    def logits(self, x: Float[Array, "b q d"], cond: Float[Array, "b d"]) -> Float[Array, "b q v"]:
        """The laws of the tokens of q steps."""
        return self.head(x, cond)

    def __call__(self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits: position i is predicted from the class and tokens < i."""
        cond = self.class_embed(labels)
        before = self.read(tokens[:, : self.length - self.order.sizes[-1]])
        x = jnp.concatenate([cond[:, None], before], axis=1) + self.position
        x, _ = self.transformer(x, cond, train=train)
        return self.logits(x, cond)

    def step(self, cache: KVCache, view: View, labels: Int[Array, "b"]) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`: `view.tokens` [b, q] are the tokens *before* `view.pos`, not read at position 0."""
        cond = self.class_embed(labels)
        before = jnp.where(jnp.asarray(view.pos)[..., None] == 0, cond[:, None], self.read(view.tokens))
        x, cache = self.transformer(before + self.position[view.pos], cond, cache, view.mask)
        return Out(self.logits(x, cond), x), cache

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for `capacity` steps; None is a sample's."""
        return self.empty_cache(batch, capacity or self.order.steps)
