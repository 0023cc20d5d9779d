"""The Llama of image tokens (LlamaGen, Sun et al. 2024, arXiv:2406.06525): a class or a caption, then tokens in raster order."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import LlamaModel, TokenModel
from jaxgen.nn.cross_attention import Context
from jaxgen.nn.placement import place_rows
from jaxgen.orders import Order, raster

__all__ = ["ImageLlama"]


class ImageLlama(TokenModel, LlamaModel):
    """Condition and the tokens so far -> logits of the next token.

    The condition stands in front of the image: a class is one vector, a caption up to p of them, a `Context` of features
    [b, p, c] and of a mask [b, p] that is False on the padding and True somewhere in each row. Nothing sees the padding, on
    whichever side it is given: the last word stands next to the image. Positions turn with row and column (`rotate`); those of
    the condition turn to nothing, as in the published models: there its queries and keys are 0, so that it is read, by its
    values, with the weight of an average key. On one axis all turn, and the condition comes before the tokens.

    Attributes:
      grid: tokens along a side of a square, or along each of one to three axes.
      num_classes: classes, where the label `num_classes` means unconditional; 0 is a model of captions.
      caption_width: c, of the features of a caption's words.
      prefix: p, vectors of the condition.
      token_dropout: rate on the condition and the embedded tokens, while training.
      dropout: see `LlamaTransformer`.
      vocab, width, ...: see `LlamaModel`; `init_std` is of embeddings, too, and the head starts at 0.

    Raises:
      ValueError: a grid without cells, or neither classes nor captions, or both.

    Example:
      >>> model = ImageLlama(vocab=64, grid=4, num_classes=10, width=64, heads=2, depth=2)
      >>> params = model.init(key, labels, tokens)              # labels [b], tokens [b, 16]
      >>> logits = model.apply(params, labels, tokens)          # [b, 16, 64]
    """

    grid: int | tuple[int, ...]
    num_classes: int = 0
    caption_width: int = 0
    prefix: int = 1
    token_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        if bool(self.num_classes) == bool(self.caption_width) or (self.num_classes and self.prefix != 1):
            raise ValueError(
                f"num_classes={self.num_classes}, caption_width={self.caption_width}, prefix={self.prefix}: expected classes, "
                "which are one vector, or captions"
            )
        if not 1 <= len(self.shape) <= 3 or min(self.shape) < 1:
            raise ValueError(f"grid={self.grid}: expected a positive number, or one to three of them")
        super().__post_init__()

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens along each axis."""
        return (self.grid, self.grid) if isinstance(self.grid, int) else tuple(self.grid)

    @property
    def length(self) -> int:
        """l, tokens of an image."""
        return math.prod(self.shape)

    @property
    def told(self) -> int:
        """Vectors before the image."""
        return self.prefix

    @property
    def together(self) -> int:
        """Tokens that are read, and predicted, as one."""
        return 1

    @property
    def layers(self) -> int:
        """Blocks, each of which has its keys and values in a cache."""
        return self.depth

    @property
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    @property
    def _coords(self) -> Int[np.ndarray, "p+l n"]:
        """Where each position lies, row and column of an image; those of the condition are negative."""
        if len(self.shape) == 1:
            return np.arange(-self.prefix, self.length)[:, None]
        cells = np.indices(self.shape).reshape(len(self.shape), -1).T
        return np.concatenate([np.full((self.prefix, len(self.shape)), -1), cells])

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.token_embed = nn.Embed(self.together * self.vocab, self.width, embedding_init=init)
        if self.num_classes:
            self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        else:
            self.caption_fc1 = nn.Dense(self.width, use_bias=False, kernel_init=init, dtype=self.dtype)
            self.caption_fc2 = nn.Dense(self.width, use_bias=False, kernel_init=init, dtype=self.dtype)
            scale = nn.initializers.normal(self.caption_width**-0.5)
            self.no_caption = self.param("no_caption", scale, (self.prefix, self.caption_width))
        self.setup_blocks(nn.initializers.zeros, self.together * self.vocab)
        self.drop_tokens = nn.Dropout(self.token_dropout)

    def __call__(self, cond, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits: token i is predicted from the condition and tokens < i.

        Args:
          cond: labels [b], or captions, see above.
          tokens: in raster order.
          train: drops; needs the rng stream "dropout".
        """
        x, coords, mask = self._inputs(cond, tokens, train)
        x, _ = self._hidden(x, coords, None, mask, train)
        return self.logits(x[:, self.told - 1 :])

    def drop(self, cond, rows: Bool[Array, "b"]):
        """See `TokenModel`; captions keep their length, as in the published models."""
        if self.num_classes:
            return super().drop(cond, rows)
        words = _padding_first(cond)
        return Context(jnp.where(rows[:, None, None], self.no_caption, words.features), words.mask)

    def begin(self, cache: KVCache, cond) -> KVCache:
        """The cache with all of the condition but its last vector, which `step` reads at position 0.

        Rows whose captions are shorter have less in it: padding is nowhere.
        """
        n = self.told - 1
        if not n:
            return cache
        x, coords, count = self._condition(cond)[:, :n], self._coords[None, :n], n
        if not self.num_classes:
            seen = self._seen(cond)[:, :n]
            first = jnp.argsort(~seen, axis=1, stable=True)
            x, coords = jnp.take_along_axis(x, first[..., None], axis=1), jnp.asarray(self._coords)[first]
            count = seen.sum(axis=1)
        _, cache = self._hidden(x, coords, cache, jnp.tril(jnp.ones((n, n), bool)))
        return cache.commit(count)

    def step(self, cache: KVCache, view: View, cond) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`: `view.tokens` [b, q] are the tokens *before* `view.pos`, not read at position 0."""
        pos = jnp.asarray(view.pos)
        pos = (pos[None] if pos.ndim == 1 else pos)[:, :: self.together] // self.together
        x = jnp.where(pos[..., None] == 0, self._last(cond), self._read(view.tokens))
        x, cache = self._hidden(x, jnp.asarray(self._coords)[self.told - 1 + pos], cache, view.mask)
        return Out(self.logits(x), x), cache

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for the condition and `capacity` tokens; None is an image's."""
        return self.empty_cache(batch, self.told - 1 + (capacity or self.length), self.layers)

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        cond, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((1, self.length), jnp.int32)
        if not self.num_classes:
            cond = Context(jnp.zeros((1, self.prefix, self.caption_width)), jnp.ones((1, self.prefix), bool))
        return jax.eval_shape(lambda key: self.init(key, cond, tokens), jax.random.key(0))

    def _inputs(self, cond, tokens: Int[Array, "b l"], train: bool):
        """(Vectors, places, mask) of the condition and the tokens that predict another."""
        x = jnp.concatenate([self._condition(cond), self._read(tokens[:, : -self.together])], axis=1)
        x = self.drop_tokens(x, deterministic=not train)
        return x, self._coords[None, : x.shape[1]], self._mask(cond, raster(x.shape[1]))

    def _mask(self, cond, order: Order):
        """Who sees whom of the condition and the tokens: of captions nobody the padding, which sees itself."""
        mask = masks.block_causal(order)
        if self.num_classes:
            return mask
        seen = self._seen(cond)
        seen = jnp.pad(seen, ((0, 0), (0, order.length - self.told)), constant_values=True)
        return (mask.traced() & seen[:, None]) | jnp.eye(order.length, dtype=bool)

    def _seen(self, cond: Context) -> Bool[Array, "b p"]:
        """Which vectors before the image are no padding."""
        mask = _padding_first(cond).mask
        return jnp.pad(mask, ((0, 0), (0, self.told - self.prefix)), constant_values=True)

    def _condition(self, cond) -> Float[Array, "b p d"]:
        if self.num_classes:
            return place_rows(self.class_embed(cond))[:, None]
        return self.caption_fc2(nn.gelu(self.caption_fc1(_padding_first(cond).features), approximate=True))

    def _read(self, tokens: Int[Array, "b q"]) -> Float[Array, "b q d"]:
        return self.token_embed(tokens)

    def _last(self, cond) -> Float[Array, "b 1 d"]:
        """The vector that predicts the first token."""
        return self._condition(cond if self.num_classes else jax.tree.map(lambda x: x[:, -1:], _padding_first(cond)))

    def _hidden(self, x, coords, cache, mask, train: bool = False):
        """(What the head reads, the cache) after all blocks."""
        return self.transformer(x, coords, cache, mask, train=train)


def _padding_first(words: Context) -> Context:
    """The same words in the same order, behind the padding."""
    order = jnp.argsort(words.mask, axis=1, stable=True)
    return Context(jnp.take_along_axis(words.features, order[..., None], axis=1), jnp.take_along_axis(words.mask, order, axis=1))
