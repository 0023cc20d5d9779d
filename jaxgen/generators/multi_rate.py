"""A frozen language model with a second, faster residual stream that says early what the last block will say (M2R2)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.adapters import init_low_rank, linear_layers, low_rank_layers
from jaxgen.decoding import KVCache, Out, View
from jaxgen.generators.language import LanguageModel

__all__ = ["MultiRateModel"]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class MultiRateModel:
    """Two streams through the first E = depth / rate blocks (Bhendawade et al. 2025, arXiv:2502.02040).

    The slow stream x is the base model's own. The fast stream p starts where it does and passes the same blocks with low-rank
    adapters added; it writes no keys and values but asks the slow stream's, its own token's included. After E blocks the base
    model's head reads p, which is trained to say what the head says of x after all `depth` blocks.

    Variables: {"base": of the language model, "adapters": {path: {"a", "b"}}}; only the adapters are trained.

    Attributes:
      base: unrolled.
      rate: R, how much faster the second stream is; divides the depth.
      rank: of the adapters.
    """

    base: LanguageModel
    rate: int = 2
    rank: int = 16

    def __post_init__(self):
        if self.rate < 2 or self.base.depth % self.rate:
            raise ValueError(f"rate={self.rate}: must be at least 2 and divide the depth {self.base.depth}")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")

    @property
    def vocab(self) -> int:
        """v."""
        return self.base.vocab

    @property
    def exit(self) -> int:
        """E, blocks of the fast stream."""
        return self.base.depth // self.rate

    def init(self, key: Key[Array, ""], base: PyTree) -> PyTree:
        """What is trained, for a base model with variables `base`."""
        layers = linear_layers(self.base, base, jnp.zeros((1, 4), jnp.int32))
        fast = tuple(f"transformer/blocks_{i}/" for i in range(self.exit))
        parts = ("attention/", "mlp/")

        def where(path):
            return path.startswith(fast) and any(part in path for part in parts) and "router" not in path

        return {"adapters": init_low_rank(key, layers, rank=self.rank, where=where)}

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """For the blocks that both streams pass."""
        return self.base.clone(depth=self.exit).init_cache(batch, capacity)

    def apply(self, variables: PyTree, cache: KVCache, view: View, cond=None, *, method: str = "step") -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding` for drafts: the fast stream's law after each token; `Out.feats` are both streams."""
        if method != "step":
            raise ValueError(f"method={method!r}: only 'step' is there")
        (slow, fast), cache = self.streams(variables, view.tokens, view.pos, cache, view.mask)
        logits = self.base.apply(variables["base"], fast[-1], method="logits")
        return Out(logits, fast[-1], (slow, fast)), cache

    def streams(self, variables: PyTree, tokens: Int[Array, "b q"], pos, cache: KVCache, mask):
        """((slow, fast), cache): what goes into each of the first E blocks, and what comes out of the last, E + 1 arrays each."""
        return self.base.apply(variables["base"], tokens, pos, cache, mask, variables["adapters"], method=self._streams)

    def _streams(self, model: nn.Module, tokens, pos, cache, mask, adapters):
        x = p = model.embed(tokens).astype(model.dtype)
        slow, fast = [x], [p]
        for i in range(self.exit):
            block = model.transformer.blocks[i]
            x, cache = block.attend(x, pos, cache, i, mask)
            with low_rank_layers(adapters):
                p, _ = block.attend(p, pos, cache, i, mask, stage=False)
                p = block.feed_forward(p)
            x = block.feed_forward(x)
            slow.append(x)
            fast.append(p)
        return (tuple(slow), tuple(fast)), cache

    def routes(self, variables: PyTree, feats: Float[Array, "b q d"], block: int) -> Int[Array, "b q k"]:
        """The experts that block `block` of the base model would use for these vectors."""
        return self.base.apply(variables["base"], feats, method=lambda m, x: m.transformer.blocks[block].route(x)[1])
