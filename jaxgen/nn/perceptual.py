"""Perceptual distance of images: LPIPS (Zhang et al. 2018, https://arxiv.org/abs/1801.03924) over VGG16 features."""

from __future__ import annotations

import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.interop import files, mapping

__all__ = ["NO_PERCEPTUAL", "VGG16Features", "lpips", "load_perceptual"]

NO_PERCEPTUAL = (
    "no perceptual network: training on pixel losses alone. Reconstructions will be blurrier; to change that, give the "
    "path of torchvision's VGG16 weights (vgg16-397923af.pth) and, if at hand, of LPIPS's linear weights (vgg.pth)"
)

_DEPTHS = (2, 2, 3, 3, 3)
_SMALLEST = 16  # four poolings
# LPIPS's change from [-1, 1] to the mean and deviation that VGG was trained with.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015), tapped before each pooling.

    Attributes:
      widths: channels of the five slices.
      dtype: of the computation.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b h2 w2 c"], ...]:
        """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of normalised images, each of half the side of the one before.

        Raises:
          ValueError: not five widths, or images smaller than 16 pixels.
        """
        if len(self.widths) != len(_DEPTHS):
            raise ValueError(f"widths={self.widths}: VGG16 has {len(_DEPTHS)} slices")
        if min(x.shape[1:3]) < _SMALLEST:
            raise ValueError(f"images of {x.shape[1]}x{x.shape[2]} are too small for VGG16: at least {_SMALLEST} pixels")
        taps = []
        for s, (width, depth) in enumerate(zip(self.widths, _DEPTHS), start=1):
            if s > 1:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for k in range(1, depth + 1):
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, dtype=self.dtype, name=f"conv{s}_{k}")(x))
            taps.append(x)
        return tuple(taps)


def lpips(
    params: dict[str, Any], a: Float[Array, "b h w c"], b: Float[Array, "b h w c"], *, dtype: Any = jnp.float32
) -> Float[Array, " b"]:
    r"""Learned perceptual distance of each pair of images, 0 for equal ones.

    .. math:: d(a, b) = \sum_l \frac{1}{H_l W_l} \sum_{h, w} w_l \cdot (\hat a_l - \hat b_l)^2

    (Zhang et al. 2018, eq. 1, with the weights outside the square as in the authors' code), where :math:`\hat a_l` are
    the features of slice l divided by their norm over channels.

    Args:
      params: from `load_perceptual`.
      a: images in [-1, 1], of 3 channels, or of 1 that stands for grey.
      b: the same shape.
      dtype: of the convolutions; the distance is taken in float32.

    Returns:
      float32 distances, differentiable also where all features of a pixel are 0.

    Raises:
      ValueError: shapes that differ, other than 1 or 3 channels, or images smaller than 16 pixels.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] not in (1, 3):
        raise ValueError(f"images of shapes {a.shape} and {b.shape}: expected two equal shapes [b, H, W, 1 or 3]")
    widths = tuple(params["vgg"][f"conv{s}_1"]["kernel"].shape[-1] for s in range(1, len(_DEPTHS) + 1))
    vgg = VGG16Features(widths, dtype)
    both = (jnp.concatenate([a, b]).astype(jnp.float32) - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    total = jnp.zeros(a.shape[0], jnp.float32)
    for tap, weight in zip(vgg.apply({"params": params["vgg"]}, both), params["weights"]):
        unit_a, unit_b = jnp.split(_unit(tap.astype(jnp.float32)), 2)
        total += jnp.mean(jnp.square(unit_a - unit_b) @ weight, axis=(1, 2))
    return total


def _unit(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """x / (|x| + 1e-10) over channels; 0 gets the norm 1, since the slope of the root at 0 would make gradients NaN."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / (jnp.sqrt(jnp.where(square > 0, square, 1.0)) + 1e-10)


def load_perceptual(path: str | os.PathLike, lpips_path: str | os.PathLike | None = None) -> dict[str, Any]:
    """Weights for `lpips`, from published files.

    Args:
      path: state dict of torchvision's `vgg16` (`features.0.weight`, ...; its classifier is not read).
      lpips_path: state dict of LPIPS's linear layers (`lin0.model.1.weight`, ...). Without it every channel weighs 1:
        the plain distance of normalised features, the paper's baseline without learning, of another scale than LPIPS.

    Returns:
      `{"vgg": parameters of VGG16Features, "weights": five vectors}`, float32 numpy arrays.

    Raises:
      ValueError: a file that is missing or damaged, names that are not VGG16's or LPIPS's, or shapes that do not fit.

    Example:
      >>> params = load_perceptual("vgg16-397923af.pth", "vgg.pth")
      >>> lpips(params, images, reconstructions).mean()
    """
    state = files.read_state_dict(path)
    rules, index, widths = [], 0, []
    for s, depth in enumerate(_DEPTHS, start=1):
        if f"features.{index}.bias" not in state:
            raise ValueError(f"{os.fspath(path)}: not the weights of a VGG16 (no features.{index}.bias)")
        widths.append(state[f"features.{index}.bias"].shape[0])
        for k in range(1, depth + 1):
            rules += mapping.conv_rules(f"features.{index}", f"conv{s}_{k}")
            index += 2  # convolution, relu
        index += 1  # pooling
    image = jax.ShapeDtypeStruct((1, _SMALLEST, _SMALLEST, 3), jnp.float32)
    shapes = jax.eval_shape(VGG16Features(tuple(widths)).init, jax.random.key(0), image)
    try:
        vgg = mapping.to_jax(state, rules, ignore=(r"classifier\..*",), expected=shapes["params"])
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not the weights of a VGG16 ({error})") from error

    weights = {str(i): np.ones(width, np.float32) for i, width in enumerate(widths)}
    if lpips_path is not None:
        rule = mapping.Rule("lin{i}.model.1.weight", "{i}", mapping.reshape((1, -1, 1, 1), (-1,)))
        try:
            weights = mapping.to_jax(files.read_state_dict(lpips_path), [rule], expected=weights)
        except ValueError as error:
            raise ValueError(f"{os.fspath(lpips_path)}: not LPIPS weights for this VGG16 ({error})") from error
    float32 = jax.tree.map(lambda x: np.array(x, np.float32, order="C"), {"vgg": vgg, "weights": weights})
    return {"vgg": float32["vgg"], "weights": tuple(float32["weights"][str(i)] for i in range(len(widths)))}
