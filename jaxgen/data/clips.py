"""Short clips of equal size: windows of longer ones in an npz file, or handwritten digits that move."""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt8

from jaxgen.data.folder import stamp
from jaxgen.data.loader import stream
from jaxgen.data.sources import ArraySource, check_split, digits

__all__ = ["ClipConfig", "ClipPictures", "ClipSource", "Films", "MovingDigits", "clips", "moving_digits", "stacked"]

HELD_OUT = 6  # one part in so many is the test split
STILL = "digits"


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Which clips, and how they become examples.

    Attributes:
      path: "digits" for scikit-learn's handwritten digits that move, or an `.npz` file (see `clips`).
      motions: clips of each of the training digits that move, which are made when they are asked for.
      labelled: false makes one class of all clips.
      frames: of a clip.
      every: one in so many frames of the file is taken.
      height, width: of a frame, which is resized without regard to its shape; 0 is as they are (16 x 32 for the digits).
      seed: of the order.
      workers: processes that make batches; 0 makes them in this process.

    Raises:
      ValueError: a field out of range.
    """

    path: str = STILL
    motions: int = 1
    labelled: bool = True
    frames: int = 4
    every: int = 1
    height: int = 0
    width: int = 0
    seed: int = 0
    workers: int = 0

    # Facts of the class, not fields, which `DataConfig` has, too: colours, and that there are no token caches of clips.
    channels = 3
    tokens = ""

    def __post_init__(self):
        fields = dict(motions=1, frames=1, every=1, height=0, width=0, seed=0, workers=0)
        for name, least in fields.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: expected at least {least}")

    def source(self, split: str) -> ClipSource:
        """The clips of a split.

        Raises:
          ValueError: one of height and width, or see `clips` and `moving_digits`.
        """
        if (self.height == 0) != (self.width == 0):
            raise ValueError(f"data.height={self.height}, data.width={self.width}: expected both or none")
        fields = dict(frames=self.frames, every=self.every)
        if self.path == STILL:
            fields |= dict(height=self.height or 16, width=self.width or 32)
            found = moving_digits(split, motions=self.motions if split == "train" else 1, **fields)
        elif not os.path.exists(self.path):
            raise ValueError(f"data.path={self.path!r}: no such file")
        else:
            found = _clips(self.path, split, stamp=stamp(self.path), height=self.height, width=self.width, **fields)
        return found if self.labelled else _OneClass(found)

    def batches(self, split: str, *, batch_size: int, train: bool, shard_index: int = 0, shard_count: int = 1):
        """Batches {"image": uint8 [b, f, H, W, 3], "label": int32 [b]} of a split; arguments as in `jaxgen.data.batches`.

        Raises:
          ValueError: see `source` and `jaxgen.data.batches`.
        """
        part = dict(batch_size=batch_size, train=train, shard_index=shard_index, shard_count=shard_count)
        return self.stream(self.source(split), _as_image, **part)

    def stream(self, source, transform, **part):
        """`jaxgen.data.loader.stream` in this configuration's order; a transform that draws nothing."""
        return stream(source, transform, random=False, seed=self.seed, workers=self.workers, **part)

    def or_drawn(self) -> ClipConfig:
        """This, or clips of the same shape that are drawn where there is no file: for what needs shapes alone."""
        if self.path == STILL or os.path.exists(self.path):
            return self
        return dataclasses.replace(self, path=STILL)


@dataclasses.dataclass(frozen=True)
class ClipPictures:
    """Clips where a stage of images reads its data (`jaxgen.data.image_batches`).

    Attributes:
      clips: which.
      apart: every frame is an image [H, W, 3]; otherwise a clip is one, [H, W, 3f] (see `stacked`).
    """

    clips: ClipConfig
    apart: bool

    tokens = ClipConfig.tokens

    @property
    def channels(self) -> int:
        """Of an image."""
        return self.clips.channels * (1 if self.apart else self.clips.frames)

    def batches(self, split: str, *, batch_size: int, train: bool, shard_index: int = 0, shard_count: int = 1):
        """See `ClipConfig.batches`; "image" is uint8 [b, H, W, channels]."""
        part = dict(batch_size=batch_size, train=train, shard_index=shard_index, shard_count=shard_count)
        source = self.clips.source(split)
        if self.apart:
            return self.clips.stream(_Frames(source), _as_image, **part)
        return self.clips.stream(source, _as_one_image, **part)


