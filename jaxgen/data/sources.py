"""Random-access image sources that are held in memory: handwritten digits, npz files of pixels or of JPEG bytes.

A source is what grain reads from: `len(source)` and `source[i] -> {"image": uint8 [H, W, C], "label": int}`.
"""

from __future__ import annotations

import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NotRequired, Protocol, TypedDict

import numpy as np
from jaxtyping import Int, UInt8

__all__ = [
    "ArraySource",
    "EncodedImages",
    "EncodedSource",
    "Example",
    "Source",
    "check_split",
    "decode",
    "digits",
    "held_out",
    "npz",
]

SPLITS = ("train", "test")


class Example(TypedDict):
    """One labelled image, and what is said of it where captions are asked for (`jaxgen.data.captions`)."""

    image: UInt8[np.ndarray, "H W C"]
    label: int
    caption: NotRequired[UInt8[np.ndarray, "n"]]


class Source(Protocol):
    """What `jaxgen.data.batches` reads: grain's `RandomAccessDataSource`, and what there is to know about its classes.

    A source can be pickled, so that worker processes get their own copy.

    Attributes:
      num_classes: labels are in [0, num_classes).
      class_names: one for each class, or None.
    """

    num_classes: int
    class_names: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def name(self, index: int) -> str:
        """What error messages call this example."""
        ...


class EncodedImages(Source, Protocol):
    """A source whose images are compressed where they lie."""

    def read(self, index: int) -> bytes:
        """The encoded image."""
        ...

    def subset(self, indices: Int[np.ndarray, "m"]) -> EncodedImages:
        """The source of these examples only."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Images of one size, in one array.

    Attributes:
      images: uint8 pixels.
      labels: in [0, num_classes).
      num_classes: as in `Source`.
      class_names: as in `Source`.
      captions: strings, or None.
      where: names the array in error messages.

    Raises:
      ValueError: arrays of another type or rank, of unequal lengths, or empty; labels out of range.
    """

    images: UInt8[np.ndarray, "n H W C"]
    labels: Int[np.ndarray, "n"]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    captions: np.ndarray | None = None
    where: str = "images"

    def __post_init__(self):
        x = self.images
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
            raise ValueError(f"{self.where}: {x.dtype} {x.shape}; expected uint8 (n, H, W, C) with C 1 or 3")
        _check_labels(self, len(x))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return f"{self.where}[{index}]"

    def caption(self, index: int) -> str | None:
        """What is said of an image."""
        return None if self.captions is None else str(self.captions[index])

    def subset(self, indices: Int[np.ndarray, "m"]) -> ArraySource:
        """The source of these examples only."""
        captions = None if self.captions is None else self.captions[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices], captions=captions)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSource:
    """Compressed images (JPEG, PNG, ...) joined in one byte array; each is decoded when it is asked for.

    Attributes:
      data: the bytes of all images.
      offset: image j is `data[offset[j]:offset[j + 1]]`.
      index: which of the images these are.
      labels: of these images, in [0, num_classes).
      num_classes: as in `Source`.
      class_names: as in `Source`.
      where: names the array in error messages.

    Raises:
      ValueError: offsets that decrease or leave `data`, arrays of unequal lengths, or empty; labels out of range.
    """

    data: UInt8[np.ndarray, "bytes"]
    offset: Int[np.ndarray, "m+1"]
    index: Int[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    num_classes: int
    class_names: tuple[str, ...] | None = None
    where: str = "data"

    def __post_init__(self):
        o = self.offset
        if len(o) and (o[0] < 0 or o[-1] > len(self.data) or (np.diff(o) < 0).any()):
            raise ValueError(f"{self.where}: offsets from {o[0]} to {o[-1]} do not divide {len(self.data)} bytes")
        _check_labels(self, len(self.index))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Example:
        return {"image": decode(self.read(index), self.name(index)), "label": int(self.labels[index])}

    def name(self, index: int) -> str:
        return f"{self.where}[{self.index[index]}]"

    def read(self, index: int) -> bytes:
        """The encoded image."""
        j = self.index[index]
        return self.data[self.offset[j] : self.offset[j + 1]].tobytes()

    def subset(self, indices: Int[np.ndarray, "k"]) -> EncodedSource:
        """The source of these examples only."""
        return dataclasses.replace(self, index=self.index[indices], labels=self.labels[indices])


def _check_labels(source, n: int) -> None:
    """That `source` has `n > 0` labels, each of them one of its classes."""
    labels, names = source.labels, source.class_names
    if n == 0:
        raise ValueError(f"{source.where}: no images")
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise ValueError(f"{source.where}: labels {labels.dtype} {labels.shape}; expected integers ({n},)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= source.num_classes:
        raise ValueError(f"{source.where}: labels {low} to {high} are not all in [0, {source.num_classes})")
    if names is not None and len(names) != source.num_classes:
        raise ValueError(f"{source.where}: {len(names)} class names for {source.num_classes} classes")


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is "train" or "test"."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")


def decode(data: bytes, name: str, *, thumbnail: bool = False) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of an encoded image, turned as its EXIF orientation says.

    Grey images get one channel and all others three; transparency is dropped.

    Args:
      data: the content of an image file.
      name: names it in the error.
      thumbnail: decode a JPEG at an eighth of its size. That reads all of it in much less time: enough to learn
        whether it is broken.

    Raises:
      ValueError: `data` is no image, is broken, or has more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            if thumbnail:
                image.draft(None, (1, 1))
            image = ImageOps.exif_transpose(image)
            array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"cannot read image {name}: not an image format that Pillow knows") from error
    except Exception as error:  # each of Pillow's decoders has its own: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot read image {name}: {error}") from error
    return array.reshape(*array.shape[:2], -1)


