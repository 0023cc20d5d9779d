"""The next-scale transformer (S047 VAR, Tian et al. 2024): predicts all tokens of a scale from the picture so far."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.nn.adaln import AdaLNHead
from jaxgen.nn.transformer import AdaLNTransformer
from jaxgen.orders import Order, scales

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

    def setup(self):
        std = (1 / (3 * self.width)) ** 0.5
        init = nn.initializers.normal(std)
        order = self.order
        self.word_embed = nn.Dense(self.width, kernel_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.start = self.param("start", init, (order.sizes[0], self.width))
        self.position = self.param("position", init, (order.length, self.width))
        self.level = self.param("level", init, (order.steps, self.width))
        self.transformer = AdaLNTransformer(
            width=self.width,
            heads=self.heads,
            depth=self.depth,
            mlp_ratio=self.mlp_ratio,
            l2_norm=self.l2_norm,
            # Without normalisation the authors scale by a quarter of d ** -0.5.
            attention_scale=None if self.l2_norm else 0.25 * (self.width // self.heads) ** -0.5,
            shared_adaln=self.shared_adaln,
            gate_init=self.gate_init,
            rest_init=self.rest_init,
            init_std=std,
            drop_path_rate=self.drop_path_rate,
            mask=masks.block_causal(order),
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            implementation=self.implementation,
        )
        self.head = AdaLNHead(self.vocab, kernel_init=init, rest_init=self.rest_init, head_init=self.head_init)

    def __call__(
        self, labels: Int[Array, "b"], features: Float[Array, "b l-first c"], *, train: bool = False
    ) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits of all scales; `features` come from `MultiScaleQuantizer.inputs`."""
        cond = self.class_embed(labels)
        x = jnp.concatenate([cond[:, None] + self.start, self.word_embed(features)], axis=1)
        x = x + self.position + self.level[self.order.step_of]
        x, _ = self.transformer(x, cond, train=train)
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
        x = x + self.position[view.pos] + self.level[scale]
        x, cache = self.transformer(x, cond, cache, view.mask)
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
