"""Pictures of results: grids, labelled rows, PNG files. Host-side numpy; pillow is imported where it is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from jaxgen import storage

__all__ = ["grid", "rows", "save_gif", "save_png"]

_BACKGROUND = 255


def _cells(name: str, images, scale: int, pad: int) -> np.ndarray:
    """uint8 images, every pixel repeated `scale` times each way."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(f"{name} of shape {images.shape}: expected [n, H, W, C] with C = 1 or 3 and n > 0")
    if not np.issubdtype(images.dtype, np.floating):
        # jax's bfloat16 is not a numpy floating type, but its values are.
        if images.dtype.kind in "iubc":
            raise ValueError(f"{name} of dtype {images.dtype}: expected floats in [-1, 1]")
        images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise ValueError(f"{name}: {int((~np.isfinite(images)).sum())} of {images.size} values are not finite")
    if scale < 1 or pad < 0:
        raise ValueError(f"scale={scale}, pad={pad}: expected scale >= 1 and pad >= 0")
    pixels = np.clip(np.round((images.astype(np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    return pixels.repeat(scale, axis=1).repeat(scale, axis=2)


def _assemble(cells: np.ndarray, columns: int, pad: int) -> np.ndarray:
    """Cells row by row on a white background, `pad` pixels around and between them."""
    n, height, width, channels = cells.shape
    count = -(-n // columns)
    out = np.full((count * (height + pad) + pad, columns * (width + pad) + pad, channels), _BACKGROUND, np.uint8)
    for i, cell in enumerate(cells):
        top, left = (pad + (i // columns) * (height + pad), pad + (i % columns) * (width + pad))
        out[top : top + height, left : left + width] = cell
    return out


def grid(images: Float[np.ndarray, "n H W C"], columns: int, scale: int = 1, pad: int = 2) -> UInt8[np.ndarray, "h w C"]:
    """One picture of all images, row by row.

    Args:
      images: in [-1, 1] (clipped), gray (C = 1) or RGB (C = 3).
      columns: images a row; the last row may be shorter.
      scale: nearest-neighbour enlargement.
      pad: white pixels around and between images.

    Returns:
      uint8, C as in `images`.

    Raises:
      ValueError: not [n, H, W, 1 or 3] floats, values that are not finite, or sizes that are not positive.

    Example:
      >>> save_png("samples.png", grid(images, columns=8, scale=4))
    """
    if columns < 1:
        raise ValueError(f"columns={columns}: must be >= 1")
    return _assemble(_cells("images", images, scale, pad), columns, pad)


def rows(
    images: Sequence[Float[np.ndarray, "n H W C"]],
    labels: Sequence[str] | None = None,
    *,
    columns: int = 0,
    scale: int = 1,
    pad: int = 2,
) -> UInt8[np.ndarray, "h w C"]:
    """One picture in which every array of `images` is a row: originals above reconstructions, or one scale above the next.

    Args:
      images: k arrays of equal shape; item i of each stands in column i.
      labels: k texts, written at the left of each row; rows under 12 pixels crowd them.
      columns: longest row; more items continue below, as another band of k rows. 0: all in one band.
      scale: nearest-neighbour enlargement.
      pad: white pixels around and between images; bands lie four times as far apart.

    Returns:
      uint8, C as in `images`.

    Raises:
      ValueError: as `grid`, no arrays, arrays of different shapes, or another number of labels.
    """
    if not len(images):
        raise ValueError("rows of no images: expected at least one array")
    if columns < 0:
        raise ValueError(f"columns={columns}: must be >= 0")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} rows")
    cells = [_cells(f"row {i}", x, scale, pad) for i, x in enumerate(images)]
    shapes = [x.shape for x in cells]
    if len(set(shapes)) > 1:
        raise ValueError(f"rows of different shapes {[np.shape(x) for x in images]}")
    n, height = shapes[0][:2]
    columns = min(columns or n, n)
    bands = []
    for start in range(0, n, columns):
        part = [x[start : start + columns] for x in cells]
        width = columns - len(part[0])
        part = [np.pad(x, ((0, width), (0, 0), (0, 0), (0, 0)), constant_values=_BACKGROUND) for x in part]
        band = _assemble(np.concatenate(part), columns, pad)
        if labels is not None:
            band = np.concatenate([_margin(labels, height, pad, band.shape), band], axis=1)
        if bands:
            band = np.pad(band, ((3 * pad, 0), (0, 0), (0, 0)), constant_values=_BACKGROUND)
        bands.append(band)
    return np.concatenate(bands)


def _margin(labels: Sequence[str], height: int, pad: int, shape: tuple[int, ...]) -> np.ndarray:
    """The labels in black on white, each centred on its row, as high and with as many channels as the band of `shape`."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    boxes = [font.getbbox(text) for text in labels]
    canvas = Image.new("L", (int(max(box[2] for box in boxes)) + 2 * max(pad, 2), shape[0]), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, (text, box) in enumerate(zip(labels, boxes)):
        middle = pad + i * (height + pad) + height / 2
        draw.text((max(pad, 2), middle - (box[1] + box[3]) / 2), text, fill=0, font=font)
    return np.asarray(canvas)[:, :, None].repeat(shape[2], axis=2)


def save_png(path: str | os.PathLike, picture: UInt8[np.ndarray, "h w C"]) -> None:
    """Writes a PNG that is never seen half-written.

    Args:
      path: of the file, on a disk or in a bucket; missing folders are made.
      picture: uint8, C = 1 or 3.

    Raises:
      ValueError: another dtype or shape.
      OSError: it cannot be written (no space, no permission); what was at `path` is still there.
    """
    from PIL import Image

    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (1, 3):
        raise ValueError(f"picture of shape {picture.shape} and dtype {picture.dtype}: expected uint8 [h, w, 1 or 3]")
    with storage.whole(storage.place(path)) as temporary:
        Image.fromarray(picture[:, :, 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")


def save_gif(path: str | os.PathLike, pictures: UInt8[np.ndarray, "f h w c"], *, seconds: float = 0.2) -> None:
    """Writes an animation that goes on for ever and is never seen half-written.

    Args:
      path: as in `save_png`.
      pictures: uint8, C = 1 or 3.
      seconds: that each is shown.

    Raises:
      ValueError: another dtype or shape, or no time.
      OSError: see `save_png`.
    """
    from PIL import Image

    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3) or not len(pictures):
        raise ValueError(f"pictures of shape {pictures.shape} and dtype {pictures.dtype}: expected uint8 [f, h, w, 1 or 3]")
    if not seconds >= 0.01:
        raise ValueError(f"seconds={seconds}: a GIF counts in hundredths")
    first, *others = (Image.fromarray(picture[:, :, 0] if picture.shape[-1] == 1 else picture) for picture in pictures)
    with storage.whole(storage.place(path)) as temporary:
        options = dict(save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)
        first.save(temporary, format="GIF", **options)