def stacked(clips):
    """[..., f, H, W, C] as [..., H, W, f C]: the frames of a clip behind one another, as channels of one image."""
    *some, frames, height, width, channels = clips.shape
    axes = (*range(len(some)), *(len(some) + i for i in (1, 2, 0, 3)))
    return clips.transpose(axes).reshape(*some, height, width, frames * channels)


@dataclasses.dataclass(frozen=True, eq=False)
class _Frames:
    """The frames of a source's clips."""

    clips: ClipSource

    def __len__(self) -> int:
        return len(self.clips) * self.clips.shape[0]

    def __getitem__(self, index: int) -> dict:
        number, frame = divmod(index, self.clips.shape[0])
        example = self.clips[number]
        return example | {"clip": example["clip"][frame]}


def _as_image(example: dict) -> dict:
    return {"image": example["clip"], "label": example["label"]}


def _as_one_image(example: dict) -> dict:
    return {"image": stacked(example["clip"]), "label": example["label"]}


class ClipSource(Protocol):
    """A source of `jaxgen.data.stream`: `source[i] -> {"clip": uint8 [f, H, W, 3], "label": int}`.

    Attributes:
      class_names: one for each class.
      shape: (f, H, W, 3) of a clip.
    """

    class_names: tuple[str, ...]
    shape: tuple[int, int, int, int]

    @property
    def num_classes(self) -> int:
        """Labels are in [0, num_classes)."""
        return len(self.class_names)

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def name(self, index: int) -> str:
        """What error messages call this example."""


@dataclasses.dataclass(frozen=True, eq=False)
class _OneClass(ClipSource):
    """The clips of another source, without its classes."""

    clips: ClipSource

    class_names = ("clip",)  # a fact of the class, not a field

    @property
    def shape(self):
        return self.clips.shape

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        return self.clips[index] | {"label": 0}

    def name(self, index):
        return self.clips.name(index)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Films(ClipSource):
    """Windows of long clips, each of which is a class.

    Attributes:
      films: of frames of one size.
      windows: (film, first frame) of each example.
      frames, every: as in `ClipConfig`.
      class_names: see `ClipSource`.
      where: names the films in error messages.
    """

    films: tuple[UInt8[np.ndarray, "_ H W 3"], ...]
    windows: Int[np.ndarray, "n 2"]
    frames: int
    every: int
    class_names: tuple[str, ...]
    where: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """See `ClipSource`."""
        return self.frames, *self.films[0].shape[1:]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict:
        film, first = self.windows[index]
        clip = self.films[film][first : first + self.frames * self.every : self.every]
        return {"clip": clip, "label": int(film)}

    def name(self, index: int) -> str:
        """See `ClipSource`."""
        film, first = self.windows[index]
        return f"{self.where}[{film}][{first}]"


