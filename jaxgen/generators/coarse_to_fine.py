"""Coarse to fine tokens (CTF, Guo et al. 2025): one Llama predicts clusters in turn, another all tokens at once."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.config import fields_of
from jaxgen.generators.bases import LlamaModel, TokenModel
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.nn.llama import LlamaTransformer
from jaxgen.orders import Order

__all__ = ["CoarseToFineLlama"]


class FineLlama(LlamaModel):
    """Class and the clusters of all tokens -> logits of every token (section 4.2): blocks in which everything sees everything.

    Attributes: see `CoarseToFineLlama`; `depth` is of these blocks.
    """

    clusters: int
    grid: int
    num_classes: int
    token_dropout: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, labels: Int[Array, "b"], coarse: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Float32 logits over the whole codebook."""
        init = nn.initializers.normal(self.init_std)
        first = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="class_embed")(labels)
        x = nn.Embed(self.clusters, self.width, embedding_init=init, name="token_embed")(coarse)
        x = jnp.concatenate([first[:, None], x], axis=1)
        x = nn.Dropout(self.token_dropout)(x, deterministic=not train)
        coords = np.concatenate([[[-1, -1]], np.indices((self.grid, self.grid)).reshape(2, -1).T])
        blocks = LlamaTransformer(**fields_of(self, LlamaTransformer), name="transformer")
        x, _ = blocks(x, coords[None], train=train)
        x = nn.RMSNorm(epsilon=1e-5, name="norm")(x[:, 1:]).astype(self.dtype)
        head = nn.Dense(self.vocab, use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="head")
        return head(x).astype(jnp.float32)


class CoarseToFineLlama(TokenModel, LlamaModel):
    """p(x | c) = prod_i p(k_i | k_<i, c) prod_i p(x_i | k, c), where k_i is the cluster of token i (Guo et al. 2025, section 4).

    The first factor is an `ImageLlama` over clusters, the second a model of all tokens at once given all clusters. A token
    outside its cluster has no probability: what of the second model's law lies there is taken off.

    The cluster of each code is a parameter that training does not change, see `with_labels`.

    Attributes:
      vocab: v, codes.
      clusters: k, codes of which look alike.
      grid: tokens along a side.
      fine_depth: blocks of the second model; `depth` is of the first.
      num_classes, token_dropout, dropout, width, ...: of both, see `ImageLlama`.

    Raises:
      ValueError: no clusters or more than codes, or see `ImageLlama`.

    Example:
      >>> model = CoarseToFineLlama(vocab=64, clusters=8, grid=4, num_classes=10, width=64, heads=2, depth=2, fine_depth=1)
      >>> params = model.with_labels(model.init(key, labels, tokens), cluster_codes(codebook, 8))
    """

    clusters: int
    grid: int
    num_classes: int
    fine_depth: int = 1
    token_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self):
        if not 1 <= self.clusters <= self.vocab:
            raise ValueError(f"clusters={self.clusters}: expected 1..{self.vocab}, as many as there are codes at most")
        super().__post_init__()

    @property
    def first(self) -> ImageLlama:
        """The model of clusters, by itself."""
        return ImageLlama(**fields_of(self, ImageLlama) | dict(vocab=self.clusters))

    @property
    def length(self) -> int:
        """l, tokens of an image."""
        return self.grid**2

    @property
    def order(self) -> Order:
        """Of the clusters: one a step."""
        return self.first.order

    def setup(self):
        self.coarse = self.first
        self.fine = FineLlama(**fields_of(self, FineLlama) | dict(depth=self.fine_depth))
        self.cluster = self.param("cluster", nn.initializers.zeros, (self.vocab,))

    def with_labels(self, variables, labels: Int[Array, "v"]):
        """Variables in which codes have these clusters."""
        return {"params": variables["params"] | {"cluster": jnp.asarray(labels, jnp.float32)}}

    def labels_of(self) -> Int[Array, "v"]:
        """The cluster of each code."""
        return jnp.round(jax.lax.stop_gradient(self.cluster)).astype(jnp.int32)

    def __call__(self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Log-probabilities of the tokens' clusters in turn, and of the tokens given all clusters, added.

        The second model is asked about the true clusters only; in others a token is as likely as its neighbours there.

        Args:
          labels: classes.
          tokens: in raster order.
          train: drops; needs the rng stream "dropout".
        """
        cluster = self.labels_of()
        coarse, inside = cluster[tokens], self._inside(cluster[tokens])
        turn = jax.nn.log_softmax(self.coarse(labels, coarse, train=train))
        once = jax.nn.log_softmax(jnp.where(inside, self.fine(labels, coarse, train=train), -jnp.inf))
        even = -jnp.log(jnp.zeros(self.clusters).at[cluster].add(1.0))[cluster]
        return turn[..., cluster] + jnp.where(inside, once, even)

    def refine(self, labels: Int[Array, "b"], coarse: Int[Array, "b l"]) -> tuple[Float[Array, "b l v"], Bool[Array, "b l v"]]:
        """(Logits of all tokens given their clusters, which codes are in those clusters)."""
        return self.fine(labels, coarse), self._inside(coarse)

    def _inside(self, coarse: Int[Array, "b l"]) -> Bool[Array, "b l v"]:
        return self.labels_of() == coarse[..., None]
