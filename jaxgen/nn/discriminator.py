"""Patch discriminator of the VQGAN family (Isola et al. 2017, https://arxiv.org/abs/1611.07004; Esser et al. 2021)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["PatchDiscriminator"]


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image: 4x4 convolutions and leaky ReLUs, with group norm.

    `layers` convolutions of stride 2, one of stride 1, one to a single channel; channels double up to eight times
    `width`. Three layers see patches of 70 pixels. The original has batch norm; group norm in its place keeps no
    running statistics, gives the same result on one device and on many, and judges an image the same whatever is
    beside it in the batch.

    Attributes:
      width: channels of the first convolution; a multiple of 8.
      layers: convolutions of stride 2; fewer see smaller patches, as small images need.
      dtype: of the computation; norms and the result are float32.
    """

    width: int = 64
    layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2"]:
        """Logits, high for real, of each patch: h2 = floor(h / 2^layers) - 2.

        Raises:
          ValueError: a width that is no multiple of 8, no layers, or more than the images have room for.
        """
        side = min(images.shape[1:3])
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width={self.width}: expected a positive multiple of 8")
        if self.layers < 1 or side >> self.layers < 3:
            most = max((n for n in range(1, side.bit_length()) if side >> n >= 3), default=0)
            raise ValueError(f"layers={self.layers}: images of {images.shape[1]}x{images.shape[2]} take 1 to {most}")
        init = nn.initializers.normal(0.02)

        def conv(channels: int, stride: int, name: str, bias: bool) -> nn.Conv:
            return nn.Conv(channels, (4, 4), stride, padding=1, use_bias=bias, kernel_init=init, dtype=self.dtype, name=name)

        x = nn.leaky_relu(conv(self.width, 2, "conv0", True)(images), 0.2)
        for n in range(1, self.layers + 1):
            channels = self.width * min(2**n, 8)
            x = conv(channels, 2 if n < self.layers else 1, f"conv{n}", False)(x)
            x = nn.GroupNorm(num_groups=None, group_size=16, epsilon=1e-5, use_fast_variance=False, name=f"norm{n}")(x)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, 1, "out", True)(x)[..., 0].astype(jnp.float32)
