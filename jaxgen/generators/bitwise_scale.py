"""Infinity (Han et al. 2024, arXiv:2412.04431): a next-scale transformer that reads a text and predicts its tokens' bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxgen import masks
from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.nn.adaln import AdaLNHead, rms_norm
from jaxgen.nn.cross_attention import AttentionPool, Context
from jaxgen.nn.transformer import AdaLNBlock
from jaxgen.orders import Order, scales

__all__ = ["BitwiseScaleTransformer", "TextCondition"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCondition:
    """A text as the blocks want it, and how it guides them.

    Attributes:
      pooled: [b, d], where the first scale starts from and what modulates the blocks.
      context: [b, n, d], what positions attend to.
      weight: [b, 1, 1], t in (1 + t) conditional - t unconditional of hidden states: the first half of the rows is conditional,
        the second, with the same weights, unconditional. None where `layers` is empty.
      layers: blocks whose outputs are guided so.
    """

    pooled: Float[Array, "b d"]
    context: Context
    weight: Any = None
    layers: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))


class _Layer(AdaLNBlock):
    """A block that may be told the scales first and guided last; `carry`, `layer` and `drop_rate` are those of the block."""

    def __call__(self, carry, layer, drop_rate, told, guided, level, cond, coords, text: TextCondition):
        x, cache = carry
        x = x + jnp.where(told, level, 0).astype(x.dtype)
        (x, cache), _ = super().__call__((x, cache), layer, drop_rate, cond, None, coords, None, text.context)
        if text.layers:
            conditional, unconditional = jnp.split(x, 2)
            t, _ = jnp.split(text.weight, 2)
            mixed = ((1 + t) * conditional - t * unconditional).astype(x.dtype)
            x = jnp.where(guided, jnp.concatenate([mixed, mixed]), x)
        return (x, cache), None


class BitwiseScaleTransformer(nn.Module):
    """Text features and the picture so far -> logits of every bit of every token of every scale.

    What differs from `NextScaleTransformer`: a text takes the place of the class, pooled and through cross-attention; places are
    told by turning queries and keys (each scale is spread over one grid) and by a vector for the scale, not by learned positions;
    the head has two logits a bit, so that 2^c codes need 2c outputs (sections 3.1 and 3.3).

    Attributes:
      bits: c, of a token; see `BinaryScales.bits`.
      patch_nums: grid of each scale.
      text_width: size of the text's features.
      text_length: the longest text, which the learned features of "no text" are for.
      width: d.
      heads: h; width / heads is a multiple of 4.
      depth: blocks.
      pool_heads: of the pooling of the text.
      rotary_grid: (h, w) of the grid on which all scales are spread; None is that of the last scale. The authors take the last of
        their schedule for a megapixel, whatever they sample.
      levels: most scales that can be told apart.
      chunks: the scale is told before the first block of each of this many groups of blocks.
      cross_gate: see `AdaLNBlock`.
      half_cross: see `AdaLNBlock`; the text's pooling, too.
      mlp_ratio, l2_norm, shared_adaln, drop_path_rate, scan_layers, remat, dtype, implementation: see `AdaLNTransformer`.
      gate_init, rest_init, head_init: see `NextScaleTransformer`.

    Example:
      >>> model = BitwiseScaleTransformer(bits=8, patch_nums=(1, 2, 4), text_width=64, text_length=16, width=32, heads=2, depth=2)
      >>> params = model.init(key, text, mask, features)        # text [b, 16, 64], mask [b, 16], features [b, 20, 8]
      >>> logits = model.apply(params, text, mask, features)    # [b, 21, 8, 2]
    """

    bits: int
    patch_nums: tuple
    text_width: int
    text_length: int
    width: int
    heads: int
    depth: int
    pool_heads: int = 1
    rotary_grid: tuple[int, int] | None = None
    levels: int = 15
    chunks: int = 1
    cross_gate: float | None = None
    half_cross: bool = False
    mlp_ratio: float = 4.0
    l2_norm: bool = True
    shared_adaln: bool = True
    drop_path_rate: float = 0.0
    gate_init: float = 5e-6
    rest_init: float = 1e-3
    head_init: float = 0.02
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("bits", "text_width", "text_length", "depth", "pool_heads", "chunks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.depth % self.chunks:
            raise ValueError(f"chunks={self.chunks}: does not divide depth={self.depth}")
        if self.width % (4 * self.heads):
            raise ValueError(f"heads={self.heads}: a head of width {self.width} / {self.heads} is not two even parts")
        if self.order.steps > self.levels:
            raise ValueError(f"patch_nums={self.patch_nums}: more than levels={self.levels}")

    @property
    def order(self) -> Order:
        """The scales."""
        return scales(self.patch_nums)

    @property
    def coords(self) -> Float[np.ndarray, "l 2"]:
        """Where positions lie on the rotary grid: cell i of n comes to round(i N / n)."""
        grid = self.rotary_grid or self.order.shapes[-1]
        out = []
        for shape in self.order.shapes:
            # In single precision and halves to even, as the authors: it decides some cells.
            axes = [np.round(np.arange(n, dtype=np.float32) * np.float32(whole / n)) for n, whole in zip(shape, grid)]
            out.append(np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2))
        return np.concatenate(out)

    def setup(self):
        std = (1 / (3 * self.width)) ** 0.5
        init = nn.initializers.normal(std)
        self.word_embed = nn.Dense(self.width, kernel_init=init)
        self.start = self.param("start", init, (self.order.sizes[0], self.width))
        self.level = self.param("level", init, (self.levels, self.width))
        no_text = nn.initializers.truncated_normal(1.2 / self.text_width**0.5)
        self.no_text = self.param("no_text", no_text, (self.text_length, self.text_width))
        self.text_norm = self.param("text_norm", nn.initializers.ones_init(), (self.text_width,))
        self.text_pool = AttentionPool(self.width, self.pool_heads, half=self.half_cross, kernel_init=init, out_init=init)
        self.text_in = nn.Dense(self.width, kernel_init=init)
        self.text_out = nn.Dense(self.width, kernel_init=init)
        if self.shared_adaln:
            self.shared_ada = nn.DenseGeneral((6, self.width), kernel_init=init)
        self.head = AdaLNHead(2 * self.bits, kernel_init=init, rest_init=self.rest_init, head_init=self.head_init)

    def condition(
        self, text: Float[Array, "b n c"], mask: Bool[Array, "b n"], drop: Bool[Array, "b"] | None = None
    ) -> TextCondition:
        """Texts as the blocks want them.

        Args:
          text: features of a text encoder.
          mask: False on the padding.
          drop: rows that get no text: the learned features, as many as the text has.

        Raises:
          ValueError: features of another size, or texts to drop that are longer than `text_length`.
        """
        if text.shape[-1] != self.text_width:
            raise ValueError(f"text {text.shape}: its features have size {self.text_width}")
        if drop is not None:
            if text.shape[1] > self.text_length:
                raise ValueError(f"text {text.shape}: longer than text_length={self.text_length}")
            text = jnp.where(drop[:, None, None], self.no_text[: text.shape[1]], text)
        text = rms_norm(text) * self.text_norm
        features = self.text_out(nn.gelu(self.text_in(text)))
        return TextCondition(self.text_pool(Context(text, mask)), Context(features, mask))

    def __call__(
        self,
        text: Float[Array, "b n c"],
        mask: Bool[Array, "b n"],
        features: Float[Array, "b l-first d"],
        *,
        drop: Bool[Array, "b"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b l d 2"]:
        """Teacher-forced float32 logits of all scales; `features` come from `BinaryScales.inputs` or `corrected`.

        Args:
          text, mask, drop: see `condition`.
          features: the picture so far, of scales 2..K.
          train: drops paths, with the rng stream "dropout".
        """
        text = self.condition(text, mask, drop)
        x = jnp.concatenate([text.pooled[:, None] + self.start, self.word_embed(features)], axis=1)
        x, _ = self._transform(x, text, self.coords, self.level[self.order.step_of], train=train)
        return self._law(x, text)

    def step(self, cache: Any, view: View, cond: TextCondition) -> tuple[Out, Any]:
        """One scale, `view.time`, in the light of the cached ones: the seam of `jaxgen.decoding`.

        Args:
          cache: see `init_cache`.
          view: features [b, q, d] of the scale at its positions (at scale 0 they are not read).
          cond: see `condition`.
        """
        x = cond.pooled[:, None] + self.start if view.time == 0 else self.word_embed(view.tokens)
        x, cache = self._transform(x, cond, jnp.asarray(self.coords)[view.pos], self.level[view.time], cache)
        return Out(self._law(x, cond), x), cache

    @nn.compact
    def _transform(self, x, text: TextCondition, coords, level, cache=None, *, train: bool = False):
        wrong = [layer for layer in text.layers if not 0 <= layer < self.depth]
        if wrong:
            raise ValueError(f"layers={text.layers}: block {wrong[0]} is not one of 0..{self.depth - 1}")
        drops, std = train and self.drop_path_rate > 0, (1 / (3 * self.width)) ** 0.5
        fields = fields_of(self, AdaLNBlock)
        fields |= dict(init_std=std, drop_path=drops, key_bias=False, mask=masks.block_causal(self.order))
        number = np.arange(self.depth)
        told, guided = number % (self.depth // self.chunks) == 0, np.isin(number, text.layers)
        each = (number, np.linspace(0.0, self.drop_path_rate, self.depth), told, guided)
        every = (level, self.shared_ada(nn.silu(text.pooled)) if self.shared_adaln else text.pooled, coords, text)
        carry = (x.astype(self.dtype), cache)
        block = nn.remat(_Layer, prevent_cse=not self.scan_layers) if self.remat else _Layer
        if self.scan_layers:
            stack = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, 0, 0, *(nn.broadcast,) * 4),
                length=self.depth,
            )
            carry, _ = stack(**fields, name="blocks")(carry, *map(jnp.asarray, each), *every)
        else:
            for i in range(self.depth):
                carry, _ = block(**fields, name=f"blocks_{i}")(carry, *(x[i] for x in each), *every)
        return carry

    def _law(self, x, text: TextCondition) -> Float[Array, "b l d 2"]:
        return self.head(x, text.pooled).reshape(*x.shape[:2], self.bits, 2)

    def init_cache(self, batch: int) -> KVCache:
        """An empty cache for all scales of `batch` rows."""
        sizes = dict(layers=self.depth, capacity=self.order.length, heads=self.heads, head_size=self.width // self.heads)
        return KVCache.zeros(batch=batch, dtype=self.dtype, **sizes)

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        text, mask = jnp.zeros((1, 1, self.text_width)), jnp.ones((1, 1), bool)
        features = jnp.zeros((1, self.order.length - self.order.sizes[0], self.bits))
        return jax.eval_shape(lambda key: self.init(key, text, mask, features), jax.random.key(0))
