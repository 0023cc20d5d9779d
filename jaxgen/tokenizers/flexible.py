"""The tokenizer of S064 FlexVAR: scales that are read independently of one another, at any size and aspect ratio."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.orders import Order, scales
from jaxgen.quantizers.multi_scale import Quantized
from jaxgen.quantizers.spherical import SphericalQuantizer
from jaxgen.resample import resize
from jaxgen.scale_lists import Cells, check_increasing, enlarged, pooled
from jaxgen.tokenizers.conv import ConvAutoencoder
from jaxgen.tokenizers.multi_scale import Reconstruction

__all__ = ["FlexibleTokenizer"]


class FlexibleTokenizer(ConvAutoencoder):
    """Images in [-1, 1] <-> tokens of all scales without residuals (Jiao et al. 2025, section 3.2).

    The encoder's features are averaged to each scale's grid and each cell takes its nearest code; every scale by itself
    decodes to an image of its own size. The parameters belong to no list of scales: `tokenizer.clone(patch_nums=...)` reads
    and writes any other one with them. Encoder, decoder and quantiser are LlamaGen's.

    Attributes:
      channels, ch, ch_mult, res_blocks, attention, groups, dropout, dtype: see `ConvAutoencoder`.
      z_channels: between the convolutions and the codes.
      vocab, width, beta, codebook_init: see `SphericalQuantizer`.
      patch_nums: grid of each scale, a side or (height, width); the last is the grid of the encoder's features.
      decoded: how many of the last scales training decodes; 0 is all.

    Raises:
      ValueError: scales that do not increase, or `decoded` above their number.

    Example:
      >>> tokenizer = FlexibleTokenizer(ch=32, ch_mult=(1, 2), patch_nums=(1, 2, 4), vocab=64, width=8)
      >>> params = tokenizer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> wide = tokenizer.clone(patch_nums=(1, (2, 3), (4, 6)))
      >>> tokens = wide.apply(params, jnp.zeros((1, 8, 12, 3)), method="encode")   # [b, 31]
    """

    ch: int = 128
    z_channels: int = 256
    vocab: int = 8912
    width: int = 32
    patch_nums: tuple[Any, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    beta: float = 0.25
    codebook_init: float = 1.0
    decoded: int = 0

    def __post_init__(self):
        check_increasing(self.patch_nums)
        if not 0 <= self.decoded <= len(self.patch_nums):
            raise ValueError(f"decoded={self.decoded}: expected a number of the {len(self.patch_nums)} scales")
        super().__post_init__()

    def setup(self):
        self.setup_convolutions(self.z_channels, 1)
        self.quantizer = SphericalQuantizer(self.vocab, self.width, self.beta, self.codebook_init)

    @property
    def order(self) -> Order:
        """The scales."""
        return scales(self.patch_nums)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images of the last scale."""
        h, w = self.order.shapes[-1]
        return h * self.factor, w * self.factor

    def features(self, images: Float[Array, "b H W C"], train: bool = False) -> Float[Array, "b h w c"]:
        """See `ConvAutoencoder`; on the grid of the last scale."""
        (h, w), last = self.image_size, self.order.shapes[-1]
        if images.shape[1:3] != (h, w):
            raise ValueError(f"images {images.shape}: scales that end at {last} take [b, {h}, {w}, {self.channels}]")
        return super().features(images, train)

    def __call__(self, images: Float[Array, "b H W C"], train: bool = False) -> Reconstruction:
        """Encodes; every scale is quantised with straight-through gradients, and `decoded` ones become images of their own size.

        The paper draws scales at every update; here they are always those of `patch_nums`. Dropout draws from the rng "dropout".
        """
        features = self.features(images, train)
        parts = [self.quantizer(resize(features, shape, "area")) for shape in self.order.shapes]
        hidden = [self.decoder.hidden(self.post_quant_conv(part.features), train) for part in parts[-self.decoded :]]
        pictures = [self.decoder.to_pixels(h) for h in hidden]
        quantized = Quantized(
            parts[-1].features,
            jnp.concatenate([part.tokens.reshape(len(images), -1) for part in parts], axis=1),
            sum(part.loss for part in parts) / len(parts),
            sum(part.counts for part in parts),
            jnp.concatenate([part.vectors for part in parts]),
        )
        return Reconstruction(pictures[-1], hidden[-1], quantized, tuple(pictures[:-1]))

    def encode(self, images: Float[Array, "b H W C"], cells: Cells | None = None) -> Int[Array, "b l"]:
        """Tokens of images in [-1, 1], coarse to fine; with `cells` those of another list, which may be traced."""
        features = jax.lax.stop_gradient(self.features(images))
        if cells is not None:
            return self.quantizer.encode(pooled(features, cells, self._most))
        maps = [self.quantizer.encode(resize(features, shape, "area")) for shape in self.order.shapes]
        return jnp.concatenate([ids.reshape(len(images), -1) for ids in maps], axis=1)

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b H W C"]:
        """Images in [-1, 1] of the last scale's tokens."""
        return self.decode_features(self._map(self.order.split(tokens)[-1], -1))

    def decode_scales(self, tokens: Int[Array, "b l"]) -> Float[Array, "K b H W C"]:
        """The image of each scale by itself, enlarged to the size of the last (bicubic, as in the authors' code)."""
        maps = [self._map(ids, i) for i, ids in enumerate(self.order.split(tokens))]
        return jnp.stack([resize(self.decode_features(m), self.image_size, "bicubic") for m in maps])

    def inputs(self, tokens: Int[Array, "b l"], cells: Cells | None = None) -> Float[Array, "b l-first c"]:
        """Teacher-forced inputs of a next-scale model: for scales 2..K, the codes of the scale before, enlarged to its grid.

        With `cells`, whose first scale has one, those of another list.
        """
        if cells is not None:
            return enlarged(self.quantizer.lookup(tokens), cells, self._most)[:, 1:]
        parts = [self.feed(None, i, ids)[1] for i, ids in enumerate(self.order.split(tokens)[:-1])]
        return jnp.concatenate([jnp.zeros((len(tokens), 0, self.width)), *parts], axis=1)

    def feed(self, features, scale: int, tokens):
        """(The codes of one scale as a map, what the next scale reads; None after the last); earlier `features` play no part."""
        codes = self._map(tokens, scale)
        if scale + 1 == self.order.steps:
            return codes, None
        return codes, resize(codes, self.order.shapes[scale + 1], "bicubic").reshape(len(codes), -1, self.width)

    @property
    def _most(self) -> int:
        return max(self.order.shapes[-1])

    def _map(self, tokens, scale: int) -> Float[Array, "b h w c"]:
        codes = self.quantizer.lookup(tokens)
        return codes.reshape(len(codes), *self.order.shapes[scale], self.width)
