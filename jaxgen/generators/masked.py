"""A bidirectional transformer over masked tokens with a class condition: MaskGIT's model on the AdaLN blocks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.nn.adaln import AdaLNHead
from jaxgen.nn.transformer import AdaLNTransformer

__all__ = ["MaskedTransformer"]


class MaskedTransformer(nn.Module):
    """Class label and tokens, some of them masked -> logits of every position (Chang et al. 2022).

    Attributes:
      vocab: v; the id v is the mask.
      num_classes: classes; the label `num_classes` means unconditional.
      length: l, tokens of a sample.
      width, heads, depth, mlp_ratio, l2_norm, drop_path_rate, gate_init, rest_init, scan_layers, remat, dtype: see
        `AdaLNTransformer`.
      head_init: factor on the initial classifier.

    Example:
      >>> model = MaskedTransformer(vocab=64, num_classes=10, length=16, width=64, heads=2, depth=2)
      >>> tokens, masked = Masking(model.mask, Cosine()).corrupt(key, data, t)      # data [b, 16], t [b]
      >>> logits = model.apply(params, labels, tokens)                              # [b, 16, 64]
    """

    vocab: int
    num_classes: int
    length: int
    width: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    l2_norm: bool = True
    drop_path_rate: float = 0.0
    gate_init: float = 1e-3
    rest_init: float = 0.5
    head_init: float = 0.02
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def mask(self) -> int:
        """The id of masked tokens."""
        return self.vocab

    def setup(self):
        std = (1 / (3 * self.width)) ** 0.5
        init = nn.initializers.normal(std)
        self.token_embed = nn.Embed(self.vocab + 1, self.width, embedding_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.position = self.param("position", init, (self.length, self.width))
        self.transformer = AdaLNTransformer(**fields_of(self, AdaLNTransformer), init_std=std)
        self.head = AdaLNHead(self.vocab, kernel_init=init, rest_init=self.rest_init, head_init=self.head_init)

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
        return KVCache.zeros(
            layers=self.depth,
            batch=batch,
            capacity=self.length,
            heads=self.heads,
            head_size=self.width // self.heads,
            dtype=self.dtype,
        )
