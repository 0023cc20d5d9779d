"""A class-conditional next-token transformer on the blocks of the next-scale one: the baseline that it is measured against."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.nn.adaln import AdaLNHead
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.orders import Order, raster

__all__ = ["NextTokenTransformer"]


class NextTokenTransformer(nn.Module):
    """Class label and the tokens so far -> logits of the next token.

    Attributes:
      vocab: v.
      num_classes: classes; the label `num_classes` means unconditional.
      length: l, tokens of a sample.
      width, heads, depth, mlp_ratio, l2_norm, drop_path_rate, gate_init, rest_init, scan_layers, remat, dtype: see
        `AdaLNTransformer`.
      head_init: factor on the initial classifier.
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
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    @property
    def init_std(self) -> float:
        """Of all kernels and embeddings."""
        return (1 / (3 * self.width)) ** 0.5

    def setup(self):
        init, steps = nn.initializers.normal(self.init_std), self.order.steps
        self.token_embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.position = self.param("position", init, (steps, self.width))
        self.transformer = AdaLNTransformer(
            **fields_of(self, AdaLNTransformer),
            init_std=self.init_std,
            mask=masks.block_causal(raster(steps)),
        )
        self.head = AdaLNHead(self.vocab, kernel_init=init, rest_init=self.rest_init, head_init=self.head_init)

    def read(self, tokens: Int[Array, "b q"]) -> Float[Array, "b q d"]:
        """What the blocks read of the tokens of q steps."""
        return self.token_embed(tokens)

    def logits(self, x: Float[Array, "b q d"], cond: Float[Array, "b d"]) -> Float[Array, "b q v"]:
        """The laws of the tokens of q steps."""
        return self.head(x, cond)

    def __call__(
        self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], *, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits: position i is predicted from the class and tokens < i."""
        cond = self.class_embed(labels)
        before = self.read(tokens[:, : self.length - self.order.sizes[-1]])
        x = jnp.concatenate([cond[:, None], before], axis=1) + self.position
        x, _ = self.transformer(x, cond, train=train)
        return self.logits(x, cond)

    def unconditional(self, batch: int) -> Int[Array, "b"]:
        """The labels that say nothing."""
        return jnp.full((batch,), self.num_classes, jnp.int32)

    def step(self, cache: KVCache, view: View, labels: Int[Array, "b"]) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`: `view.tokens` [b, q] are the tokens *before* `view.pos`, not read at position 0."""
        cond = self.class_embed(labels)
        before = jnp.where(jnp.asarray(view.pos)[..., None] == 0, cond[:, None], self.read(view.tokens))
        x, cache = self.transformer(before + self.position[view.pos], cond, cache, view.mask)
        return Out(self.logits(x, cond), x), cache

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for `capacity` steps; None is a sample's."""
        return KVCache.zeros(
            layers=self.depth,
            batch=batch,
            capacity=capacity or self.order.steps,
            heads=self.heads,
            head_size=self.width // self.heads,
            dtype=self.dtype,
        )
