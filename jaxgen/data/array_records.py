"""ArrayRecord files of `tf.train.Example` records, as TensorFlow Datasets writes them: features `image` and `label`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from jaxgen.data.shard_rows import NO_LABEL, Row

__all__ = ["ArrayRecordShards", "read_example", "write_example"]

IMAGES, LABELS, CAPTIONS = ("image", "image/encoded"), ("label", "image/class/label"), ("caption", "text")
TOGETHER = 64  # records that are read at a time while labels are looked for


@dataclasses.dataclass(frozen=True)
class ArrayRecordShards:
    """Reads images and labels through grain's `array_record`. An example's place is its record's number.

    Labels lie beside the images, so that the first look at a shard reads all of it.
    """

    suffixes: tuple[str, ...] = (".array_record", ".arrayrecord")

    def index(self, path: str) -> Iterator[Row]:
        """The examples of a shard.

        Raises:
          ValueError: the shard is damaged, or a record is no example with an image.
        """
        count = _guard(path, lambda: _reader(path).num_records())
        for start in range(0, count, TOGETHER):
            places = list(range(start, min(start + TOGETHER, count)))
            for place, record in zip(places, _guard(path, lambda p=places: _reader(path).read(p))):
                features = _example(path, place, record)
                values = next((features[name] for name in LABELS if name in features), [NO_LABEL])
                yield Row(place=place, size=len(record), label=int(values[0]))

    def read(self, path: str, row: Row) -> bytes:
        """The image file of an example.

        Raises:
          ValueError: the shard is damaged.
        """
        features = _read(path, row)
        return next(features[name] for name in IMAGES if name in features)[0]

    def caption(self, path: str, row: Row) -> str | None:
        """The feature `caption` or `text`, if there is one.

        Raises:
          ValueError: the shard is damaged, or the text is no UTF-8.
        """
        features = _read(path, row)
        values = next((features[name] for name in CAPTIONS if features.get(name)), None)
        if values is None:
            return None
        if not isinstance(values[0], bytes):
            raise ValueError(f"{path}: record {row.place} has the caption {values[0]}, which is no text")
        return _guard(path, values[0].decode)

    def class_names(self, path: str) -> tuple[str, ...] | None:
        """None: records do not name classes."""
        return None


def _read(path: str, row: Row) -> dict[str, list]:
    (record,) = _guard(path, lambda: _reader(path).read([row.place]))
    return _example(path, row.place, record)


def _guard(path: str, call):
    """What `call` returns; errors of `array_record`, which are RuntimeErrors and worse, name the shard."""
    try:
        return call()
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a readable ArrayRecord file ({error})") from error


@functools.lru_cache(maxsize=64)
def _reader(path: str):
    """An open shard. Threads may share it."""
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise ValueError("ArrayRecord files need the package array_record") from error
    reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        reader.read()  # raises what is wrong
        raise RuntimeError("damaged")
    return reader


def _example(path: str, place: int, record: bytes) -> dict[str, list]:
    try:
        features = read_example(record)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: record {place} is no tf.train.Example ({error})") from error
    image = next((features[name] for name in IMAGES if name in features), None)
    if not image or not isinstance(image[0], bytes):
        raise ValueError(f"{path}: record {place} has features {', '.join(features) or 'none'}; expected image")
    return features


def read_example(record: bytes) -> dict[str, list[bytes] | list[int]]:
    """The features of a serialised `tf.train.Example` that are bytes or integers; floats are left out.

    Raises:
      ValueError: not the wire format of protocol buffers.

    Example:
      >>> read_example(write_example({"label": 7}))
      {'label': [7]}
    """
    out = {}
    # Example{1: Features{1: entry{1: key, 2: Feature{1: BytesList{1: bytes} | 3: Int64List{1: varints}}}}}
    for features in _fields(record, 1):
        for entry in _fields(features, 1):
            name = b"".join(_fields(entry, 1)).decode()
            for feature in _fields(entry, 2):
                for values in _fields(feature, 1):
                    out[name] = list(_fields(values, 1))
                for values in _fields(feature, 3):
                    out[name] = [_signed(x) for part in _fields(values, 1) for x in _integers(part)]
    return out


def write_example(features: dict[str, bytes | int]) -> bytes:
    """A serialised `tf.train.Example` of single values."""

    def field(number: int, data: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(data)) + data

    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        else:
            feature = field(3, field(1, _varint(value % 2**64)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def _fields(data: bytes, number: int) -> Iterator[bytes | int]:
    """The values of one field of a message, in order."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _read_varint(data, at)
        elif kind in (1, 2, 5):
            size, at = (8 if kind == 1 else 4, at) if kind != 2 else _read_varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(data):
            raise ValueError("a field is longer than its message")
        if tag >> 3 == number:
            yield value


def _integers(part: bytes | int) -> Iterator[int]:
    """Packed integers, or the one that was not packed."""
    if isinstance(part, int):
        yield part
        return
    at = 0
    while at < len(part):
        value, at = _read_varint(part, at)
        yield value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
