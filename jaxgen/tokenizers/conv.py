"""Convolutional encoder and decoder of the VQGAN family: images <-> feature maps at 1 / 2^(levels - 1) of their size."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.config import fields_of
from jaxgen.nn.conv import AttentionBlock, Downsample, ResBlock, Upsample, group_norm

__all__ = ["ConvAutoencoder", "ConvDecoder", "ConvEncoder"]


class _Middle(nn.Module):
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h, train):
        block = dict(channels=h.shape[-1], groups=self.groups, dropout=self.dropout, dtype=self.dtype)
        h = ResBlock(**block, name="block_0")(h, train)
        h = AttentionBlock(self.groups, self.dtype, name="attention")(h)
        return ResBlock(**block, name="block_1")(h, train)


class ConvEncoder(nn.Module):
    """Images to features.

    Attributes:
      ch: channels of the first level.
      ch_mult: channels of each level over `ch`; each level but the last halves the resolution.
      res_blocks: residual blocks a level.
      z_channels: channels of the output.
      attention: attention after each block of the lowest resolution (the middle always has it).
      groups: of the norms; must divide every level's channels.
      dropout: in residual blocks.
      dtype: of the computation; norms are float32.
    """

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    z_channels: int = 32
    attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W C"], train: bool = False) -> Float[Array, "b h w z"]:
        _check_groups(self)
        h = nn.Conv(self.ch, (3, 3), dtype=self.dtype, name="conv_in")(x.astype(self.dtype))
        last = len(self.ch_mult) - 1
        for level, mult in enumerate(self.ch_mult):
            for i in range(self.res_blocks):
                block = ResBlock(self.ch * mult, self.groups, self.dropout, self.dtype, name=f"down_{level}_block_{i}")
                h = block(h, train)
                if self.attention and level == last:
                    h = AttentionBlock(self.groups, self.dtype, name=f"down_{level}_attention_{i}")(h)
            if level != last:
                h = Downsample(self.dtype, name=f"down_{level}_downsample")(h)
        h = _Middle(self.groups, self.dropout, self.dtype, name="mid")(h, train)
        h = nn.silu(group_norm(self.groups, "norm_out")(h)).astype(self.dtype)
        return nn.Conv(self.z_channels, (3, 3), dtype=self.dtype, name="conv_out")(h).astype(jnp.float32)


class ConvDecoder(nn.Module):
    """Features to images. Attributes as in `ConvEncoder`; `channels` of the image."""

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    channels: int = 3
    attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        _check_groups(self)
        last = len(self.ch_mult) - 1
        self.conv_in = nn.Conv(self.ch * self.ch_mult[-1], (3, 3), dtype=self.dtype)
        self.mid = _Middle(self.groups, self.dropout, self.dtype)
        layers = []
        for level in range(last, -1, -1):
            for i in range(self.res_blocks + 1):
                width = self.ch * self.ch_mult[level]
                block = ResBlock(width, self.groups, self.dropout, self.dtype, name=f"up_{level}_block_{i}")
                layers.append((block, True))
                if self.attention and level == last:
                    attention = AttentionBlock(self.groups, self.dtype, name=f"up_{level}_attention_{i}")
                    layers.append((attention, False))
            if level:
                layers.append((Upsample(self.dtype, name=f"up_{level}_upsample"), False))
        self.layers = layers
        self.norm_out = group_norm(self.groups, None)
        self.conv_out = nn.Conv(self.channels, (3, 3), dtype=self.dtype)

    def __call__(self, z: Float[Array, "b h w z"], train: bool = False) -> Float[Array, "b H W C"]:
        return self.to_pixels(self.hidden(z, train))

    def hidden(self, z: Float[Array, "b h w z"], train: bool = False) -> Float[Array, "b H W c"]:
        """Everything up to the last convolution, whose weight the adaptive adversarial loss differentiates."""
        h = self.mid(self.conv_in(z.astype(self.dtype)), train)
        for layer, takes_train in self.layers:
            h = layer(h, train) if takes_train else layer(h)
        return nn.silu(self.norm_out(h)).astype(self.dtype)

    def to_pixels(self, h: Float[Array, "b H W c"]) -> Float[Array, "b H W C"]:
        """The last convolution."""
        return self.conv_out(h).astype(jnp.float32)


class ConvAutoencoder(nn.Module):
    """What tokenizers have in common that quantise between a `ConvEncoder` and a `ConvDecoder`: all but the quantiser.

    A subclass says its `width`, c of a code, and its `image_size`, and calls `setup_convolutions`.

    Attributes:
      channels: C of the images.
      ch, ch_mult, res_blocks, attention, groups, dropout: see `ConvEncoder`.
      dtype: of the encoder's and decoder's computation; all else is float32.
    """

    channels: int = 3
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup_convolutions(self, z_channels: int, kernel: int) -> None:
        """Makes encoder and decoder, and the convolutions between their `z_channels` and the codes' width."""
        self.encoder = ConvEncoder(**fields_of(self, ConvEncoder) | dict(z_channels=z_channels))
        self.decoder = ConvDecoder(**fields_of(self, ConvDecoder))
        self.quant_conv = nn.Conv(self.width, (kernel, kernel))
        self.post_quant_conv = nn.Conv(z_channels, (kernel, kernel))

    @property
    def factor(self) -> int:
        """Pixels to a cell of the features, along an axis."""
        return 2 ** (len(self.ch_mult) - 1)

    def features(self, images: Float[Array, "b H W C"], train: bool = False) -> Float[Array, "b h w c"]:
        """The encoder's features, before quantisation.

        Raises:
          ValueError: images of another size or number of channels, or not floating-point.
        """
        want = (*self.image_size, self.channels)
        if images.ndim != 4 or images.shape[1:] != want:
            raise ValueError(f"images {images.shape}: this tokenizer takes [b, {', '.join(map(str, want))}]")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images have dtype {images.dtype}: expected floating-point values in [-1, 1]")
        return self.quant_conv(self.encoder(images, train))

    def to_pixels(self, hidden: Float[Array, "b H W c"]) -> Float[Array, "b H W C"]:
        """The decoder's last convolution."""
        return self.decoder.to_pixels(hidden)

    def decode_features(self, features: Float[Array, "b h w c"]) -> Float[Array, "b H W C"]:
        """Images in [-1, 1] of quantised features."""
        return jnp.clip(self.decoder(self.post_quant_conv(features)), -1, 1)


def _check_groups(module):
    for mult in module.ch_mult:
        if (module.ch * mult) % module.groups:
            raise ValueError(f"groups={module.groups} does not divide {module.ch * mult} channels (ch * {mult})")
