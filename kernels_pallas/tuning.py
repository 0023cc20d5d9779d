"""Block sizes that were measured on a device, by op and problem; where none was, the static rule of the kernel stands."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import TypeVar

from kernels_pallas.device import Device

__all__ = ["Entry", "bucket", "read", "tuned", "write"]

TABLE = Path(__file__).with_name("tuning.json")
OVERRIDE = "KERNELS_PALLAS_TUNING"
Blocks = TypeVar("Blocks")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured choice.

    Attributes:
      op: "attention", "attention_backward", "linear", ... as the kernel's own `tuned` call names it.
      device: kind, as `Device.kind`.
      dtype: of the inputs.
      head_size: d; of int4, the number of columns' bucket.
      length: bucket of the longest sequence.
      density: bucket of the share of live elements.
      choice: fields of the kernel's block dataclass.
      seconds: median of the measurement.
      versions: of jax, and the date.
    """

    op: str
    device: str
    dtype: str
    head_size: int
    length: int
    density: float
    choice: dict
    seconds: float
    versions: str

    @property
    def key(self) -> tuple:
        """What a lookup compares."""
        return self.op, self.device, self.dtype, self.head_size, self.length, self.density


def bucket(length: int, density: float) -> tuple[int, float]:
    """(next power of two of the length, nearest power of two of the density).

    Example:
      >>> bucket(680, 0.62)
      (1024, 0.5)
    """
    if length < 1 or not 0 < density <= 1:
        raise ValueError(f"length={length} must be positive and density={density} in (0, 1]")
    return 1 << (length - 1).bit_length(), 2.0 ** round(math.log2(density))


def read(path: Path | str = TABLE) -> list[Entry]:
    """The entries of a table.

    Raises:
      ValueError: a file that is no such table.
    """
    try:
        rows = json.loads(Path(path).read_text())
        return [Entry(**row) for row in rows]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a table of kernel choices: {error}") from error


def write(entries: list[Entry], path: Path | str = TABLE) -> None:
    """Writes a table; of several entries with one key the last counts."""
    rows = {entry.key: dataclasses.asdict(entry) for entry in entries}
    ordered = [rows[key] for key in sorted(rows)]
    Path(path).write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in ordered) + "\n]\n")


@functools.lru_cache(maxsize=8)
def _table(path: str, modified: float) -> dict[tuple, dict]:
    # JSON has no tuples, and block dataclasses are hashable.
    return {entry.key: {name: tuple(x) if isinstance(x, list) else x for name, x in entry.choice.items()} for entry in read(path)}


def tuned(default: Blocks, op: str, device: Device, *, dtype: str, head_size: int, length: int, density: float = 1.0) -> Blocks:
    """`default` with what was measured for this problem's bucket, or as it is.

    Args:
      default: a dataclass of block sizes: the kernel's static rule.
      op: name in the table.
      device: that the kernel is built for.
      dtype: of the inputs.
      head_size: d.
      length: the longest sequence.
      density: share of live elements.

    Raises:
      ValueError: a table whose choice names fields that `default` lacks.
    """
    path = os.environ.get(OVERRIDE, str(TABLE))
    modified = os.path.getmtime(path) if os.path.exists(path) else None
    if modified is None:
        raise ValueError(f"no table of kernel choices at {path}")
    choice = _table(path, modified).get((op, device.kind, dtype, head_size, *bucket(length, max(density, 1e-6))))
    if choice is None:
        return default
    unknown = set(choice) - {field.name for field in dataclasses.fields(default)}
    if unknown:
        raise ValueError(f"{path}: the choice for {op} on {device.kind} names {sorted(unknown)}, not fields of {default}")
    return dataclasses.replace(default, **choice)
