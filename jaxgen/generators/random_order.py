"""A next-token transformer of tokens in any order (RAR).

Yu et al. 2024, *Randomized Autoregressive Visual Generation* (arXiv:2411.00776; bytedance/1d-tokenizer). While it learns, the
order of an image's tokens is random, ever less often; it samples in raster order.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import TokenModel
from jaxgen.nn.adaln import AdaLNHead
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.orders import Order, raster

__all__ = ["RandomOrderTransformer"]

# What stands before the tokens: a learned vector, then the class.
PREFIX = 2


class RandomOrderTransformer(TokenModel):
    """Class label and the tokens so far, in any order -> logits of the next one.

    The sequence is a learned vector, the class and the tokens. A vector says where each token lies (`position`), and another,
    added to what comes before a token, where that one lies (`target`), without which a model that is told no order would have
    to guess which token is asked for (section 3.2). All blocks and the head are modulated by the class and the number of tokens
    so far (`time`).

    Attributes:
      vocab: v.
      num_classes: classes; the label `num_classes` means unconditional.
      length: l, tokens of a sample.
      width, heads, depth, mlp_ratio, dropout, gate_init, rest_init, init_std, scan_layers, remat, dtype: see `AdaLNTransformer`.

    Example:
      >>> model = RandomOrderTransformer(vocab=1024, num_classes=1000, length=256, width=768, heads=16, depth=24)
      >>> logits = model.apply(params, labels, tokens, orders)  # labels [b], tokens and orders [b, 256]
    """

    vocab: int
    num_classes: int
    length: int
    width: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gate_init: float = 0.0
    rest_init: float = 0.0
    init_std: float = 0.02
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @property
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    def setup(self):
        init, rows = nn.initializers.truncated_normal(self.init_std), self.length + PREFIX
        self.token_embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.start = self.param("start", nn.initializers.zeros_init(), (self.width,))
        self.position = self.param("position", init, (rows, self.width))
        self.target = self.param("target", init, (self.length, self.width))
        self.time = self.param("time", init, (rows, self.width))
        options = dict(head_norm=True, learned_norms=True, exact_gelu=True, mask=masks.block_causal(raster(rows)))
        self.transformer = AdaLNTransformer(**fields_of(self, AdaLNTransformer), **options)
        self.head = AdaLNHead(self.vocab, kernel_init=init, rest_init=self.rest_init, head_init=1.0)

    def __call__(
        self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], orders: Int[Array, "b l"] | None = None, *, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits: the i-th of an order is predicted from the class and those before it.

        Args:
          labels: classes.
          tokens: in raster order.
          orders: a permutation of the positions for each row; None is raster order.
          train: drops; needs the rng stream "dropout".
        """
        return self.read(labels, tokens, orders, train=train)[:, :-1]

    def read(
        self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], orders: Int[Array, "b l"] | None = None, *, train: bool = False
    ) -> Float[Array, "b l+1 v"]:
        """The same with one more, behind the last token, where nothing is to predict: all that the published model returns."""
        b = tokens.shape[0]
        orders = jnp.broadcast_to(jnp.arange(self.length), (b, self.length)) if orders is None else orders
        classes = self.class_embed(labels)[:, None]
        start = jnp.broadcast_to(self.start, (b, 1, self.width))
        x = jnp.concatenate([start, classes, self.token_embed(jnp.take_along_axis(tokens, orders, axis=1))], axis=1)
        prefix = jnp.broadcast_to(self.position[:PREFIX], (b, PREFIX, self.width))
        x = x + jnp.concatenate([prefix, self.position[PREFIX + orders]], axis=1)
        x = x.at[:, PREFIX - 1 : -1].add(self.target[orders])
        cond = classes + self.time
        x, _ = self.transformer(x, cond, train=train)
        return self.head(x[:, PREFIX - 1 :], cond[:, PREFIX - 1 :])

    def begin(self, cache: KVCache, labels: Int[Array, "b"]) -> KVCache:
        """The cache with the learned vector; `step` reads the class at position 0."""
        n = PREFIX - 1
        x = jnp.broadcast_to(self.start + self.position[:n], (*labels.shape, n, self.width))
        _, cache = self.transformer(x, self.class_embed(labels)[:, None] + self.time[:n], cache)
        return cache.commit(n)

    def step(self, cache: KVCache, view: View, labels: Int[Array, "b"]) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`, in raster order: `view.tokens` [b, q] are the tokens *before* `view.pos`."""
        pos = jnp.asarray(view.pos)
        classes, row = self.class_embed(labels)[:, None], PREFIX - 1 + pos
        x = jnp.where(pos[..., None] == 0, classes, self.token_embed(view.tokens)) + self.position[row] + self.target[pos]
        cond = classes + self.time[row]
        x, cache = self.transformer(x, cond, cache, view.mask)
        return Out(self.head(x, cond), x), cache

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for the learned vector and `capacity` positions; None is a sample's."""
        return KVCache.zeros(
            layers=self.depth,
            batch=batch,
            capacity=PREFIX - 1 + (capacity or self.length),
            heads=self.heads,
            head_size=self.width // self.heads,
            dtype=self.dtype,
        )
