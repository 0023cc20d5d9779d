"""A language model of Mamba-2 layers, with attention between them if wanted, that decodes chains and trees of drafts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.decoding import HybridCache, KVCache, Out, RecurrentCache, View
from jaxgen.nn.llama import LlamaBlock
from jaxgen.nn.placement import place_rows
from jaxgen.nn.recurrent import RecurrentState
from jaxgen.nn.ssm import Mamba2
from jaxgen.orders import raster

__all__ = ["StateSpaceModel"]


class StateSpaceModel(nn.Module):
    """Tokens -> logits of the next token at each position: x + mamba(norm(x)), `depth` times.

    Attributes:
      vocab: v.
      width: d.
      depth: number of blocks.
      attention_every: every so many blocks one of the Llama-style stack comes instead (a hybrid); 0 has none.
      heads: of attention.
      state_size, head_size, expand, conv_size: see `Mamba2`.
      init_std: of embeddings and head.
      dtype: of the computation.
    """

    vocab: int
    width: int
    depth: int
    attention_every: int = 0
    heads: int = 4
    state_size: int = 64
    head_size: int = 32
    expand: int = 2
    conv_size: int = 4
    init_std: float = 0.02
    dtype: Any = jnp.float32

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.blocks = [self._attention() if self._attends(i) else self._mamba() for i in range(self.depth)]
        self.norms = [nn.RMSNorm(epsilon=1e-5) for i in range(self.depth) if not self._attends(i)]
        self.norm = nn.RMSNorm(epsilon=1e-5)
        self.head = nn.Dense(self.vocab, use_bias=False, kernel_init=init, dtype=self.dtype)

    def _attends(self, i: int) -> bool:
        return bool(self.attention_every) and i % self.attention_every == self.attention_every - 1

    def _mamba(self, **fields) -> Mamba2:
        sizes = dict(state_size=self.state_size, head_size=self.head_size, expand=self.expand, conv_size=self.conv_size)
        return Mamba2(**sizes, dtype=self.dtype, **fields)

    def _attention(self) -> LlamaBlock:
        hidden = -(-8 * self.width // 96) * 32
        return LlamaBlock(self.heads, self.heads, hidden, self.depth, init_std=self.init_std, dtype=self.dtype)

    def __call__(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l v"]:
        """Float32 logits; position i sees tokens <= i."""
        length = tokens.shape[1]
        x, pos, mask = place_rows(self.embed(tokens).astype(self.dtype)), jnp.arange(length), masks.block_causal(raster(length))
        norms = iter(self.norms)
        for i, block in enumerate(self.blocks):
            if self._attends(i):
                x = block((x, None), 0, pos, mask)[0][0]
            else:
                x = place_rows(x + block(next(norms)(x).astype(self.dtype))[0].astype(x.dtype))
        return self._logits(x)

    def _logits(self, x):
        return self.head(self.norm(x).astype(self.dtype)).astype(jnp.float32)

    def step(self, cache: RecurrentCache | HybridCache, view: View, cond=None) -> tuple[Out, RecurrentCache | HybridCache]:
        """The seam of `jaxgen.decoding`, for chains and trees."""
        x = self.embed(view.tokens).astype(self.dtype)
        q = x.shape[1]
        mask = jnp.ones((q, q), bool) if view.mask is None else view.mask
        recurrent, attention = (cache.recurrent, cache.attention) if self.attention_every else (cache, None)
        norms, layer = iter(self.norms), 0
        for i, block in enumerate(self.blocks):
            if self._attends(i):
                (x, attention), _ = block((x, attention), i - layer, view.pos, mask)
            else:
                state = RecurrentState(recurrent.memory[layer], recurrent.conv[layer])
                out, nodes = block(next(norms)(x).astype(self.dtype), state, mask)
                x, recurrent, layer = x + out.astype(x.dtype), recurrent.stage(layer, nodes), layer + 1
        return Out(self._logits(x), x), HybridCache(recurrent, attention) if self.attention_every else recurrent

    def init_cache(self, batch: int, capacity: int) -> RecurrentCache | HybridCache:
        """An empty cache; only attention needs `capacity`."""
        attends = [self._attends(i) for i in range(self.depth)]
        states = [self._mamba(parent=None).init_state(batch, self.width) for a in attends if not a]
        if not self.attention_every:
            return RecurrentCache.of(states)
        sizes = dict(heads=self.heads, head_size=self.width // self.heads, dtype=self.dtype)
        return HybridCache(RecurrentCache.of(states), KVCache.zeros(layers=sum(attends), batch=batch, capacity=capacity, **sizes))
