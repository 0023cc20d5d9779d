"""The next-scale transformer (S047 VAR, Tian et al. 2024): predicts all tokens of a scale from the picture so far."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen import masks
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import AdaLNModel
from jaxgen.orders import Order, scales
from kernels_pallas import BlockMask

__all__ = ["NextScaleTransformer"]


class NextScaleTransformer(AdaLNModel):
    """Class label and picture so far -> logits of every token of every scale.

    The first scale starts from the class embedding; scale k > 1 reads the quantised features of scales < k, pooled to its
    grid. Attention is bidirectional inside a scale and causal across scales.

    Attributes:
      num_classes: classes; the label `num_classes` means unconditional.
      patch_nums: grid of each scale.
      shared_adaln, implementation: see `AdaLNTransformer`.
      vocab, width, ...: see `AdaLNModel`; `gate_init` is the published `alng`, `rest_init` `aln`, and `head_init` `hd`.

    Example:
      >>> model = NextScaleTransformer(vocab=64, num_classes=10, patch_nums=(1, 2, 4), width=64, heads=2, depth=2)
      >>> params = model.init(key, labels, features)            # labels [b], features [b, 20, c]
      >>> logits = model.apply(params, labels, features)        # [b, 21, 64]
    """

    num_classes: int
    patch_nums: tuple[int, ...]
    shared_adaln: bool = False
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
        init = nn.initializers.normal(self.init_std)
        self.word_embed = nn.Dense(self.width, kernel_init=init)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.setup_places(init)
        options = dict(attention_scale=attention_scale(self), mask=self.mask, mixer=self.build_mixer(self.init_std))
        self.transformer = self.build_transformer(**options)
        self.head = self.build_head()

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
        return self.empty_cache(batch, self.order.length)

    def param_shapes(self, code_width: int):
        """Shapes of the parameters, without making any."""
        labels = jnp.zeros((1,), jnp.int32)
        features = jnp.zeros((1, self.order.length - self.order.sizes[0], code_width))
        return jax.eval_shape(lambda key: self.init(key, labels, features), jax.random.key(0))


def attention_scale(model: AdaLNModel) -> float | None:
    """The factor on products of queries and keys: without normalisation the authors take a quarter of d ** -0.5."""
    return None if model.l2_norm else 0.25 * (model.width // model.heads) ** -0.5
