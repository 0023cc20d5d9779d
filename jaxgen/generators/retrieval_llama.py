"""A next-token transformer that asks what similar images look like (S159 RDM, its autoregressive model).

Blattmann et al. 2022, *Semi-Parametric Neural Image Synthesis* (arXiv:2204.11824, "Retrieval-Augmented Diffusion Models";
CompVis/retrieval-augmented-diffusion-models, `RetrievalPatchTransformer`). What the images of a database look like comes in by
attention to the features of a few of them, so that another database makes other images. The blocks are this library's Llama's,
in place of the authors' of GPT's kind.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen import masks
from jaxgen.decoding import Settings, check_settings, sample_tokens
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import LlamaModel
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.hosts import to_host
from jaxgen.nn.cross_attention import Context
from jaxgen.orders import Order, raster
from jaxgen.retrieval import Index, check_index, nearest
from jaxgen.tokenizers.flexible import FlexibleTokenizer

__all__ = ["RetrievalLlama", "RetrievalSampler", "neighbours"]


def neighbours(index: Index, queries: Float[Array, "b c"], k: int, *, below=jnp.inf) -> Context:
    """The features of the k nearest entries of each query, as a model attends to them; see `nearest`."""
    similarity, ids = nearest(index, queries, k, below=below)
    return Context(index.features[ids], jnp.isfinite(similarity))


class RetrievalLlama(LlamaModel):
    """Features of similar images and the tokens so far -> logits of the next token.

    Every block attends to the features, and to one learned vector that stands for nothing: all there is without neighbours.

    Attributes:
      grid: tokens along a side.
      feature_width: c, of the features.
      token_dropout: rate on the embedded tokens, while training.
      dropout: see `LlamaTransformer`.
      vocab, width, ...: see `LlamaModel`.

    Example:
      >>> model = RetrievalLlama(vocab=16384, grid=16, feature_width=512, width=768, heads=12, depth=18)
      >>> logits = model.apply(variables, Context(features, mask), tokens)     # [b, 4, 512], [b, 4], [b, 256]
    """

    grid: int
    feature_width: int
    token_dropout: float = 0.0
    dropout: float = 0.0

    @property
    def length(self) -> int:
        """l, tokens of an image."""
        return self.grid**2

    @property
    def order(self) -> Order:
        """One position a step."""
        return raster(self.length)

    @property
    def _coords(self) -> Int[np.ndarray, "1 l 2"]:
        """Row and column of what each position predicts."""
        return np.indices((self.grid, self.grid)).reshape(2, -1).T[None]

    def setup(self):
        init = nn.initializers.normal(self.init_std)
        self.token_embed = nn.Embed(self.vocab, self.width, embedding_init=init)
        self.start = self.param("start", init, (self.width,))
        self.nothing = self.param("nothing", nn.initializers.normal(self.feature_width**-0.5), (self.feature_width,))
        self.setup_blocks(nn.initializers.zeros)
        self.drop_tokens = nn.Dropout(self.token_dropout)

    def __call__(self, context: Context, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits: token i is predicted from the neighbours and tokens < i.

        Args:
          context: features [b, k, c] of neighbours, and which of them there are [b, k].
          tokens: in raster order.
          train: drops; needs the rng stream "dropout".
        """
        start = jnp.broadcast_to(self.start, (len(tokens), 1, self.width))
        x = jnp.concatenate([start, self.token_embed(tokens[:, :-1])], axis=1)
        x = self.drop_tokens(x, deterministic=not train)
        mask = masks.block_causal(self.order)
        x, _ = self.transformer(x, self._coords, None, mask, context=self._context(context), train=train)
        return self.logits(x)

    def unconditional(self, batch: int, k: int = 1) -> Context:
        """No neighbours, where there would be k."""
        return Context(jnp.zeros((batch, k, self.feature_width)), jnp.zeros((batch, k), bool))

    def step(self, cache: KVCache, view: View, context: Context) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`: `view.tokens` [b, q] are the tokens *before* `view.pos`, not read at position 0."""
        pos = jnp.asarray(view.pos)
        pos = pos[None] if pos.ndim == 1 else pos
        x = jnp.where(pos[..., None] == 0, self.start, self.token_embed(view.tokens))
        x, cache = self.transformer(x, jnp.asarray(self._coords[0])[pos], cache, view.mask, context=self._context(context))
        return Out(self.logits(x), x), cache

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for `capacity` tokens; None is an image's."""
        return self.empty_cache(batch, capacity or self.length)

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        context = Context(jnp.zeros((1, 1, self.feature_width)), jnp.ones((1, 1), bool))
        tokens = jnp.zeros((1, self.length), jnp.int32)
        return jax.eval_shape(lambda key: self.init(key, context, tokens), jax.random.key(0))

    def _context(self, given: Context) -> Context:
        """The neighbours behind the vector for nothing, which is always there.

        Unit vectors become as long as those that a norm leaves, which is what the blocks' other layers read.
        """
        b = len(given.features)
        nothing = jnp.broadcast_to(self.nothing, (b, 1, self.feature_width))
        features = self.feature_width**0.5 * jnp.concatenate([nothing, given.features], axis=1)
        return Context(features, jnp.concatenate([jnp.ones((b, 1), bool), given.mask], axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalSampler:
    """From a database to images like those in it: an entry is drawn, and its neighbours, itself among them, condition the model.

    Attributes:
      generator: predicts the tokens.
      tokenizer: of one grid; turns them into pictures.
      k: neighbours.

    Raises:
      ValueError: k < 1, or a tokenizer of other tokens.
    """

    generator: RetrievalLlama
    tokenizer: FlexibleTokenizer
    k: int = 4

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k}: expected at least 1 neighbour")
        ours, theirs = (self.generator.length, self.generator.vocab), (self.tokenizer.order.length, self.tokenizer.vocab)
        if ours != theirs:
            raise ValueError(f"generator (length, vocab)={ours} does not fit tokenizer {theirs}")

    def __call__(
        self, params: dict, key: Key[Array, ""], index: Index, labels: Int[Array, "b"], settings: Settings = Settings()
    ) -> tuple[Float[Array, "b H W C"], Int[Array, "b l"], Int[Array, "b k"]]:
        """(Images in [-1, 1], tokens in raster order, the entries that they were made from, best first).

        Args:
          params: `{"generator": ..., "tokenizer": ...}`.
          key: the i-th image depends on the key, i, its label, the database and the settings.
          index: the database, any; those with as many rows share a compilation.
          labels: an entry of this label is drawn; -1 takes any.
          settings: `cfg` goes away from what the model makes without neighbours; traced.

        Raises:
          ValueError: labels that no entry has, fewer entries than k, features of another width, or settings out of range.
        """
        check_index(index, self.k, self.generator.feature_width)
        labels = to_host(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels {labels.dtype} {labels.shape}: expected integers [b]")
        known = np.unique(np.asarray(index.labels)[: int(index.count)])
        strange = np.setdiff1d(labels, np.append(known, -1))
        if strange.size:
            raise ValueError(f"label {strange[0]}: the database has none of it, only {', '.join(map(str, known))}; -1 takes any")
        check_settings(**settings._asdict(), vocab=self.generator.vocab)
        return self._sample(params, key, index, jnp.asarray(labels, jnp.int32), Settings(*map(jnp.float32, settings)))

    @functools.partial(jax.jit, static_argnums=0)
    def _sample(self, params, key, index, labels, settings):
        b, variables = len(labels), params["generator"]
        draw_key, key = jax.random.split(key)
        keys = jax.vmap(lambda row: jax.random.fold_in(draw_key, row))(jnp.arange(b))
        chance = jax.vmap(lambda key: jax.random.uniform(key, index.labels.shape))(keys)
        wanted = (labels[:, None] < 0) | (labels[:, None] == index.labels)
        wanted &= jnp.arange(len(index.labels)) < index.count
        drawn = jnp.where(wanted, chance, -1.0).argmax(axis=1)
        _, ids = nearest(index, index.features[drawn], self.k)
        found = Context(index.features[ids], jnp.ones((b, self.k), bool))
        null = self.generator.apply(variables, b, self.k, method="unconditional")
        tokens = sample_tokens(
            stepper(self.generator),
            params=variables,
            cache=self.generator.init_cache(2 * b),
            cond=jax.tree.map(lambda x, y: jnp.concatenate([x, y]), found, null),
            batch=b,
            order=self.generator.order,
            key=key,
            settings=settings,
        )
        return self.tokenizer.apply(params["tokenizer"], tokens, method="decode"), tokens, ids
