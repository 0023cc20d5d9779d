"""The Axial Transformer: attention along one axis at a time, and a raster-order law of which nothing is left out."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.rows import sample_rows
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import AdaLNModel, TokenModel
from jaxgen.generators.next_token_sampler import NextTokenSampler
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.orders import Order, raster

__all__ = ["AxialSampler", "AxialTransformer"]


class AxialTransformer(TokenModel, AdaLNModel):
    """Class label and the tokens before -> logits of each token of a grid, in O(l sqrt l) (Ho et al. 2019, arXiv:1912.12180).

    The outer decoder (section 3.2) has `outer` pairs of blocks: attention among all of a row, then along a column, causally. Its
    result, one row further down, is what the inner decoder is told: `depth` blocks of causal attention along the row, which read
    the token to the left. So a token sees all of the rows above and what is left of it, and no independence is assumed.

    The paper's images have one channel at a time; here channels are rows of their own (`PixelTokenizer`), one of its code's two
    ways. The paper has no classes; here they modulate the blocks.

    Attributes:
      num_classes: classes; the label `num_classes` means unconditional.
      grid: rows and columns.
      outer: pairs of blocks of the outer decoder.
      vocab, width, ...: see `AdaLNModel`; `depth` and `scan_layers` are of the inner decoder, all others of both.

    Raises:
      ValueError: a grid without cells, or no pair of outer blocks.

    Example:
      >>> model = AxialTransformer(vocab=64, num_classes=10, grid=(4, 4), width=64, heads=2, depth=2)
      >>> params = model.init(key, labels, tokens)              # labels [b], tokens [b, 16]
      >>> logits = model.apply(params, labels, tokens)          # [b, 16, 64]
    """

    num_classes: int
    grid: tuple[int, int]
    outer: int = 1

    def __post_init__(self):
        if len(self.grid) != 2 or min(self.grid) < 1 or self.outer < 1:
            raise ValueError(f"grid={self.grid}, outer={self.outer}: expected rows, columns and at least one pair of blocks")
        super().__post_init__()

    @property
    def length(self) -> int:
        """l, tokens of a sample."""
        return self.grid[0] * self.grid[1]

    @property
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    def setup(self):
        (rows, columns), init = self.grid, nn.initializers.normal(self.init_std)
        self.token_embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.row_position = self.param("row_position", init, (rows, self.width))
        self.column_position = self.param("column_position", init, (columns, self.width))
        single = dict(depth=1, scan_layers=False)
        self.rows = [self.build_transformer(**single) for _ in range(self.outer)]
        self.columns = [self.build_transformer(**single, mask=masks.block_causal(raster(rows))) for _ in range(self.outer)]
        self.inner = self.build_transformer(mask=masks.block_causal(raster(columns)))
        self.head = self.build_head()

    def __call__(self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits: position i, in raster order, is predicted from the class and tokens < i."""
        (rows, columns), cond = self.grid, self.class_embed(labels)
        x = self.token_embed(tokens).reshape(-1, rows, columns, self.width)
        place = self.row_position[:, None] + self.column_position
        context, _ = self._outer(x + place, cond, train=train)
        above = jnp.pad(context, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :rows]
        left = jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :columns]
        x, cond = (left + above + place).reshape(-1, columns, self.width), jnp.repeat(cond, rows, axis=0)
        x, _ = self.inner(x, cond, train=train)
        return self.head(x, cond).reshape(-1, self.length, self.vocab)

    def enter(self, caches: tuple[KVCache, ...], above: Int[Array, "b n"], row, labels: Int[Array, "b"]):
        """(What the inner decoder is told of the rows before `row` [b, n, d], caches with them): all columns at once.

        Args:
          caches: see `init_caches`.
          above: tokens of the row before, not read at row 0.
          row: traced.
          labels: classes.
        """
        before = jnp.maximum(row - 1, 0)
        x = self.token_embed(above) + self.row_position[before] + self.column_position
        caches = tuple(dataclasses.replace(cache, length=before) for cache in caches)
        context, caches = self._outer(x[:, None], self.class_embed(labels), caches)
        return jnp.where(row == 0, 0, context[:, 0]), caches

    def step(self, cache: KVCache, view: View, cond) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding` within a row: `view.tokens` [b, q] are those left of columns `view.pos` [q].

        Args:
          cache: of the row, see `init_cache`.
          view: tokens, not read at column 0.
          cond: labels [b], what `enter` told, and the row.
        """
        (labels, context, row), pos = cond, jnp.asarray(view.pos)
        cond = self.class_embed(labels)
        x = jnp.where(pos[:, None] == 0, 0, self.token_embed(view.tokens)) + context[:, pos]
        x, cache = self.inner(x + self.row_position[row] + self.column_position[pos], cond, cache, view.mask)
        return Out(self.head(x, cond), x), cache

    def init_cache(self, batch: int) -> KVCache:
        """An empty cache of the inner decoder, for one row."""
        return self.empty_cache(batch, self.grid[1])

    def init_caches(self, batch: int) -> tuple[KVCache, ...]:
        """Empty caches of the outer decoder's columns, one for each pair of blocks."""
        return tuple(self.empty_cache(batch * self.grid[1], self.grid[0], layers=1) for _ in range(self.outer))

    def _outer(self, x: Float[Array, "b r n d"], cond, caches=None, *, train: bool = False):
        """(The outer decoder's results, caches): a row sees itself and those above, with caches also the ones in there."""
        b, r, n, d = x.shape
        kept = []
        for i, (row, column) in enumerate(zip(self.rows, self.columns)):
            x, _ = row(x.reshape(b * r, n, d), jnp.repeat(cond, r, axis=0), train=train)
            x = x.reshape(b, r, n, d).swapaxes(1, 2).reshape(b * n, r, d)
            x, cache = column(x, jnp.repeat(cond, n, axis=0), None if caches is None else caches[i], train=train)
            kept.append(cache)
            x = x.reshape(b, n, r, d).swapaxes(1, 2)
        return x, tuple(kept)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxialSampler(NextTokenSampler):
    """`NextTokenSampler` of an `AxialTransformer`: the outer decoder once a row, the inner one once a token."""

    generator: AxialTransformer

    def tokens(self, variables, key, cond, settings) -> Int[Array, "b l"]:
        """Tokens in raster order."""
        model, rows = self.generator, len(cond)

        def enter(params, caches, above, row, labels):
            return model.apply(params, caches, above, row, labels, method="enter")

        # A loop's carry keeps its types: a length that changes is an array from the start.
        caches = tuple(dataclasses.replace(cache, length=jnp.int32(0)) for cache in model.init_caches(rows))
        return sample_rows(
            enter,
            stepper(model),
            params=variables,
            caches=caches,
            cache=model.init_cache(rows),
            cond=cond,
            batch=rows // 2,
            shape=model.grid,
            key=key,
            settings=settings,
        )
