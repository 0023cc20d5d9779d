"""The next-scale transformer (S047 VAR, Tian et al. 2024): predicts all tokens of a scale from the picture so far."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.nn.adaln import AdaLNHead
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.orders import Order, scales
from kernels_pallas import BlockMask

__all__ = ["NextScaleTransformer"]


class NextScaleTransformer(nn.Module):
    """Class label and picture so far -> logits of every token of every scale.

    The first scale starts from the class embedding; scale k > 1 reads the quantised features of scales < k, pooled to its
    grid. Attention is bidirectional inside a scale and causal across scales.

    Attributes:
      vocab: v, codes of the tokenizer.
      num_classes: classes; the label `num_classes` means unconditional.
      patch_nums: grid of each scale.
      width: d.
      heads: h.
      depth: blocks.
      mlp_ratio, l2_norm, shared_adaln, drop_path_rate, scan_layers, remat, dtype, implementation: see `AdaLNTransformer`.
      gate_init: the published `alng`.
      rest_init: the published `aln`.
      head_init: factor on the initial classifier, the published `hd`.

    Example:
      >>> model = NextScaleTransformer(vocab=64, num_classes=10, patch_nums=(1, 2, 4), width=64, heads=2, depth=2)
      >>> params = model.init(key, labels, features)            # labels [b], features [b, 20, c]
      >>> logits = model.apply(params, labels, features)        # [b, 21, 64]
    """

    vocab: int
    num_classes: int
    patch_nums: tuple[int, ...]
    width: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    l2_norm: bool = True
    shared_adaln: bool = False
    drop_path_rate: float = 0.0
    gate_init: float = 1e-3
    rest_init: float = 0.5
    head_init: float = 0.02
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    @property
    def order(self) -> Order:
        """The scales."""
        return scales(self.patch_nums)

    @property
    def mask(self) -> BlockMask:
        """Who sees whom when all scales are read at once."""
        return masks.block_causal(self.order)

    def setup(self):
        std = (1 / (3 * self.width)) ** 0.5
        init = nn.initializers.normal(std)
        self.word_embed = nn.Dense(self.width, kernel_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.setup_places(init)
        self.transformer = AdaLNTransformer(
            **fields_of(self, AdaLNTransformer),
            # Without normalisation the authors scale by a quarter of d ** -0.5.
            attention_scale=None if self.l2_norm else 0.25 * (self.width // self.heads) ** -0.5,
            init_std=std,
            mask=self.mask,
            mixer=self.build_mixer(std),
        )
        self.head = AdaLNHead(self.vocab, kernel_init=init, rest_init=self.rest_init, head_init=self.head_init)

    def setup_places(self, init) -> None:
        """Makes what tells positions apart: a vector for each, one for each scale, and what the first scale starts from."""
        order = self.order
        self.start = self.param("start", init, (order.sizes[0], self.width))
        self.position = self.param("position", init, (order.length, self.width))
        self.level = self.param("level", init, (order.steps, self.width))

    def placed(self, x: Float[Array, "b q d"], pos, scale) -> Float[Array, "b q d"]:
        """Embeddings at positions `pos`, which are of `scale` (a number, or one for each of them)."""
        return x + self.position[pos] + self.level[scale]

    def build_mixer(self, std: float) -> nn.Module | None:
        """What blocks have between attention and MLP, see `AdaLNTransformer`; nothing here."""
        return None

    def run(self, x: Float[Array, "b q d"], cond, cache=None, view: View | None = None, *, train: bool = False):
        """(x, cache) after the blocks, of all scales or, with a cache, of the view's."""
        return self.transformer(x, cond, cache, None if view is None else view.mask, train=train)

    def __call__(
        self, labels: Int[Array, "b"], features: Float[Array, "b l-first c"], *, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits of all scales; `features` come from `MultiScaleQuantizer.inputs`."""
        cond = self.class_embed(labels)
        x = jnp.concatenate([cond[:, None] + self.start, self.word_embed(features)], axis=1)
        x = self.placed(x, slice(None), self.order.step_of)
        x, _ = self.run(x, cond, train=train)
        return self.head(x, cond)

    def step(self, cache: KVCache, view: View, labels: Int[Array, "b"]) -> tuple[Out, KVCache]:
        """One scale, `view.time`, in the light of the cached ones: the seam of `jaxgen.decoding`.

        Args:
          cache: see `init_cache`.
          view: features [b, q, c] of the scale at its positions (at scale 0 they are not read).
          labels: [b].
        """
        cond = self.class_embed(labels)
        scale = view.time
        x = cond[:, None] + self.start if scale == 0 else self.word_embed(view.tokens)
        x = self.placed(x, view.pos, scale)
        x, cache = self.run(x, cond, cache, view)
        return Out(self.head(x, cond), x), cache

    def init_cache(self, batch: int) -> KVCache:
        """An empty cache for all scales of `batch` rows."""
        return KVCache.zeros(
            layers=self.depth,
            batch=batch,
            capacity=self.order.length,
            heads=self.heads,
            head_size=self.width // self.heads,
            dtype=self.dtype,
        )

    def param_shapes(self, code_width: int):
        """Shapes of the parameters, without making any."""
        labels = jnp.zeros((1,), jnp.int32)
        features = jnp.zeros((1, self.order.length - self.order.sizes[0], code_width))
        return jax.eval_shape(lambda key: self.init(key, labels, features), jax.random.key(0))
