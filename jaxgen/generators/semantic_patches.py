"""Predicting the patches of an image one after another, in an order of each image's own (S140 SemAIM).

Song et al. 2024, *Semantic-Aware Autoregressive Image Modeling for Visual Representation Learning* (arXiv:2312.10457;
skyoux/SemAIM). What is wanted are the features of the encoder; that patches can be predicted shows what it has understood.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.nn.cross_attention import Context, CrossAttention
from jaxgen.nn.mlp import MLP
from jaxgen.nn.timestep import sinusoids
from jaxgen.nn.vit import ViTBlock
from jaxgen.tokenizers.latents import LatentTokenizer

__all__ = ["SemanticPatchModel", "SemanticPatchSampler"]


class QueryBlock(nn.Module):
    """g + attention of norm(g) to norm(h), then an MLP; one norm serves both. Attributes: see `ViTBlock`."""

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, g: Float[Array, "b l d"], h: Float[Array, "b l d"], mask) -> Float[Array, "b l d"]:
        norm1, norm2 = (nn.LayerNorm(epsilon=1e-6, name=f"norm{i}") for i in (1, 2))
        context = Context(norm1(h).astype(self.dtype), jnp.broadcast_to(mask, (len(h), *mask.shape)))
        g = g + CrossAttention(self.heads, dtype=self.dtype, name="attention")(norm1(g).astype(self.dtype), context)
        mlp = MLP(round(g.shape[-1] * self.mlp_ratio), exact=True, dtype=self.dtype, name="mlp")
        return g + mlp(norm2(g).astype(self.dtype))


class SemanticPatchModel(nn.Module):
    """Patches in any order -> what comes next, and features of whole images.

    One stack of blocks reads the patches, each of which sees those before it in the order; another asks it for the patch at the
    next place, of which it knows the place alone (figure 2). For features the first stack reads whole images, in which all
    patches see all others.

    Attributes:
      length: n, patches of a square image.
      channels: c, numbers a patch.
      targets: numbers that are predicted of a patch.
      width, depth, heads, mlp_ratio, dtype: of the stack that reads, see `ViTBlock`; the width is a multiple of 4.
      query_depth: blocks of the stack that asks; divides `depth`.

    Raises:
      ValueError: patches that make no square, or depths or widths that do not divide.

    Example:
      >>> model = SemanticPatchModel(length=196, channels=768, targets=768, width=768, depth=12, heads=12, query_depth=12)
      >>> predicted, seen = model.apply(variables, patches, orders)     # patches [b, 196, 768], orders [b, 196]
      >>> tokens = model.apply(variables, patches, method="encode")     # [b, 197, 768], the first of the whole image
    """

    length: int
    channels: int
    targets: int
    width: int
    depth: int
    heads: int
    query_depth: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        if round(self.length**0.5) ** 2 != self.length:
            raise ValueError(f"length={self.length}: patches of a square are expected")
        if self.depth % self.query_depth:
            raise ValueError(f"query_depth={self.query_depth} must divide depth={self.depth}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width={self.width}: expected a multiple of 4 and of heads={self.heads}")
        super().__post_init__()

    def setup(self):
        fields = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, dtype=self.dtype)
        self.embed = nn.Dense(self.width, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        self.cls = self.param("cls", nn.initializers.normal(0.02), (self.width,))
        self.blocks = [ViTBlock(**fields) for _ in range(self.depth)]
        self.queries = [QueryBlock(**fields) for _ in range(self.query_depth)]
        self.norm = nn.LayerNorm(epsilon=1e-6)
        self.hidden = nn.Dense(round(self.mlp_ratio * self.width), dtype=self.dtype)
        self.out = nn.Dense(self.targets, dtype=self.dtype)
        self.pixels = nn.Dense(self.channels, dtype=self.dtype)

    def __call__(
        self, patches: Float[Array, "b n c"], orders: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n t"], Float[Array, "b n c"]]:
        """What is predicted of each patch, and its pixels, row by row of the image, from those before it in the order.

        The pixels are read from what the last block of the asking stack leaves, and teach it nothing: no gradient passes.

        Args:
          patches: row by row.
          orders: a permutation of the patches for each image.
        """
        n, place = self.length, self._places[orders]
        read = jnp.take_along_axis(patches, orders[..., None], axis=1)[:, :-1]
        h = self._with_whole(self.embed(read) + place[:, :-1])
        g, seen = place.astype(self.dtype), jnp.tril(jnp.ones((n, n), bool))
        for i, block in enumerate(self.blocks):
            h, _ = block(h, seen)
            if (i + 1) % (self.depth // self.query_depth) == 0:
                g = self.queries[i // (self.depth // self.query_depth)](g, h, seen)
        g = self.norm(g)
        predicted = self.out(nn.gelu(self.hidden(g), approximate=False))
        pixels = self.pixels(jax.lax.stop_gradient(g))
        back = jnp.argsort(orders, axis=1)[..., None]
        return tuple(jnp.take_along_axis(x, back, axis=1).astype(jnp.float32) for x in (predicted, pixels))

    def encode(self, patches: Float[Array, "b n c"]) -> Float[Array, "b 1+n d"]:
        """Normed features of the whole image, then of its patches row by row."""
        x = self._with_whole(self.embed(patches) + self._places)
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)

    @property
    def _places(self) -> Float[Array, "n d"]:
        """Fixed vectors that say where a patch lies: sinusoids of its row and column."""
        side = round(self.length**0.5)
        rows, columns = jnp.divmod(jnp.arange(self.length), side)
        return jnp.concatenate([sinusoids(rows, self.width // 2), sinusoids(columns, self.width // 2)], axis=-1)

    def _with_whole(self, x):
        whole = jnp.broadcast_to(self.cls, (len(x), 1, self.width))
        return jnp.concatenate([whole, x], axis=1).astype(self.dtype)

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        patches, orders = jnp.zeros((1, self.length, self.channels)), jnp.arange(self.length)[None]

        def init(key):
            return self.init(key, patches, orders)

        return jax.eval_shape(init, jax.random.key(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SemanticPatchSampler:
    """Completes images patch by patch: each is the mean of what the model expects, given those before it in the order.

    Attributes:
      generator: the model.
      tokenizer: cuts images into its patches; has no parameters.

    Raises:
      ValueError: patches of another number or size than the model's.
    """

    generator: SemanticPatchModel
    tokenizer: LatentTokenizer

    def __post_init__(self):
        ours, theirs = (self.generator.length, self.generator.channels), (self.tokenizer.length, self.tokenizer.token_channels)
        if ours != theirs:
            raise ValueError(f"generator of {ours[0]} patches of {ours[1]} numbers does not fit {theirs[0]} of {theirs[1]}")

    def __call__(self, variables, images: Float[Array, "b H W C"], orders: Int[Array, "b n"], known) -> Float[Array, "b H W C"]:
        """Images whose first `known` patches are the given images', and the rest the model's.

        Args:
          variables: of the generator.
          images: in [-1, 1]; what is not known of them is not read.
          orders: see `SemanticPatchModel`.
          known: patches, from 0 to n; traced.

        Raises:
          ValueError: a number of patches that there is not.
        """
        if not 0 <= known <= self.generator.length:
            raise ValueError(f"known={known}: expected 0..{self.generator.length} patches")
        return self._complete(variables, images, orders, jnp.int32(known))

    @functools.partial(jax.jit, static_argnums=0)
    def _complete(self, variables, images, orders, known):
        rows = jnp.arange(len(images))

        def one(i, patches):
            _, pixels = self.generator.apply(variables, patches, orders)
            return patches.at[rows, orders[:, i]].set(pixels[rows, orders[:, i]])

        patches = self.tokenizer.encode(images)
        there = jnp.argsort(orders, axis=1)[..., None] < known
        patches = jax.lax.fori_loop(known, self.generator.length, one, jnp.where(there, patches, 0.0))
        return self.tokenizer.decode(patches)
