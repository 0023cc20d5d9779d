"""A block-diffusion language model on the Llama-style stack: blocks one after another, each by masked diffusion."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import LlamaModel
from jaxgen.orders import Order, blocks

__all__ = ["BlockDiffusionTransformer"]


class BlockDiffusionTransformer(LlamaModel):
    """Noisy tokens of each block and clean ones of those before it -> logits of every position (BD3-LM, Arriola et al. 2025).

    Attributes:
      block: positions of a block; as long as the sequence, it is a masked diffusion model, 1 is an autoregressive one.
      implementation: see `LlamaTransformer`.
      vocab, width, ...: see `LlamaModel`; the id v is the mask.

    Example:
      >>> model = BlockDiffusionTransformer(vocab=256, block=4, width=64, heads=2, depth=2)
      >>> noisy, masked = Masking(model.mask).corrupt(key, tokens, t)               # tokens [b, l], t [b, l]
      >>> logits = model.apply(params, noisy, tokens)                               # [b, l, 256]
    """

    block: int
    implementation: str | None = None

    @property
    def mask(self) -> int:
        """The id of masked tokens."""
        return self.vocab

    def order(self, length: int) -> Order:
        """The blocks of a sequence."""
        return blocks(length, self.block)

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.embed = nn.Embed(self.vocab + 1, self.width, embedding_init=init)
        self.setup_blocks(init)

    def __call__(self, noisy: Int[Array, "b l"], tokens: Int[Array, "b l"]) -> Float[Array, "b l v"]:
        """Float32 logits of the noisy positions, all blocks at once.

        Noisy tokens and clean ones are read side by side: a noisy block sees itself and the clean blocks before it, a clean one
        itself and those before it, which are the keys and values that sampling keeps.
        """
        length = tokens.shape[1]
        both = self.embed(jnp.concatenate([noisy, tokens], axis=1))
        pos = jnp.tile(jnp.arange(length), 2)
        x, _ = self.transformer(both, pos, None, masks.block_diffusion(self.order(length)))
        return self.logits(x[:, :length])

    def step(self, cache: KVCache, view: View, cond=None) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding.refine`: a block in the light of the kept ones, or several under a view's mask."""
        x, cache = self.transformer(self.embed(view.tokens), view.pos, cache, view.mask)
        return Out(self.logits(x), x), cache

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` positions."""
        return self.empty_cache(batch, capacity)
