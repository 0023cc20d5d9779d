"""InceptionV3 (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567), the network that FID, sFID and IS are measured with."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxgen.resample import resize

__all__ = ["InceptionV3", "inception_input"]

SIDE = 299
PREPROCESS = ("tensorflow", "pytorch_fid")
SPATIAL_CHANNELS = 7  # sFID's: 7 * 17 * 17 = 2023 numbers, about as many as the pooled features
_SAME, _VALID = "SAME", "VALID"


def inception_input(images: UInt8[Array, "b H W c"], like: str = "tensorflow") -> Float[Array, "b 299 299 3"]:
    """Pixels as the network expects them; grey images are repeated in three channels.

    Args:
      images: as they would be written to files.
      like: "tensorflow": TensorFlow 1's bilinear resize (pixel corners, no antialiasing), then (x - 128) / 128, as in the
        graph that the reference statistics of guided-diffusion were made with, and torch-fidelity. "pytorch_fid": resize with
        aligned centres, then 2 x / 255 - 1. Scores of the one cannot be compared with the other's.

    Raises:
      ValueError: an unknown `like`, pixels that are not uint8, or other than 1 or 3 channels.
    """
    if like not in PREPROCESS:
        raise ValueError(f"preprocess={like!r}: expected one of {', '.join(PREPROCESS)}")
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} {images.shape}: expected uint8 [b, H, W, 1 or 3]")
    x = jnp.asarray(images).astype(jnp.float32)
    if like == "tensorflow":
        x = (resize(x, (SIDE, SIDE), "bilinear_corners") - 128) / 128
    else:
        x = 2 * resize(x / 255, (SIDE, SIDE), "bilinear") - 1
    return jnp.broadcast_to(x, (*x.shape[:3], 3))


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation with the statistics of training, ReLU.

    Attributes:
      width: channels that come out.
      window: of the convolution.
      stride: of the convolution.
      padding: "SAME" (for stride 1) or "VALID".
    """

    width: int
    window: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = _SAME

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.window, x.shape[-1], self.width))
        vectors = (("scale", 1.0), ("bias", 0.0), ("mean", 0.0), ("var", 1.0))
        scale, bias, mean, var = (self.param(name, nn.initializers.constant(value), (self.width,)) for name, value in vectors)
        # Highest: distances of features are small differences, which TPUs' bf16 products would change.
        x = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias)


