"""The Llama of images whose every cell is several tokens, read as one vector and predicted at once (ELM, Liu et al. 2024)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding.cache import KVCache
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.generators.next_token_sampler import NextTokenSampler
from jaxgen.orders import Order

__all__ = ["SubVocabularyLlama", "SubVocabularySampler"]


class SubVocabularyLlama(ImageLlama):
    """Condition and the cells so far -> logits of the n tokens of the next cell (Liu et al. 2024, arXiv:2410.16257, section 4.3).

    A cell's code is n tokens of a small vocabulary instead of one of v^n. Each has an embedding; they stand side by side and are
    projected to one vector. Each has a head, and given the cells before they are independent of one another. With n = 1 this is
    `ImageLlama`.

    Attributes:
      those of `ImageLlama`, where `vocab` is of one token and the grid is of cells.
      parts: n.

    Raises:
      ValueError: no parts, or see `ImageLlama`.

    Example:
      >>> model = SubVocabularyLlama(vocab=16, parts=2, grid=4, num_classes=10, width=64, heads=2, depth=2)
      >>> params = model.init(key, labels, tokens)              # labels [b], tokens [b, 32]: cell by cell
      >>> logits = model.apply(params, labels, tokens)          # [b, 32, 16]
    """

    parts: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.parts < 1:
            raise ValueError(f"parts={self.parts}: expected at least 1")

    @property
    def cells(self) -> int:
        """Of an image."""
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Tokens of an image."""
        return self.cells * self.parts

    @property
    def together(self) -> int:
        """Tokens of a cell."""
        return self.parts

    @property
    def order(self) -> Order:
        """One cell a step."""
        return Order(((self.parts,),) * self.cells)

    def setup(self):
        super().setup()
        init = nn.initializers.normal(self.init_std)
        if self.parts > 1:
            self.join = nn.Dense(self.width, use_bias=False, kernel_init=init, dtype=self.dtype)

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for the condition and `capacity` cells; None is an image's."""
        return super().init_cache(batch, capacity or self.cells)

    def _read(self, tokens: Int[Array, "b q*n"]) -> Float[Array, "b q d"]:
        rows = tokens.reshape(len(tokens), -1, self.parts) + self.vocab * jnp.arange(self.parts)
        x = self.token_embed(rows).reshape(*rows.shape[:2], -1)
        return self.join(x) if self.parts > 1 else x

    def logits(self, features: Float[Array, "b q d"]) -> Float[Array, "b q*n v"]:
        """See `LlamaModel`; those of a cell's tokens stand one after another."""
        return super().logits(features).reshape(len(features), -1, self.vocab)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubVocabularySampler(NextTokenSampler):
    """`NextTokenSampler` of a `SubVocabularyLlama`: all tokens of a cell a call."""

    generator: SubVocabularyLlama
    merged = True
