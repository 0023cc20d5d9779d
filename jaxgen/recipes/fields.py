"""Checks of a configuration's numbers, made when it is built: before anything is trained or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["DTYPES", "check_dtype", "check_fields"]

DTYPES = ("float32", "bfloat16", "float16")


def check_fields(group: str, config: Any, *, shares: Sequence[str] = (), **least: float) -> None:
    """That numbers are in their range.

    Args:
      group: how `--set` calls the configuration, such as `model`.
      config: a dataclass; a field that is a tuple is one of numbers, and not empty.
      shares: fields in [0, 1].
      **least: field=smallest value.

    Raises:
      ValueError: naming the field and its value.

    Example:
      >>> check_fields("model", config, depth=1, width=0, shares=("drop_path_rate",))
    """
    for name, low in least.items():
        value = getattr(config, name)
        items = value if isinstance(value, tuple) else (value,)
        if not items or not all(item >= low for item in items):
            raise ValueError(f"{group}.{name}={value}: expected at least {low}")
    for name in shares:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{group}.{name}={getattr(config, name)}: expected a share in [0, 1]")


def check_dtype(group: str, dtype: str) -> None:
    """That a type of computation is one of `DTYPES`.

    Raises:
      ValueError: another one.
    """
    if dtype not in DTYPES:
        raise ValueError(f"{group}.dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
