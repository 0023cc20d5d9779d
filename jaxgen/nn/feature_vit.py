"""The vision transformer that describes images: a vector for the whole and one a patch, in DINOv2's layout.

Oquab et al. 2023, *DINOv2: Learning Robust Visual Features without Supervision* (arXiv:2304.07193; facebookresearch/dinov2);
Darcet et al. 2023, *Vision Transformers Need Registers* (arXiv:2309.16588).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgen.config import fields_of
from jaxgen.nn.vit import ViT
from jaxgen.resample import bicubic_matrix

__all__ = ["IMAGENET", "FeatureViT"]

# What published encoders subtract and divide by, (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) of pixels in [0, 1].
IMAGENET = dict(mean=(-0.03, -0.088, -0.188), std=(0.458, 0.448, 0.45))


class FeatureViT(nn.Module):
    """Images -> features of the whole and of each patch.

    Attributes:
      width, depth, heads, mlp_ratio, gated_mlp, layer_scale, scan_layers, dtype: see `ViT`.
      patch: side of a patch, in pixels.
      positions: learned positions along a side; other numbers of patches take them resampled.
      registers: vectors without a place that the blocks see between the whole and the patches, and nobody afterwards.
      channels: C, of the images.
      mean, std: pixels pass as (x - mean) / std; one number, or one a channel.

    Raises:
      ValueError: images whose sides patches do not fill.

    Example:
      >>> model = FeatureViT(width=384, depth=12, heads=6)
      >>> tokens = model.apply(variables, images)               # images [b, 224, 224, 3], tokens [b, 1 + 256, 384]
    """

    width: int
    depth: int
    heads: int
    patch: int = 14
    positions: int = 37
    registers: int = 0
    channels: int = 3
    mlp_ratio: float = 4.0
    gated_mlp: bool = False
    layer_scale: float = 1e-5
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scan_layers: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b H W C"], masked: Bool[Array, "b n"] | None = None) -> Float[Array, "b 1+n d"]:
        """Normed features: the whole image's, then the patches' row by row.

        Args:
          images: in [-1, 1].
          masked: patches that a learned vector stands for.
        """
        sides = [side // self.patch for side in images.shape[1:3]]
        if any(side % self.patch or not side for side in images.shape[1:3]):
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]}: patches of {self.patch} pixels do not fill them")
        init = nn.initializers.truncated_normal(0.02)
        x = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, padding="VALID", dtype=self.dtype, name="patch_embed")(x)
        x = x.reshape(len(x), -1, self.width)
        mask_token = self.param("mask_token", nn.initializers.zeros, (self.width,))
        if masked is not None:
            x = jnp.where(masked[..., None], mask_token.astype(x.dtype), x)
        cls = jnp.broadcast_to(self.param("cls_token", init, (self.width,)), (len(x), 1, self.width))
        # As large as what patches say, so that where they lie matters from the start.
        position = self.param("position", nn.initializers.normal(0.5), (1 + self.positions**2, self.width))
        x = jnp.concatenate([cls.astype(x.dtype), x], axis=1) + self._resampled(position, sides).astype(x.dtype)
        transformer = ViT(**fields_of(self, ViT), name="transformer")
        if not self.registers:
            return transformer(x)
        registers = self.param("register_tokens", init, (self.registers, self.width)).astype(x.dtype)
        registers = jnp.broadcast_to(registers, (len(x), *registers.shape))
        x = transformer(jnp.concatenate([x[:, :1], registers, x[:, 1:]], axis=1))
        return jnp.concatenate([x[:, :1], x[:, 1 + self.registers :]], axis=1)

    def _resampled(self, position, sides: list[int]):
        """Positions for as many patches, bicubic, as in the published code.

        With registers there are no aliases; without, there are, and the enlargement is (n + 0.1) / positions, not n / positions.
        """
        if sides == [self.positions] * 2:
            return position
        grid = position[1:].reshape(self.positions, self.positions, -1)
        if self.registers:
            grid = jax.image.resize(grid, (*sides, self.width), "cubic", precision="highest")
        else:
            rows, columns = (
                jnp.asarray(bicubic_matrix(self.positions, n, (n + 0.1) / self.positions), position.dtype) for n in sides
            )
            grid = jnp.einsum("Hh,Ww,hwd->HWd", rows, columns, grid, precision="highest")
        return jnp.concatenate([position[:1], grid.reshape(-1, self.width)])

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        side = self.patch * self.positions
        images = jax.ShapeDtypeStruct((1, side, side, self.channels), jnp.float32)
        return jax.eval_shape(self.init, jax.random.key(0), images)
