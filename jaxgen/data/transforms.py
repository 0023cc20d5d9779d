"""What happens to an image between a source and a batch, and between a batch and a model.

The functions on numpy arrays are uint8 to uint8; `pixels` and `to_uint8` are traceable.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxgen.data.sources import Example

__all__ = ["Preprocess", "View", "center_crop", "pixels", "resize_shorter", "to_channels", "to_uint8"]


def to_channels(image: UInt8[np.ndarray, "H W c"], channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Grey to colour by repetition, colour to grey by ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B.

    The weights are in units of 2^-16, as Pillow's, so that a file reads the same by either way.

    Raises:
      ValueError: from or to another number of channels than 1 or 3.
    """
    c = image.shape[-1]
    if c not in (1, 3) or channels not in (1, 3):
        raise ValueError(f"cannot turn {c} channels into {channels}: only 1 and 3 are supported")
    if c == channels:
        return image
    if c == 1:
        return np.repeat(image, 3, axis=-1)
    luma = image.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def resize_shorter(image: UInt8[np.ndarray, "h w C"], size: int) -> UInt8[np.ndarray, "H W C"]:
    """`image` with its shorter side resampled to `size` pixels (Lanczos); itself if that is its size already.

    The longer side becomes int(size * longer / shorter), as in torchvision's `Resize`.
    """
    h, w = image.shape[:2]
    short = min(h, w)
    if short == size:
        return image
    from PIL import Image

    height, width = int(size * h / short), int(size * w / short)
    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)).reshape(height, width, channels)


class View(NamedTuple):
    """What of an image is seen.

    Attributes:
      top, left: of the square that is cut out, in pixels of the resized image.
      flip: whether left and right are exchanged.
    """

    top: int
    left: int
    flip: bool


def center_crop(height: int, width: int, size: int) -> View:
    """The square in the middle; where that falls between two pixels, torchvision's choice (round half to even)."""
    top, left = (round((n - size) / 2) for n in (height, width))
    return View(top, left, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The transform of one example: channels, resize, crop, flip.

    Attributes:
      channels: 1 or 3.
      image_size: side of the square that comes out; 0 leaves the size alone.
      mid_scale: the shorter side becomes round(mid_scale * image_size) before the crop.
      flip: mirror half of the images; training only.
      train: crop at random rather than in the middle.

    Example:
      >>> preprocess = Preprocess(channels=3, image_size=32, mid_scale=1.125, flip=True, train=True)
      >>> preprocess({"image": np.zeros((28, 28, 1), np.uint8), "label": 7}, np.random.default_rng(0))["image"].shape
      (32, 32, 3)
    """

    channels: int
    image_size: int = 0
    mid_scale: float = 1.0
    flip: bool = False
    train: bool = False

    @property
    def random(self) -> bool:
        """Whether the second argument of the call is needed."""
        return self.train and (self.flip or self.image_size > 0)

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        return self.look(example, rng)[0]

    def look(self, example: Example, rng: np.random.Generator | None = None) -> tuple[Example, View]:
        """The transformed example, and what was seen of it: in training a square at a place drawn uniformly, mirrored or not."""
        image = example["image"]
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(f"image is {image.dtype} {image.shape}; expected uint8 (H, W, C)")
        if self.channels == 1:
            image = to_channels(image, 1)
        view = View(0, 0, False)
        if self.image_size:
            size = self.image_size
            image = resize_shorter(image, round(self.mid_scale * size))
            view = center_crop(*image.shape[:2], size)
            if self.train:
                view = View(*(int(rng.integers(n - size + 1)) for n in image.shape[:2]), False)
            image = image[view.top : view.top + size, view.left : view.left + size]
        if self.train and self.flip and rng.random() < 0.5:
            view, image = view._replace(flip=True), image[:, ::-1]
        # Grey becomes colour last: the three copies would be resized alike.
        return {**example, "image": to_channels(image, self.channels)}, view


def pixels(image: UInt8[Array, "*b H W C"]) -> Float[Array, "*b H W C"]:
    """uint8 pixels as float32 in [-1, 1]: (2 x - 255) / 255, so that -1 and 1 are met exactly.

    Raises:
      ValueError: another dtype.
    """
    if image.dtype != jnp.uint8:
        raise ValueError(f"image is {image.dtype}; expected uint8")
    # One rounding: x / 127.5 - 1 exceeds 1 where a compiler multiplies by the reciprocal.
    return (2.0 * jnp.asarray(image).astype(jnp.float32) - 255.0) / 255.0


def to_uint8(image: Float[Array, "*b H W C"]) -> UInt8[Array, "*b H W C"]:
    """The inverse of `pixels`, rounded to the nearest pixel; values outside [-1, 1] are clipped.

    Raises:
      ValueError: an integer dtype.
    """
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"image is {image.dtype}; expected floats in [-1, 1]")
    scaled = (jnp.asarray(image).astype(jnp.float32) + 1.0) * 127.5
    return jnp.clip(jnp.round(scaled), 0, 255).astype(jnp.uint8)