class Mixed(nn.Module):
    """One inception block: branches side by side, joined along the channels.

    Attributes:
      kind: "A" to "E", as torchvision names the five constructions.
      width: of the pooling branch in A, of the factorised convolutions in C; not used by the others.
      pool: "mean", "padded_mean" (which counts the zeros around the border) or "max", before the last branch of A, C and E.
    """

    kind: str
    width: int = 0
    pool: str = "mean"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h2 w2 d"], Float[Array, "b h3 w3 e"]]:
        """The joined branches, and the first one alone."""
        branches = getattr(self, f"_{self.kind}")(x)
        return jnp.concatenate(branches, axis=-1), branches[0]

    def _chain(self, x, name: str, *layers: tuple, first: int = 1):
        """Convolutions called `name_1`, `name_2`, ...; a layer is (width, window[, stride])."""
        for i, (width, window, *stride) in enumerate(layers, start=first):
            step = {"stride": stride[0], "padding": _VALID} if stride else {}
            x = ConvNorm(width, _pair(window), **step, name=f"{name}_{i}")(x)
        return x

    def _one(self, x, name: str, width: int, window=1, stride: int = 0):
        step = {"stride": stride, "padding": _VALID} if stride else {}
        return ConvNorm(width, _pair(window), **step, name=name)(x)

    def _pooled(self, x, width: int):
        if self.pool == "max":
            x = nn.max_pool(x, (3, 3), padding=_SAME)
        else:
            x = nn.avg_pool(x, (3, 3), padding=_SAME, count_include_pad=self.pool == "padded_mean")
        return self._one(x, "branch_pool", width)

    def _A(self, x):
        return (
            self._one(x, "branch1x1", 64),
            self._chain(x, "branch5x5", (48, 1), (64, 5)),
            self._chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            self._pooled(x, self.width),
        )

    def _B(self, x):
        return (
            self._one(x, "branch3x3", 384, 3, stride=2),
            self._chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)),
            nn.max_pool(x, (3, 3), strides=(2, 2)),
        )

    def _C(self, x):
        c, row, column = self.width, (1, 7), (7, 1)
        return (
            self._one(x, "branch1x1", 192),
            self._chain(x, "branch7x7", (c, 1), (c, row), (192, column)),
            self._chain(x, "branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row)),
            self._pooled(x, 192),
        )

    def _D(self, x):
        return (
            self._chain(x, "branch3x3", (192, 1), (320, 3, 2)),
            self._chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
            nn.max_pool(x, (3, 3), strides=(2, 2)),
        )

    def _E(self, x):
        def fork(x, name):
            return self._one(x, f"{name}a", 384, (1, 3)), self._one(x, f"{name}b", 384, (3, 1))

        return (
            self._one(x, "branch1x1", 320),
            *fork(self._chain(x, "branch3x3", (384, 1)), "branch3x3_2"),
            *fork(self._chain(x, "branch3x3dbl", (448, 1), (384, 3)), "branch3x3dbl_3"),
            self._pooled(x, 192),
        )


def _pair(window: int | tuple[int, int]) -> tuple[int, int]:
    return (window, window) if isinstance(window, int) else window


class InceptionV3(nn.Module):
    """The network in inference; weights come from `jaxgen.interop.inception`.

    Attributes:
      num_classes: 1008 in the weights that FID is defined with, 1000 in torchvision's.
      tensorflow: the details of the TensorFlow graph of 2015 that FID is defined with: means over the border leave the padding
        out, and the last block takes a maximum instead. torchvision's own network has neither.
      preprocess: see `inception_input`.
    """

    num_classes: int = 1008
    tensorflow: bool = True
    preprocess: str = "tensorflow"

    def observe(self, images: UInt8[Array, "b H W c"]) -> dict[str, Float[Array, "b d"]]:
        """What the scores are made of.

        Returns:
          "pool" [b, 2048] (FID, precision and recall), "spatial" [b, 2023] (sFID, in the order row, column, channel) and
          "logits" [b, v] without the bias of the last layer (IS, as both TensorFlow's evaluators and torch-fidelity take it).
        """
        out = self(inception_input(images, self.preprocess))
        return {
            "pool": out["pool"],
            "spatial": out["spatial"].reshape(len(images), -1),
            "logits": out["logits_unbiased"],
        }

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Any]:
        """Activations of preprocessed images of at least 75 pixels a side.

        Returns:
          "pool" [b, 2048]; "spatial" [b, h, w, 7], the first channels of the block `mixed_6`'s first branch (Nash et al. 2021,
          https://arxiv.org/abs/2103.03841; the tensor that guided-diffusion's evaluator reads); "logits" [b, v], and
          "logits_unbiased", the same without the last layer's bias.

        Raises:
          ValueError: images that are too small.
        """
        if min(x.shape[1:3]) < 75:
            raise ValueError(f"images of {x.shape[1]}x{x.shape[2]}: InceptionV3 needs at least 75 pixels a side")
        mean = "mean" if self.tensorflow else "padded_mean"
        x = ConvNorm(32, (3, 3), 2, _VALID, name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), 1, _VALID, name="Conv2d_2a_3x3")(x)
        x = ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = ConvNorm(192, (3, 3), 1, _VALID, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2))
        for letter, width in zip("bcd", (32, 64, 64)):
            x, _ = Mixed("A", width, mean, name=f"Mixed_5{letter}")(x)
        x, _ = Mixed("B", name="Mixed_6a")(x)
        for letter, width in zip("bcde", (128, 160, 160, 192)):
            x, branch = Mixed("C", width, mean, name=f"Mixed_6{letter}")(x)
            if letter == "d":
                spatial = branch[..., :SPATIAL_CHANNELS]
        x, _ = Mixed("D", name="Mixed_7a")(x)
        x, _ = Mixed("E", pool=mean, name="Mixed_7b")(x)
        x, _ = Mixed("E", pool="max" if self.tensorflow else mean, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        kernel = self.param("fc_kernel", nn.initializers.lecun_normal(), (pool.shape[-1], self.num_classes))
        bias = self.param("fc_bias", nn.initializers.zeros, (self.num_classes,))
        unbiased = jnp.dot(pool, kernel, precision="highest")
        return {"pool": pool, "spatial": spatial, "logits": unbiased + bias, "logits_unbiased": unbiased}
