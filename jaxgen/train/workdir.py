"""The configuration that a run's directory was made with, and the version of jaxgen that wrote it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import jax

import jaxgen
from jaxgen import config as config_lib
from jaxgen import storage
from jaxgen.train.log import write_json

__all__ = ["load_config", "save_config"]

_VERSION = "jaxgen"  # the entry of the file that is no field of the configuration


def save_config(workdir: str | os.PathLike, config: Any, may_differ: Iterable[str] = (), *, replace: bool = False) -> None:
    """Writes `<workdir>/config.json`, after checking that an earlier one there is the same.

    Args:
      workdir: the run's directory (see `jaxgen.storage.place`), made if missing.
      config: a frozen dataclass (see `jaxgen.config`).
      may_differ: names of fields, at any depth, whose values may change; the new ones are written.
      replace: everything may change, since nothing has been trained with the earlier configuration.

    Raises:
      ValueError: naming each other field that differs with both values; or the file cannot be read or written.
    """
    path = storage.place(workdir) / "config.json"
    new = json.loads(json.dumps(config_lib.to_json(config)))
    before, version = (None, None) if replace else _read(path)
    if before is not None:
        was, now = _flatten(before), _flatten(new)
        differ = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
        differ = [name for name in differ if name.rpartition(".")[2] not in may_differ]
        if differ:
            changes = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in differ)
            raise ValueError(f"{path}{_saved_by(version)} is of another run: {changes}")
    if jax.process_index() == 0:
        try:
            write_json(path, {_VERSION: jaxgen.__version__, **new})
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def load_config(workdir: str | os.PathLike) -> Any:
    """The configuration saved in `workdir`.

    Raises:
      ValueError: there is none, or it cannot be read by this version; the file, the version that wrote it and the fields
        are named.
    """
    path = storage.place(workdir) / "config.json"
    tree, version = _read(path)
    if tree is None:
        raise ValueError(f"{path} does not exist: {workdir} is not a run's directory")
    try:
        return config_lib.from_json(tree)
    except ValueError as error:
        raise ValueError(f"{path}{_saved_by(version)}: {error}") from error


def _saved_by(version: str | None) -> str:
    """Said where it explains something."""
    if version == jaxgen.__version__:
        return ""
    who = f"jaxgen {version}" if version else "a jaxgen that did not note its version"
    return f" (saved by {who}; this is {jaxgen.__version__})"


def _read(path: storage.Place) -> tuple[dict | None, str | None]:
    """The configuration at `path` and the version that wrote it; None if there is no such file."""
    try:
        if not storage.exists(path):
            return None, None
        tree = json.loads(storage.read_text(path))
        if not isinstance(tree, dict):
            raise ValueError("not a configuration")
        return {name: value for name, value in tree.items() if name != _VERSION}, tree.get(_VERSION)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """`{"model": {"depth": 4}}` as `{"model.depth": 4}`."""
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
