"""A bidirectional transformer over masked tokens with a class condition: MaskGIT's model on the AdaLN blocks."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import AdaLNModel

__all__ = ["MaskedTransformer"]


class MaskedTransformer(AdaLNModel):
    """Class label and tokens, some of them masked -> logits of every position (Chang et al. 2022).

    Attributes:
      num_classes: classes; the label `num_classes` means unconditional.
      length: l, tokens of a sample.
      vocab, width, ...: see `AdaLNModel`; the id v is the mask.

    Example:
      >>> model = MaskedTransformer(vocab=64, num_classes=10, length=16, width=64, heads=2, depth=2)
      >>> tokens, masked = Masking(model.mask, Cosine()).corrupt(key, data, t)      # data [b, 16], t [b]
      >>> logits = model.apply(params, labels, tokens)                              # [b, 16, 64]
    """

    num_classes: int
    length: int

    @property
    def mask(self) -> int:
        """The id of masked tokens."""
        return self.vocab

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.token_embed = nn.Embed(self.vocab + 1, self.width, embedding_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.position = self.param("position", init, (self.length, self.width))
        self.transformer = self.build_transformer()
        self.head = self.build_head()

    def __call__(self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Float32 logits of each position's own token, given all tokens that are not masked."""
        return self._run(labels, tokens, jnp.arange(self.length), train=train)[0].params

    def step(self, cache: KVCache | tuple, view: View, labels: Int[Array, "b"]) -> tuple[Out, KVCache | tuple]:
        """The seam of `jaxgen.decoding.refine`; without a cache, (), the view is the whole sequence."""
        out, new = self._run(labels, view.tokens, view.pos, cache or None, view.mask)
        return out, new if cache else cache

    def _run(self, labels, tokens, pos, cache=None, mask=None, *, train=False):
        cond = self.class_embed(labels)
        x = self.token_embed(tokens) + self.position[pos]
        x, cache = self.transformer(x, cond, cache, mask, train=train)
        return Out(self.head(x, cond), x), cache

    def init_cache(self, batch: int) -> KVCache:
        """An empty cache with room for a sample, for layouts that freeze what is clean."""
        return self.empty_cache(batch, self.length)
