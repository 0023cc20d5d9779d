"""Everything FID, sFID, IS, precision and recall need of a set of images, collected in batches by one host or several.

Moments are kept in float64; of the features only those that precision and recall compare are kept, in float32. What was
collected can be written to a folder and read back, so that hours of sampling survive an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from jaxgen import storage
from jaxgen.metrics.frechet import FeatureStats, frechet_distance, precision_recall
from jaxgen.metrics.score import ScoreStats, softmax

__all__ = ["ImageStats", "Reference", "image_scores", "npz_count", "npz_images", "read_reference"]

STATE = "stats.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageStats:
    """Statistics of images that have numbers: no image is ever counted twice.

    Attributes:
      pool: of the pooled features.
      spatial: of the spatial features (sFID).
      score: of the class probabilities.
      keep: features of the images 0 to keep - 1 are kept for precision and recall.
      index: numbers of the images that were seen, as one array a batch.
      features: the kept ones, as pairs of numbers [k] and features [k, d].

    Example:
      >>> stats = ImageStats.empty(2048, 2023, 1008, keep=10_000)
      >>> for number, batch in enumerate(batches):
      ...     stats = stats.update(observe(batch), np.arange(100) + 100 * number)
      >>> image_scores(stats, read_reference("VIRTUAL_imagenet256_labeled.npz"))["fid"]
    """

    pool: FeatureStats
    spatial: FeatureStats
    score: ScoreStats
    keep: int = 0
    index: tuple[Int[np.ndarray, "n"], ...] = ()
    features: tuple[tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k d"]], ...] = ()

    @classmethod
    def empty(cls, pool: int, spatial: int, classes: int, *, keep: int = 0, split: int = 5000) -> ImageStats:
        """Of no images.

        Args:
          pool, spatial, classes: widths of the features and of the logits.
          keep: see the class.
          split: samples in a split of the inception score.
        """
        if keep < 0:
            raise ValueError(f"keep={keep}: must be >= 0")
        score = ScoreStats.empty(classes, split)
        return cls(pool=FeatureStats.empty(pool), spatial=FeatureStats.empty(spatial), score=score, keep=keep)

    def __len__(self) -> int:
        return self.pool.count

    def update(self, observed: Mapping[str, np.ndarray], index: Int[np.ndarray, "n"]) -> ImageStats:
        """With some more images.

        Args:
          observed: their "pool" [n, d], "spatial" [n, e] and "logits" [n, v].
          index: their numbers.

        Raises:
          ValueError: a number that was seen before, shapes that do not fit, or values that are not finite.
        """
        index, pool = np.asarray(index), np.asarray(observed["pool"], np.float32)
        kept = index < self.keep
        return self.merge(
            ImageStats(
                pool=FeatureStats.of(pool),
                spatial=FeatureStats.of(observed["spatial"]),
                score=ScoreStats.empty(self.score.total.shape[1], self.score.split).update(softmax(observed["logits"]), index),
                keep=self.keep,
                index=(index,),
                features=((index[kept], pool[kept]),) if kept.any() else (),
            )
        )

    def merge(self, other: ImageStats) -> ImageStats:
        """Of both sets of images together.

        Raises:
          ValueError: an image in both, or statistics of different kinds.
        """
        if self.keep != other.keep:
            raise ValueError(f"statistics that keep {self.keep} and {other.keep} features cannot be joined")
        index = np.concatenate([np.zeros(0, int), *self.index, *other.index])
        numbers, times = np.unique(index, return_counts=True)
        if (times > 1).any():
            twice = numbers[times > 1]
            raise ValueError(f"{len(twice)} images are counted twice, such as number {twice[0]}")
        return dataclasses.replace(
            self,
            pool=self.pool.merge(other.pool),
            spatial=self.spatial.merge(other.spatial),
            score=self.score.merge(other.score),
            index=(index,),
            features=self.features + other.features,
        )

    def seen(self, count: int) -> np.ndarray:
        """[count] bools: which of the images 0 to count - 1 were seen."""
        out = np.zeros(count, bool)
        for index in self.index:
            out[index[index < count]] = True
        return out

    def kept(self) -> Float[np.ndarray, "k d"]:
        """The kept features in the order of their images' numbers."""
        if not self.features:
            return np.zeros((0, self.pool.mean.size), np.float32)
        order = np.argsort(np.concatenate([index for index, _ in self.features]))
        return np.concatenate([features for _, features in self.features])[order]

    def reference(self) -> Reference:
        """What other images can be compared with."""
        return Reference(pool=self.pool, spatial=self.spatial, features=self.kept() if self.features else None)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes everything to a folder, features that are there already aside. An interrupted call leaves the last state.

        Raises:
          OSError: the folder cannot be written, or the disk is full.
        """
        folder = storage.place(folder)
        if not (folder / STATE).exists():
            _remove_features(folder, since=0)
        for number, (index, features) in enumerate(self.features):
            path = folder / f"features_{number:06d}.npz"
            if not path.exists():
                _write(path, index=index, features=features)
        moments = {f"{name}_{part}": getattr(getattr(self, name), part) for name, part in _MOMENTS}
        counts = {"count": len(self), "split": self.score.split}
        score = {f"score_{name}": getattr(self.score, name) for name in ("count", "total", "negentropy")}
        index = np.concatenate([np.zeros(0, int), *self.index])
        _write(folder / STATE, index=index, keep=self.keep, features=len(self.features), **counts, **moments, **score)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ImageStats:
        """What `save` wrote. Features that are newer than the last complete state are removed, since they will come again.

        Raises:
          ValueError: no state there, or a damaged file; it is named.
        """
        folder = storage.place(folder)
        x = _read(folder / STATE)
        try:
            pool, spatial = (
                FeatureStats(count=int(x["count"]), mean=x[f"{name}_mean"], scatter=x[f"{name}_scatter"])
                for name in ("pool", "spatial")
            )
            counts = {name: x[f"score_{name}"] for name in ("count", "total", "negentropy")}
            score, files = ScoreStats(split=int(x["split"]), **counts), int(x["features"])
            features = []
            for number in range(files):
                part = _read(folder / f"features_{number:06d}.npz")
                features.append((part["index"], part["features"]))
            out = cls(pool=pool, spatial=spatial, score=score, keep=int(x["keep"]), index=(x["index"],), features=tuple(features))
        except KeyError as error:
            raise ValueError(f"{folder}: not statistics of images ({error.args[0]})") from error
        _remove_features(folder, since=files)
        return out


def _remove_features(folder: storage.Place, since: int) -> None:
    """What an interrupted `save` wrote ahead of its state."""
    for path in folder.glob("features_*.npz"):
        if int(path.stem.rpartition("_")[2]) >= since:
            path.unlink()


_MOMENTS = [(name, part) for name in ("pool", "spatial") for part in ("mean", "scatter")]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reference:
    """What generated images are compared with.

    Attributes:
      pool: for FID.
      spatial: for sFID; None where it is not known.
      features: for precision and recall; None where they are not known.
    """

    pool: FeatureStats
    spatial: FeatureStats | None = None
    features: Float[np.ndarray, "k d"] | None = None

    def save(self, path: str | os.PathLike) -> None:
        """An npz file in guided-diffusion's layout, which `read_reference` and other evaluators read."""
        arrays = {"mu": self.pool.mean, "sigma": self.pool.cov, "count": self.pool.count}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.cov}
        if self.features is not None:
            arrays["features"] = self.features
        _write(storage.place(path), **arrays)


