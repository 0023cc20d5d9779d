"""Llamas of images whose every cell is several tokens, read as one vector and predicted at once (ELM, Liu et al. 2024).

One is causal, a cell after another; the other is masked: it sees all cells that are known, and reveals some at each pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.decoding import ByConfidence, Guided, Scheduled, UnmaskCells, guide, refine, truncate
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.generators.next_token_sampler import NextTokenSampler
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.orders import Order

__all__ = ["MaskedSubVocabularyLlama", "MaskedSubVocabularySampler", "SubVocabularyLlama", "SubVocabularySampler"]


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


class MaskedSubVocabularyLlama(SubVocabularyLlama):
    """Condition and cells, some of them masked -> logits of the tokens of every cell (the masked model of Liu et al. 2024).

    The same blocks, embeddings and heads, without the causal mask: every cell sees all cells and the condition. A cell is masked
    whole; then a learned vector stands where its embeddings would.

    Attributes:
      those of `SubVocabularyLlama`; the id v is the mask.

    Example:
      >>> model = MaskedSubVocabularyLlama(vocab=16, parts=2, grid=4, num_classes=10, width=64, heads=2, depth=2)
      >>> logits = model.apply(params, labels, tokens)          # tokens [b, 32], 16 where masked; [b, 32, 16]
    """

    @property
    def mask(self) -> int:
        """The id of the tokens of masked cells."""
        return self.vocab

    def setup(self):
        super().setup()
        self.mask_embed = self.param("mask_embed", nn.initializers.normal(self.init_std), (self.width,))

    def __call__(self, cond, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Float32 logits of each cell's own tokens, given all cells that are not masked; otherwise as `ImageLlama`."""
        x = jnp.concatenate([self._condition(cond), self._read(tokens)], axis=1)
        x = self.drop_tokens(x, deterministic=not train)
        x, _ = self._hidden(x, self._coords[None], None, None, train)
        return self.logits(x[:, self.told :])

    def step(self, cache: tuple, view: View, cond) -> tuple[Out, tuple]:
        """The seam of `jaxgen.decoding.refine`: the view is all cells, [b, c, n], and the law [b, c, n, v]; nothing is cached."""
        logits = self(cond, view.tokens.reshape(len(view.tokens), -1))
        return Out(logits.reshape(*view.tokens.shape, self.vocab)), cache

    def _read(self, tokens: Int[Array, "b q*n"]) -> Float[Array, "b q d"]:
        x = super()._read(jnp.minimum(tokens, self.vocab - 1))
        masked = tokens[:, :: self.parts] == self.mask
        return jnp.where(masked[..., None], self.mask_embed.astype(x.dtype), x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSubVocabularySampler(NextTokenSampler):
    """All cells masked at first; each pass draws those that are left and keeps the most certain ones: MaskGIT's decoder.

    As in the authors' code, where each token of a cell has its own noise when cells are ranked; here a cell has one. Used like
    `NextTokenSampler`; `Settings.cfg` is constant, or [n], one for each pass.

    Attributes:
      generator: predicts the tokens.
      steps: n, passes; see `Scheduled`.
      choice_temperature: of the noise on the ranks, which falls to 0; see `ByConfidence`.

    Raises:
      ValueError: no passes, more of them than cells, a negative temperature, or see `NextTokenSampler`.
    """

    generator: MaskedSubVocabularyLlama
    steps: int = 10
    choice_temperature: float = 1.0

    weighed = "pass"

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.steps <= self.generator.cells:
            raise ValueError(f"steps={self.steps}: expected 1 to {self.generator.cells} passes, the cells of an image")
        if not self.choice_temperature >= 0:
            raise ValueError(f"choice_temperature={self.choice_temperature}: expected a number that is not negative")

    @property
    def weights(self) -> int:
        """See `NextTokenSampler`."""
        return self.steps

    def tokens(self, variables, key, cond, settings) -> Int[Array, "b l"]:
        """See `NextTokenSampler`."""
        model, weights = self.generator, jnp.broadcast_to(settings.cfg, (self.steps,))
        options = dict(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        cells = refine(
            guide(stepper(model)),
            ByConfidence(Scheduled(self.steps), self.choice_temperature),
            UnmaskCells(model.mask, model.parts, functools.partial(truncate, **options)),
            params=variables,
            cond=lambda slots: Guided(cond, weights[slots.step][:, None, None, None]),
            batch=len(cond) // 2,
            length=model.cells,
            key=key,
        ).tokens
        return cells.reshape(len(cells), -1)
