"""Features of captions that are learned with the model that reads them: bytes, and a few blocks that look both ways."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxgen.nn.cross_attention import Context
from jaxgen.nn.vit import ViT

__all__ = ["TextEncoder"]


class TextEncoder(nn.Module):
    """Bytes -> features, one for every `stride` bytes.

    What stands in for the frozen language model of text-to-image systems: whatever makes a `Context` can take its place.

    Attributes:
      length: n, bytes of the longest caption; a multiple of `stride`.
      features: c, of each feature.
      width: of the blocks over the bytes.
      depth: number of blocks.
      heads: h; must divide the width.
      stride: s; neighbouring bytes are joined behind the blocks.
      dtype: of the computation.

    Raises:
      ValueError: a length that is not whole strides.

    Example:
      >>> encoder = TextEncoder(length=8, features=16, width=16, depth=1, heads=2, stride=2)
      >>> context = encoder.apply(params, captions)             # uint8 [b, 8] -> features [b, 4, 16], mask [b, 4]
    """

    length: int
    features: int
    width: int
    depth: int = 2
    heads: int = 4
    stride: int = 1
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.stride < 1 or self.length < 1 or self.length % self.stride:
            raise ValueError(f"length={self.length}, stride={self.stride}: expected a positive multiple")
        super().__post_init__()

    @property
    def positions(self) -> int:
        """p, features of a caption."""
        return self.length // self.stride

    @nn.compact
    def __call__(self, text: Int[Array, "b n"]) -> Context:
        """Features of captions, 0 on the padding.

        Args:
          text: bytes, then zeros (see `jaxgen.data.captions.caption_bytes`).

        Raises:
          ValueError: captions of another length.
        """
        if text.ndim != 2 or text.shape[1] != self.length:
            raise ValueError(f"captions {text.shape}: expected bytes [b, {self.length}]")
        there, init = text > 0, nn.initializers.normal(0.02)
        x = nn.Embed(256, self.width, embedding_init=init, name="embed")(text.astype(jnp.int32))
        x = x + self.param("position", init, (self.length, self.width))
        x = ViT(self.depth, self.heads, dtype=self.dtype, name="blocks")(x, there[:, None])
        x = jnp.where(there[..., None], x, 0).reshape(len(text), self.positions, self.stride * self.width)
        x = nn.Dense(self.features, dtype=self.dtype, name="join")(x)
        mask = there.reshape(len(text), self.positions, self.stride).any(axis=-1)
        return Context(jnp.where(mask[..., None], x, 0).astype(jnp.float32), mask)
