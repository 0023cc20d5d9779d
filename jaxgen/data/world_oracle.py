"""Reads the world's scenes back from pictures: whether a caption is true of a picture, and how well a picture fits a class.

No learning: what differs from the border's colour is cut into connected blobs, and each blob is compared with every shape
drawn at its place and size. Blur and noise that leave shapes recognisable are tolerated, so that generated pictures can
be judged, too.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxgen.data.world_captions import Backdrop, Caption, Count, Place, Relation, Thing, parse
from jaxgen.data.world_render import coverage
from jaxgen.data.world_scene import BACKGROUNDS, CLASSES, COLOURS, SHAPES, SIZES, Object, Scene
from jaxgen.resample import area_matrix

__all__ = ["Blob", "attribute_scores", "caption_score", "check", "class_score", "find_blobs", "perceive"]

MOST_PIXELS = 64  # of the shorter side; larger pictures are averaged down
SMOOTH_FROM = 24  # pixels of the shorter side from which pixels are averaged with their neighbours before they are cut
CONTRAST = 70.0  # Euclidean distance from the background's colour, in units of 1/255, from which a pixel belongs to a blob
SMALLEST = 0.35  # share of the smallest object's area from which a blob counts
FAINT = 0.7  # share of a colour's contrast to the background below which a blob is taken to be of a paler colour
KINDS = {Count: "count", Place: "place", Relation: "relation", Backdrop: "background"}
NAMED = 0.6  # overlap (intersection over union) with a shape from which a blob is called one


class Blob(NamedTuple):
    """Something that stands out from the background.

    Attributes:
      colour: mean RGB of its middle.
      x, y: its centre, as shares of the width and height.
      radius: of the circle of equal area, as a share of the shorter side.
      fits: [5], intersection over union with each of SHAPES, drawn there.
    """

    colour: Float[np.ndarray, "3"]
    x: float
    y: float
    radius: float
    fits: Float[np.ndarray, "5"]

    @property
    def distances(self) -> Float[np.ndarray, "6"]:
        """Euclidean distances to each of COLOURS."""
        return np.linalg.norm(np.array(list(COLOURS.values())) - self.colour, axis=1)

    def name(self) -> Object:
        """The nearest colour and the best shape; no shape where none fits."""
        best = int(self.fits.argmax())
        shape = SHAPES[best] if self.fits[best] >= NAMED else None
        return Object(shape, list(COLOURS)[int(self.distances.argmin())], self.x, self.y, self.radius)


def perceive(image: np.ndarray) -> Scene:
    """The scene that a picture shows, as far as it can be told.

    Args:
      image: uint8 [H, W, 3], or floats in [-1, 1].

    Raises:
      ValueError: another rank, another number of channels, or a side below 16 pixels.
    """
    background, blobs = find_blobs(image)
    names = list(BACKGROUNDS)
    nearest = int(np.linalg.norm(np.array(list(BACKGROUNDS.values())) - background, axis=1).argmin())
    return Scene(names[nearest], tuple(sorted((blob.name() for blob in blobs), key=lambda o: o.depth)))


def check(caption: str | Caption, image: np.ndarray) -> bool:
    """Whether all that a caption says is true of a picture.

    Raises:
      ValueError: a caption outside the grammar, or see `perceive`.

    Example:
      >>> check("one red circle; a red circle at the top left", world.picture(7)["image"])    # doctest: +SKIP
      True
    """
    return _read(caption).holds(perceive(image))


def caption_score(caption: str | Caption, image: np.ndarray) -> float:
    """The share of a caption's statements that are true of a picture; raises as `check`."""
    return _read(caption).share(perceive(image))


