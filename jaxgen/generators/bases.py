"""What generators have in common: the seam of those that sample tokens in turn, and what those on the same blocks share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.nn.adaln import AdaLNHead
from jaxgen.nn.llama import LlamaTransformer
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.nn.two_stacks import TwoStacks

__all__ = ["AdaLNModel", "FlowModel", "LlamaModel", "TokenModel"]


class TokenModel(nn.Module):
    """What `NextTokenSampler` asks of a model, as far as most do alike.

    A subclass has `vocab`, `num_classes`, `length`, `order`, `init_cache(batch)` and `step`.
    """

    def drop(self, cond, rows: Bool[Array, "b"]):
        """The conditions with those of some rows replaced by one that says nothing (Ho & Salimans 2021); labels here."""
        return jnp.where(rows, self.num_classes, cond)

    def begin(self, cache: Any, cond) -> Any:
        """The cache with what stands before the first call of `step`: nothing here."""
        return cache

    def arrange(self, tokens: Int[Array, "b l"]) -> Int[Array, "b l"]:
        """Tokens in raster order from tokens in the order in which they are made, which is the same here."""
        return tokens

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        labels, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.length), jnp.int32)
        return jax.eval_shape(lambda key: self.init(key, labels, tokens), jax.random.key(0))


class AdaLNModel(nn.Module, kw_only=True):
    """A generator on `AdaLNTransformer`, with an `AdaLNHead`.

    Attributes:
      vocab: v.
      width, heads, depth, mlp_ratio, l2_norm, drop_path_rate, gate_init, rest_init, scan_layers, remat, dtype: see
        `AdaLNTransformer`.
      head_init: factor on the initial classifier.
    """

    vocab: int
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
    def init_std(self) -> float:
        """Of all kernels and embeddings."""
        return (1 / (3 * self.width)) ** 0.5

    def build_transformer(self, **fields: Any) -> AdaLNTransformer:
        """The blocks, with `fields` that are not, or not only, the model's own."""
        return AdaLNTransformer(**fields_of(self, AdaLNTransformer) | dict(init_std=self.init_std) | fields)

    def build_head(self) -> AdaLNHead:
        """From what the blocks leave to logits."""
        init = nn.initializers.normal(self.init_std)
        return AdaLNHead(self.vocab, kernel_init=init, rest_init=self.rest_init, head_init=self.head_init)

    def empty_cache(self, batch: int, capacity: int, layers: int | None = None) -> KVCache:
        """Room for `capacity` positions in each of the blocks, or in so many."""
        return _cache(self, self.heads, batch, capacity, layers)


class LlamaModel(nn.Module, kw_only=True):
    """A generator on `LlamaTransformer`.

    Attributes:
      vocab: v.
      width, heads, depth, kv_heads, hidden, theta, init_std, scan_layers, remat, dtype: see `LlamaTransformer`.
    """

    vocab: int
    width: int
    heads: int
    depth: int
    kv_heads: int = 0
    hidden: int = 0
    theta: float = 10000.0
    init_std: float = 0.02
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def setup_blocks(self, head_init: Any, outputs: int | None = None) -> None:
        """Makes the blocks, the last norm and a head without bias, of so many outputs; None is the vocabulary's."""
        self.transformer = LlamaTransformer(**fields_of(self, LlamaTransformer))
        self.norm = nn.RMSNorm(epsilon=1e-5)
        self.head = nn.Dense(outputs or self.vocab, use_bias=False, kernel_init=head_init, dtype=self.dtype)

    def logits(self, features: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """The last norm and the head, in float32."""
        return self.head(self.norm(features).astype(self.dtype)).astype(jnp.float32)

    def empty_cache(self, batch: int, capacity: int, layers: int | None = None) -> KVCache:
        """Room for `capacity` positions in each of the blocks, or in so many."""
        return _cache(self, self.kv_heads or self.heads, batch, capacity, layers)


class FlowModel(nn.Module):
    """A generator of continuous tokens on `TwoStacks`; a subclass has an `order`, and its call is `(labels, tokens, key)`.

    Attributes:
      channels: c, numbers a token.
      grid: tokens along a side.
      num_classes: classes; the label `num_classes` means unconditional.
      width, depth, heads, mlp_ratio, dropout, gate_init, rest_init, scan_layers, remat, dtype, implementation: see `TwoStacks`.
    """

    channels: int
    grid: int
    num_classes: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gate_init: float = 1.0
    rest_init: float = 1.0
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    def build_stacks(self) -> TwoStacks:
        """The blocks."""
        return TwoStacks(**fields_of(self, TwoStacks), length=self.order.length)

    def init_cache(self, batch: int) -> tuple[KVCache, KVCache]:
        """Empty caches of both stacks for all tokens of `batch` rows."""
        return tuple(_cache(self, self.heads, batch, self.order.length, None) for _ in range(2))

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        tokens = jnp.zeros((1, self.grid**2, self.channels))
        key = jax.random.key(0)
        return jax.eval_shape(lambda key: self.init(key, jnp.zeros((1,), jnp.int32), tokens, key), key)


def _cache(model: Any, heads: int, batch: int, capacity: int, layers: int | None) -> KVCache:
    sizes = dict(layers=layers or model.depth, batch=batch, capacity=capacity)
    return KVCache.zeros(**sizes, heads=heads, head_size=model.width // model.heads, dtype=model.dtype)