def clips(path: str, split: str, *, frames: int, every: int = 1, height: int = 0, width: int = 0) -> Films:
    """All windows of the films in an npz file, each of which is a class.

    A film is an array uint8 [n, H, W, 3]. Where there are integers `<its name>_shot_start`, they are the frames at which a shot
    begins, and no window has frames of two. The last sixth of each film is the test split, which no window of the other reaches
    into.

    Args:
      path: the file.
      split: "train" or "test".
      frames, every, height, width: see `ClipConfig`.

    Raises:
      ValueError: an unknown split, a file that cannot be read, one without films or with films of several sizes, which then need
        `height` and `width`; or no window is so short.
    """
    check_split(split)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from error
    films = {name: x for name, x in sorted(arrays.items()) if x.dtype == np.uint8 and x.ndim == 4 and x.shape[-1] == 3}
    if not films:
        found = ", ".join(f"{name} {x.dtype} {x.shape}" for name, x in sorted(arrays.items())) or "nothing"
        raise ValueError(f"{path}: has {found}; expected films, uint8 (n, H, W, 3)")
    sizes = {x.shape[1:3] for x in films.values()}
    if not height and len(sizes) > 1:
        raise ValueError(f"{path}: films of sizes {sorted(sizes)}; set data.height and data.width")
    length, windows = (frames - 1) * every + 1, []
    for i, (name, film) in enumerate(films.items()):
        cut = len(film) - len(film) // HELD_OUT
        cuts = {0, cut, len(film), *arrays.get(f"{name}_shot_start", np.zeros(0, int)).tolist()}
        shots = [(a, b) for a, b in zip(sorted(cuts), sorted(cuts)[1:]) if (a >= cut) == (split == "test")]
        windows += [(i, first) for a, b in shots for first in range(a, b - length + 1)]
    if not windows:
        raise ValueError(f"{path}: no shot of the {split} split has {length} frames (data.frames={frames}, data.every={every})")
    resized = tuple(_resized(film, height, width) for film in films.values())
    fields = dict(frames=frames, every=every, class_names=tuple(films), where=os.fspath(path))
    return Films(films=resized, windows=np.array(windows), **fields)


# Films are read and resized once for a run's splits, stages and checks.
@functools.lru_cache(maxsize=2)
def _clips(path: str, split: str, *, stamp: tuple[int, int], **fields) -> Films:
    return clips(path, split, **fields)


def _resized(film: UInt8[np.ndarray, "n h w 3"], height: int, width: int) -> UInt8[np.ndarray, "n H W 3"]:
    from PIL import Image

    if not height or film.shape[1:3] == (height, width):
        return film
    resize = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frame).resize((width, height), resize)) for frame in film])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class MovingDigits(ClipSource):
    """Digits that move over a dark ground and turn back at its edges, see `moving_digits`.

    Attributes:
      still: the digits.
      motions: clips of each: the i-th is of digit i modulo their number.
      shape: see `ClipSource`.
      every: as in `ClipConfig`.
    """

    still: ArraySource
    motions: int
    shape: tuple[int, int, int, int]
    every: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """See `ClipSource`."""
        return self.still.class_names

    def __len__(self) -> int:
        return len(self.still) * self.motions

    def __getitem__(self, index: int) -> dict:
        image, label = (values[index % len(self.still)] for values in (self.still.images, self.still.labels))
        rng, room = np.random.default_rng([len(self.still), index]), np.array(self.shape[1:3]) - 8
        place, speed = rng.integers(0, room + 1), rng.integers(-3, 4, 2)
        speed[1] += not speed.any()
        pixels = np.maximum(16, image * (rng.integers(96, 256, 3) / 255)).astype(np.uint8)
        clip = np.full(self.shape, 16, np.uint8)
        for i, frame in enumerate(clip):
            top, left = _reflected(place + i * self.every * speed, room)
            frame[top : top + 8, left : left + 8] = pixels
        return {"clip": clip, "label": int(label)}

    def name(self, index: int) -> str:
        """See `ClipSource`."""
        return f"{STILL}[{index % len(self.still)}], motion {index // len(self.still)}"


def moving_digits(
    split: str, *, frames: int, every: int = 1, height: int = 16, width: int = 32, motions: int = 1
) -> MovingDigits:
    """scikit-learn's handwritten digits, 8 x 8 pixels, that move.

    Place and velocity (-3 to 3 pixels a frame, never 0 in both directions) are drawn for each clip once and for all, and so is a
    colour.

    Raises:
      ValueError: an unknown split, frames smaller than a digit, or scikit-learn is not installed.
    """
    if min(height, width) < 8:
        raise ValueError(f"data.height={height}, data.width={width}: a digit has 8 x 8 pixels")
    return MovingDigits(still=digits(split), motions=motions, shape=(frames, height, width, 3), every=every)


def _reflected(place: Int[np.ndarray, "2"], room: Int[np.ndarray, "2"]) -> Int[np.ndarray, "2"]:
    """Within 0 and `room`, as if there were mirrors at both."""
    around = place % np.maximum(2 * room, 1)
    return np.minimum(around, 2 * room - around)