def attribute_scores(caption: str | Caption, scene: Scene) -> dict[str, float]:
    """Of each kind of thing that a caption says, the share that is true of a scene, such as `perceive`'s.

    "count", "place", "relation" and "background" are whole statements; "shape", "colour" and "size" are single words about things
    that are said to be there, true if there is anything of that shape, colour or size.

    Raises:
      ValueError: a caption outside the grammar.

    Example:
      >>> scene = Scene("black", (Object("circle", "red", 0.5, 0.5, 0.1),))
      >>> attribute_scores("one red cross; a black background", scene)
      {'count': 0.0, 'shape': 0.0, 'colour': 1.0, 'background': 1.0}
    """
    found: dict[str, list[bool]] = {}
    for statement in _read(caption).statements:
        things = [getattr(statement, name) for name in ("thing", "other") if hasattr(statement, name)]
        found.setdefault(KINDS[type(statement)], []).append(statement.holds(scene))
        for thing in [] if getattr(statement, "number", 1) == 0 else things:
            for field in dataclasses.fields(thing):
                if (word := getattr(thing, field.name)) is not None:
                    one = Thing(**{field.name: word})
                    found.setdefault(field.name, []).append(any(map(one.fits, scene.objects)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def class_score(images: np.ndarray, labels: Int[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
    """How well pictures show one object of a class each, in [0, 1]: the mean of three marks.

    They are: 1 if there is one object alone, and it has a shape, else 0; 1 if the object's colour is the class's, else 0; and
    2 f - 1, if positive, of the overlap f with the class's shape drawn in the object's place. Where there are several objects,
    the one counts that does best.

    Args:
      images: [b, H, W, 3], uint8 or floats in [-1, 1]; pictures with numbers that are not finite score NaN.
      labels: indices in CLASSES.

    Raises:
      ValueError: a label out of range, unequal lengths, or see `perceive`.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise ValueError(f"labels {labels.min()} to {labels.max()}: expected 0 to {len(CLASSES) - 1}")
    return np.array([_class_score(image, int(label)) for image, label in zip(np.asarray(images), labels)], np.float32)


def _class_score(image: np.ndarray, label: int) -> float:
    if not np.isfinite(image).all():
        return float("nan")
    _, blobs = find_blobs(image)
    colour, shape = divmod(label, len(SHAPES))
    marks = [float(blob.distances.argmin() == colour) + max(0.0, 2 * blob.fits[shape] - 1) for blob in blobs]
    alone = len(blobs) == 1 and blobs[0].fits.max() >= NAMED
    return (float(alone) + float(max(marks, default=0.0))) / 3


def _read(caption: str | Caption) -> Caption:
    return parse(caption) if isinstance(caption, str) else caption


def find_blobs(image: np.ndarray) -> tuple[Float[np.ndarray, "3"], list[Blob]]:
    """(the background's RGB, blobs that are large enough to be objects); see `perceive`."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    unit = min(height, width)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(frame, axis=0)
    smooth = _smooth(pixels) if unit >= SMOOTH_FROM else pixels
    contrast = np.linalg.norm(smooth - background, axis=-1)
    regions = _components(contrast > CONTRAST)
    least = SMALLEST * np.pi * (SIZES["small"][0] * unit) ** 2
    labels, sizes = np.unique(regions[regions > 0], return_counts=True)
    blobs = []
    for label in labels[sizes >= least]:
        region = regions == label
        # Its own pixels and those around, which are partly covered, without what belongs to others.
        around = _grow(_grow(region)) & ((regions == 0) | region)
        blobs.append(_blob(pixels, contrast, background, region, around))
    return background, blobs


def _blob(pixels, contrast, background, region: Bool[np.ndarray, "H W"], around: Bool[np.ndarray, "H W"]) -> Blob:
    height, width = region.shape
    middle = region & (contrast >= np.quantile(contrast[region], 0.6))
    colour = pixels[middle].mean(axis=0)
    # An object's true colour where the blob's is near it: small objects have no pixel that they cover wholly.
    true = np.array(list(COLOURS.values()))
    towards = true[np.linalg.norm(true - colour, axis=1).argmin()] - background
    if np.linalg.norm(colour - background) < FAINT * np.linalg.norm(towards):
        towards = colour - background
    covered = np.where(around, (pixels - background) @ towards / (towards @ towards), 0.0)
    covered = np.clip(covered, 0, 1)
    area = covered.sum()
    rows, columns = np.mgrid[:height, :width] + 0.5
    x, y, radius = (covered * columns).sum() / area, (covered * rows).sum() / area, np.sqrt(area / np.pi)
    fits = []
    for shape in SHAPES:
        drawn = coverage(shape, x, y, radius, height, width)
        fits.append(np.minimum(covered, drawn).sum() / np.maximum(covered, drawn).sum())
    return Blob(colour, float(x / width), float(y / height), float(radius / min(height, width)), np.array(fits))


def _pixels(image: np.ndarray) -> Float[np.ndarray, "H W 3"]:
    """`image` in units of 1/255, averaged down if it is large."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or min(image.shape[:2]) < 16:
        raise ValueError(f"image {image.shape}: expected [H, W, 3] of at least 16x16 pixels")
    pixels = image.astype(float) if image.dtype == np.uint8 else (image.astype(float) + 1) * 127.5
    height, width = pixels.shape[:2]
    share = MOST_PIXELS / min(height, width)
    if share < 1:
        rows, columns = area_matrix(height, round(share * height)), area_matrix(width, round(share * width))
        pixels = np.einsum("Hh,Ww,hwc->HWc", rows, columns, pixels, optimize=True)
    return pixels


def _smooth(x: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """Each pixel averaged with its neighbours, weighted 1, 2, 1 along both sides."""
    x = np.pad(x, ((1, 1), (1, 1), (0, 0)), mode="edge")
    x = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4
    return (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4


def _grow(region: Int[np.ndarray, "H W"] | Bool[np.ndarray, "H W"]) -> np.ndarray:
    """The largest value of each pixel and its eight neighbours."""
    x = np.pad(region, 1)
    x = np.maximum(np.maximum(x[:-2], x[1:-1]), x[2:])
    return np.maximum(np.maximum(x[:, :-2], x[:, 1:-1]), x[:, 2:])


def _components(mask: Bool[np.ndarray, "H W"]) -> Int[np.ndarray, "H W"]:
    """Numbers of the connected parts (over sides and corners) of a mask; 0 outside."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = np.where(mask, _grow(label), 0)
        if (grown == label).all():
            return label
        label = grown
