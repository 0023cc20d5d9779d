"""Tar files in WebDataset's layout: the files of one example follow each other and share their name up to the first dot."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator

import numpy as np

from jaxgen.data.folder import EXTENSIONS
from jaxgen.data.shard_rows import NO_LABEL, Row
from jaxgen.data.sources import Source

__all__ = ["TarShards", "write_tar"]

LABELS = (".cls", ".json")
CAPTIONS = ("caption", "text")  # of a JSON object


@dataclasses.dataclass(frozen=True)
class TarShards:
    """Reads `<key>.<image>` with its class in `<key>.cls` (a number) or `<key>.json` (its "label"), and its caption in
    `<key>.txt` or in the same JSON (its "caption" or "text"); other files are passed over.

    An example's place is where its image's bytes begin, so that reading one is a seek and a read.
    """

    suffixes: tuple[str, ...] = (".tar",)

    def index(self, path: str) -> Iterator[Row]:
        """The examples of a shard: headers are read, images are skipped.

        Raises:
          ValueError: the shard is damaged or cut short, or an example has two images or a label that is no number.
        """
        key, row = None, None
        for name, place, size, read in _members(path):
            head, tail = os.path.split(name)
            stem, dot, extension = tail.partition(".")
            if os.path.join(head, stem) != key:
                if row is not None and row.size >= 0:
                    yield row
                key, row = os.path.join(head, stem), Row(place=-1, size=-1, label=NO_LABEL)
            # "0001.seg.png" is no picture of "0001".
            extension = (dot + extension).lower()
            if extension in EXTENSIONS:
                if row.size >= 0:
                    raise ValueError(f"{path}: {key} has two images")
                row = row._replace(place=place, size=size)
            elif extension in LABELS:
                row = row._replace(label=_label(path, name, read()))
                if extension == ".json" and not row.text_size:
                    row = row._replace(text=place, text_size=-size)
            elif extension == ".txt":
                row = row._replace(text=place, text_size=size)
        if row is not None and row.size >= 0:
            yield row

    def read(self, path: str, row: Row) -> bytes:
        """The image file of an example.

        Raises:
          ValueError: the shard cannot be read any more, or has become shorter.
        """
        return _bytes(path, row.place, row.size)

    def caption(self, path: str, row: Row) -> str | None:
        """The text of an example, without the spaces around it.

        Raises:
          ValueError: as `read`, or a text that is no UTF-8.
        """
        data = _bytes(path, row.text, abs(row.text_size))
        try:
            if row.text_size >= 0:
                return data.decode().strip() or None
            found = json.loads(data)
        except ValueError as error:
            raise ValueError(f"{path}: the text at byte {row.text} cannot be read ({error})") from error
        return next((str(found[name]) for name in CAPTIONS if name in found), None)

    def class_names(self, path: str) -> tuple[str, ...] | None:
        """None: tar shards do not name classes."""
        return None


def write_tar(source: Source, folder: str | os.PathLike, *, per_shard: int = 10_000, prefix: str = "train") -> list[str]:
    """Writes a source as tar shards, `<prefix>-000000.tar` and so on, which are read at random faster than parquet.

    Captions come along. Compressed images are copied as they are, others become PNG. A shard is whole once it has its name.

    Args:
      source: images; their names, where they have any, are not kept.
      folder: made if missing.
      per_shard: examples in a shard.
      prefix: of the shards' names; "train" and "val" tell the parts of the data.

    Returns:
      The shards' paths.

    Raises:
      ValueError: shards of less than one example.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard={per_shard}: must be >= 1")
    os.makedirs(folder, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, len(source), per_shard)):
        path = os.path.join(folder, f"{prefix}-{number:06d}.tar")
        with tarfile.open(f"{path}.tmp", "w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(start, min(start + per_shard, len(source))):
                data = source.read(index) if hasattr(source, "read") else _png(source[index]["image"])
                members = {_extension(data): data, ".cls": str(source[index]["label"]).encode()}
                text = source.caption(index) if hasattr(source, "caption") else None
                members |= {} if text is None else {".txt": text.encode()}
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{index:09d}{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        os.replace(f"{path}.tmp", path)
        paths.append(path)
    return paths


def _bytes(path: str, place: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(place)
            data = file.read(size)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise ValueError(f"{path}: ends inside an example")
    return data


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _extension(data: bytes) -> str:
    """By the first bytes; Pillow reads a file by these, too, whatever its name."""
    known = {b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}
    return next((extension for magic, extension in known.items() if data.startswith(magic)), ".jpg")


def _members(path: str) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    """(name, place, size, content) of the files in an uncompressed archive."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, member.offset_data, member.size, lambda m=member: archive.extractfile(m).read()
                archive.members = []  # tarfile keeps every header it has seen
            # It also takes a damaged header for the end, which is a block of zeros.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"cut short or damaged at byte {archive.offset}")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path}: not a readable tar file ({error})") from error


def _label(path: str, name: str, data: bytes) -> int:
    try:
        label = int(data) if name.lower().endswith(".cls") else json.loads(data).get("label", NO_LABEL)
    except (ValueError, AttributeError):
        label = None
    if not isinstance(label, int) or label < NO_LABEL:
        raise ValueError(f"{path}: {name} holds {data[:40]!r}, which is no class number")
    return label
