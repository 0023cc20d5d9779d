"""The multi-scale VQ autoencoder of VAR (S047): a convolutional encoder and decoder around a multi-scale quantiser."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.config import fields_of
from jaxgen.orders import Order, scales
from jaxgen.quantizers.multi_scale import MultiScaleQuantizer, Quantized
from jaxgen.tokenizers.conv import ConvAutoencoder

__all__ = ["MultiScaleTokenizer", "Reconstruction"]


class Reconstruction(NamedTuple):
    """What training a tokenizer sees.

    Attributes:
      images: [b, H, W, C], not clipped.
      hidden: [b, H, W, c], the decoder's features before its last convolution.
      quantized: of the quantiser.
      smaller: images of lower resolution, where each scale decodes to one of its own; to be compared with `images` shrunk.
    """

    images: Float[Array, "b H W C"]
    hidden: Float[Array, "b H W c"]
    quantized: Quantized
    smaller: tuple[Float[Array, "b h w C"], ...] = ()


class MultiScaleTokenizer(ConvAutoencoder):
    """Images in [-1, 1] <-> tokens of all scales.

    Attributes:
      channels, ch, ch_mult, res_blocks, attention, groups, dropout, dtype: see `ConvAutoencoder`.
      vocab, width, patch_nums, phis, phi_ratio, beta, cosine, codebook_init: see `MultiScaleQuantizer`.

    Example:
      >>> tokenizer = MultiScaleTokenizer(ch=32, ch_mult=(1, 2), patch_nums=(1, 2, 4), vocab=64, width=8)
      >>> params = tokenizer.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> tokens = tokenizer.apply(params, images, method="encode")   # [b, 21]
    """

    vocab: int = 4096
    width: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    phis: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    cosine: bool = False
    codebook_init: float = 1.0

    def setup(self):
        self.setup_convolutions(self.width, 3)
        self.quantizer = self._quantizer()

    def _quantizer(self) -> MultiScaleQuantizer:
        return MultiScaleQuantizer(**fields_of(self, MultiScaleQuantizer))

    @property
    def order(self) -> Order:
        """The scales."""
        return scales(self.patch_nums)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        h, w = self.order.shapes[-1]
        return h * self.factor, w * self.factor

    def __call__(self, images: Float[Array, "b H W C"], train: bool = False) -> Reconstruction:
        """Encodes, quantises with straight-through gradients, and decodes. Dropout needs the rng stream "dropout"."""
        quantized = self.quantizer(self.features(images, train))
        hidden = self.decoder.hidden(self.post_quant_conv(quantized.features), train)
        return Reconstruction(self.decoder.to_pixels(hidden), hidden, quantized)

    def encode(self, images: Float[Array, "b H W C"]) -> Int[Array, "b l"]:
        """Tokens of images in [-1, 1], coarse to fine."""
        return self.quantizer.encode(self.features(images))

    def decode(self, tokens: Int[Array, "b l"]) -> Float[Array, "b H W C"]:
        """Images in [-1, 1] of tokens."""
        return self.decode_features(self.quantizer.decode(tokens))

    def decode_scales(self, tokens: Int[Array, "b l"]) -> Float[Array, "K b H W C"]:
        """The image after 1, 2, ... K scales."""
        return jnp.stack([self.decode_features(p) for p in self.quantizer.pictures(tokens)])

    def inputs(self, tokens: Int[Array, "b l"]) -> Float[Array, "b l-first c"]:
        """See `MultiScaleQuantizer.inputs`."""
        return self.quantizer.inputs(tokens)

    def own(self, scale: int, tokens: Int[Array, "b q"]) -> Float[Array, "b q c"]:
        """See `MultiScaleQuantizer.own`."""
        return self.quantizer.own(scale, tokens)

    def feed(self, features, scale: int, tokens):
        """See `MultiScaleQuantizer.feed`."""
        return self.quantizer.feed(features, scale, tokens)