def held_out(labels: Int[np.ndarray, "n"], split: str, every: int, where: str) -> Int[np.ndarray, "m"]:
    """Indices of one part of a data set that has no test part of its own.

    One in `every` examples of each class is held out: at least one where the class has two, none where it has one. They
    are evenly spaced within the class, so the parts depend on the order of the examples alone.

    Args:
      labels: of all examples.
      split: "train" or "test".
      every: inverse of the share that is held out.
      where: names the data set in the error.

    Raises:
      ValueError: an unknown split, or no class has two examples.

    Example:
      >>> held_out(np.array([0, 0, 0, 0, 1, 1]), "test", every=2, where="toy")
      array([1, 3, 5])
    """
    check_split(split)
    test = np.zeros(len(labels), bool)
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = len(members)
        k = max(1, round(count / every)) if count > 1 else 0
        test[members[((np.arange(k) + 0.5) * count / max(k, 1)).astype(int)]] = True
    if not test.any():
        raise ValueError(f"{where}: {len(labels)} images, one a class, are too few to hold out a test part")
    return np.flatnonzero(test if split == "test" else ~test)


def digits(split: str) -> ArraySource:
    """scikit-learn's handwritten digits: 8x8 grey images of 10 classes, one in six of them held out for "test".

    Raises:
      ValueError: an unknown split, or scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError("the digits need scikit-learn: pip install 'jaxgen[demo]'") from error
    data = datasets.load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    source = ArraySource(
        images=images,
        labels=data.target.astype(np.int32),
        num_classes=10,
        class_names=tuple(str(c) for c in range(10)),
        where="digits",
    )
    return source.subset(held_out(source.labels, split, every=6, where="digits"))


def npz(path: str, split: str) -> ArraySource | EncodedSource:
    """The images of an npz file, in one of three layouts:

    - `x_train`, `y_train` and perhaps `x_test`, `y_test`: pixels and labels;
    - `image` or `images` and perhaps `label` or `labels`, or else integers `group` (with `group_names`); without labels there is
      one class. Strings `caption`, `captions` or `name` [n], the first that is there, are captions;
    - `jpeg_train`, `offset_train`, `y_train` and perhaps the same for `test`: the bytes of all images joined, image i
      at [offset[i], offset[i + 1]).

    Pixels are uint8 [n, H, W] or [n, H, W, C] with 1 or 3 channels. Labels are integers [n]. `class_names` may be there
    too. Where there is no test part, a tenth of each class is held out (see `held_out`).

    Args:
      path: the file.
      split: "train" or "test".

    Raises:
      ValueError: a file that cannot be read, has none of these layouts, or an array of another type or shape.
    """
    check_split(split)
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: one array, not an npz file")
    with file:
        return _npz(_Arrays(os.fspath(path), file), split)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """The arrays of an npz file, checked as they are read."""

    path: str
    file: np.lib.npyio.NpzFile

    def __contains__(self, key: str) -> bool:
        return key in self.file.files

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self:
            raise ValueError(f"{self.path}: no array {key!r}; it has {', '.join(sorted(self.file.files)) or 'none'}")
        try:
            return self.file[key]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{self.path}: cannot read array {key!r} ({error})") from error

    def _checked(self, key: str, expected: str, ok: Callable[[np.ndarray], bool]) -> np.ndarray:
        x = self[key]
        if not ok(x):
            raise ValueError(f"{self.path}: {key} is {x.dtype} {x.shape}; expected {expected}")
        return x

    def images(self, key: str) -> UInt8[np.ndarray, "n H W C"]:
        def ok(x):
            return x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[-1] in (1, 3)))

        x = self._checked(key, "uint8 (n, H, W) or (n, H, W, C) with C 1 or 3", ok)
        return x[..., None] if x.ndim == 3 else x

    def bytes(self, key: str) -> UInt8[np.ndarray, "bytes"]:
        return self._checked(key, "uint8 (bytes,)", lambda x: x.dtype == np.uint8 and x.ndim == 1)

    def integers(self, key: str) -> Int[np.ndarray, "n"]:
        def ok(x):
            return x.dtype.kind in "iu" and (x.ndim == 1 or (x.ndim == 2 and x.shape[1] == 1))

        return self._checked(key, "integers (n,)", ok).reshape(-1).astype(np.int64)

    def class_names(self, key: str = "class_names") -> tuple[str, ...] | None:
        if key not in self:
            return None
        names = self._checked(key, "strings (num_classes,)", lambda x: x.dtype.kind in "US" and x.ndim == 1)
        return tuple(names.astype(str).tolist())

    def beside(self, keys: Sequence[str], kinds: str, n: int) -> str | None:
        """The first of some arrays that has n entries of these kinds; what others of these names hold is not asked for."""
        for key in keys:
            try:
                if key in self and (x := self[key]).dtype.kind in kinds and x.shape == (n,):
                    return key
            except ValueError:  # an array of objects
                continue
        return None


def _npz(arrays: _Arrays, split: str) -> ArraySource | EncodedSource:
    kind = next((kind for kind in ("jpeg", "x") if f"{kind}_train" in arrays), None)
    if kind is None:
        source = _single(arrays)
        return source.subset(held_out(source.labels, split, every=10, where=arrays.path))

    parts = ("train", "test") if f"{kind}_test" in arrays else ("train",)
    part = split if split in parts else "train"
    labels = {p: arrays.integers(f"y_{p}") for p in parts}
    names = arrays.class_names()
    common = dict(
        labels=labels[part],
        num_classes=len(names) if names else _count(*labels.values()),
        class_names=names,
        where=f"{arrays.path}: {kind}_{part}",
    )
    if kind == "x":
        source = ArraySource(images=arrays.images(f"x_{part}"), **common)
    else:
        offset = arrays.integers(f"offset_{part}")
        index = np.arange(max(len(offset) - 1, 0))
        source = EncodedSource(data=arrays.bytes(f"jpeg_{part}"), offset=offset, index=index, **common)
    if len(parts) == 2:
        return source
    return source.subset(held_out(source.labels, split, every=10, where=arrays.path))


def _single(arrays: _Arrays) -> ArraySource:
    """The layout without parts."""
    key = next((key for key in ("image", "images") if key in arrays), None)
    if key is None:
        keys = ", ".join(sorted(arrays.file.files)) or "none"
        raise ValueError(f"{arrays.path}: has arrays {keys}; expected x_train, image, images or jpeg_train")
    images = arrays.images(key)
    label = next((key for key in ("label", "labels") if key in arrays), None)
    group = None if label else arrays.beside(("group",), "iu", len(images))
    labels = arrays.integers(label or group) if label or group else np.zeros(len(images), np.int64)
    names = arrays.class_names("group_names" if group else "class_names") if label or group else None
    caption = arrays.beside(("caption", "captions", "name"), "US", len(images))
    return ArraySource(
        images=images,
        labels=labels,
        num_classes=len(names) if names else _count(labels),
        class_names=names,
        captions=arrays[caption].astype(str) if caption else None,
        where=f"{arrays.path}: {key}",
    )


def _count(*labels: Int[np.ndarray, "n"]) -> int:
    """The number of classes, where nothing names them."""
    return 1 + max(int(y.max(initial=0)) for y in labels)