def read_reference(path: str | os.PathLike) -> Reference:
    """Statistics from an npz file: `mu` and `sigma` (pytorch-fid), and perhaps `mu_s` and `sigma_s` (guided-diffusion) and
    `features` (`Reference.save`). Images that lie in the same file (`arr_0`) are not read; see `npz_images`.

    Raises:
      ValueError: the file cannot be read, has no such arrays, or they do not fit each other.
    """
    path = storage.place(path)
    x = _read(path, lazy=("mu", "sigma", "mu_s", "sigma_s", "count", "features"))
    if "mu" not in x or "sigma" not in x:
        raise ValueError(f"{path}: no statistics (arrays mu and sigma)")
    try:
        pool = FeatureStats.from_moments(x["mu"], x["sigma"], int(x.get("count", 2)))
        both = "mu_s" in x and "sigma_s" in x
        spatial = FeatureStats.from_moments(x["mu_s"], x["sigma_s"], pool.count) if both else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Reference(pool=pool, spatial=spatial, features=x.get("features"))


def npz_count(path: str | os.PathLike, name: str = "arr_0") -> int:
    """How many images an npz file has under `name`; 0 if it has no such array. Only its header is read.

    Raises:
      ValueError: see `npz_images`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                return 0
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)}: not a readable npz file ({error})") from error
    with _open_images(path, name) as (shape, _):
        return shape[0]


def npz_images(path: str | os.PathLike, batch_size: int, name: str = "arr_0") -> Iterator[UInt8[np.ndarray, "b H W c"]]:
    """The images of an npz file in batches, read as they are needed: published sets of 50,000 are 10 GB.

    Raises:
      ValueError: the file cannot be read, is cut short, or has no array `name` of uint8 [n, H, W, C].
    """
    with _open_images(path, name) as (shape, file):
        for start in range(0, shape[0], batch_size):
            part = (min(batch_size, shape[0] - start), *shape[1:])
            yield np.frombuffer(file.read(int(np.prod(part))), np.uint8).reshape(part)


@contextlib.contextmanager
def _open_images(path: str | os.PathLike, name: str) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """The shape of an array of images in an npz file, and the file at the place where its pixels begin."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            shape, by_column, dtype = readers[np.lib.format.read_magic(file)](file)
            if dtype != np.uint8 or len(shape) != 4 or by_column:
                raise ValueError(f"{name} is {dtype} {shape}; expected uint8 (n, H, W, C)")
            yield shape, file
    except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)}: cannot read images ({error})") from error


def image_scores(generated: ImageStats, reference: Reference, *, k: int = 3) -> dict[str, Any]:
    """ "images", "inception_score" and its deviation over splits, "fid", and as far as the reference allows "sfid", "precision"
    and "recall".

    Args:
      generated: statistics of the samples.
      reference: of the real images.
      k: the neighbour that sets the radii of the manifolds of precision and recall.

    Raises:
      ValueError: statistics of other features, or too few images.
    """
    score, deviation = generated.score.score()
    out = {
        "images": len(generated),
        "inception_score": score,
        "inception_score_std": deviation,
        "fid": frechet_distance(generated.pool, reference.pool),
    }
    if reference.spatial is not None:
        out["sfid"] = frechet_distance(generated.spatial, reference.spatial)
    if reference.features is not None and generated.features:
        out["precision"], out["recall"] = precision_recall(reference.features, generated.kept(), k=k)
    return out


def _write(path: storage.Place, **arrays) -> None:
    """An npz file that is never half there."""
    with storage.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _read(path: storage.Place, lazy: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file, or those of `lazy` that it has."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in (file.files if lazy is None else lazy) if name in file.files}
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable npz file ({error})") from error
