"""Configurations: trees of frozen dataclasses that are edited by path, saved as JSON and read back.

A leaf is a bool, int, float, str, None or a tuple of those. `override(config, ["model.depth=4"])` checks the
name and the type of every edit; `to_json` / `from_json` round-trip exactly.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import types
import typing
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

__all__ = ["fields_of", "override", "to_json", "from_json"]

C = TypeVar("C")


def override(config: C, edits: Iterable[str]) -> C:
    """Returns `config` with edits of the form `path.to.field=value` applied.

    Args:
      config: a frozen dataclass, whose fields may be dataclasses again.
      edits: strings such as `model.depth=4`, `data.path=/data/mnist.npz`, `tokenizer.patch_nums=1,2,4`.

    Raises:
      ValueError: an edit without `=`, an unknown field (the known ones are listed), or a value of the wrong type.

    Example:
      >>> override(Config(), ["model.depth=4"]).model.depth
      4
    """
    for edit in edits:
        path, sep, text = edit.partition("=")
        if not sep:
            raise ValueError(f"--set {edit!r}: expected key=value")
        config = _replace(config, path.strip().split("."), text, path.strip())
    return config


def _replace(config, keys: list[str], text: str, path: str):
    names = [f.name for f in dataclasses.fields(config)]
    if keys[0] not in names:
        raise ValueError(f"--set {path}: unknown key {keys[0]!r}; known: {', '.join(names)}")
    value = getattr(config, keys[0])
    if len(keys) > 1:
        if not dataclasses.is_dataclass(value):
            raise ValueError(f"--set {path}: {keys[0]!r} has no fields")
        new = _replace(value, keys[1:], text, path)
    elif dataclasses.is_dataclass(value):
        inner = ", ".join(f.name for f in dataclasses.fields(value))
        raise ValueError(f"--set {path}: {keys[0]!r} is a group; set one of its fields: {inner}")
    else:
        new = _parse(text.strip(), typing.get_type_hints(type(config))[keys[0]], path)
    return dataclasses.replace(config, **{keys[0]: new})


def _parse(text: str, kind: Any, path: str):
    """`text` as a value of type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        return _parse(text, next(a for a in args if a is not type(None)), path)
    if origin is tuple:
        items = [t for t in text.strip("()[] ").split(",") if t.strip()]
        return tuple(_parse(t.strip(), args[0], path) for t in items)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif kind in (int, float):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = None
        if type(value) is int or (kind is float and type(value) is float):
            return kind(value)
    raise ValueError(f"--set {path}={text}: expected {getattr(kind, '__name__', kind)}")


def fields_of(source: Any, cls: type | None = None) -> dict[str, Any]:
    """The fields of a dataclass instance by name: all of them, or those that another dataclass has, too.

    For modules of Linen, whose parts often have fields of the same names and meaning, `name` and `parent` are left out.
    """
    wanted = {field.name for field in dataclasses.fields(source if cls is None else cls)}
    if "parent" in wanted:
        wanted -= {"name", "parent"}
    return {field.name: getattr(source, field.name) for field in dataclasses.fields(source) if field.name in wanted}


def to_json(config: Any) -> dict:
    """A JSON-ready dict of `config`, with the class's import path under `"type"`."""
    cls = type(config)
    return {"type": f"{cls.__module__}:{cls.__qualname__}", **_plain(config)}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return list(value) if isinstance(value, tuple) else value


def from_json(tree: dict) -> Any:
    """The configuration that `to_json` wrote.

    Raises:
      ValueError: a type outside jaxgen, fields that the class does not have, groups of fields or fields without a default that
        the file lacks, or values of the wrong type (a file that was saved by another version, or edited); each is named.

    Warns:
      UserWarning: other fields that the file lacks, as it is older than they are, with the defaults that are taken.
    """
    module, _, name = str(tree.get("type", "")).partition(":")
    if not module.startswith("jaxgen."):
        raise ValueError(f"config type {tree.get('type')!r} is not one of jaxgen's")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f"config type {tree['type']!r} does not exist in this version") from None
    return _build(cls, {k: v for k, v in tree.items() if k != "type"}, name)


def _build(cls, tree: Any, path: str):
    if not (dataclasses.is_dataclass(cls) and isinstance(tree, dict)):
        raise ValueError(f"config {path}: {tree!r} is not a group of fields")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = set(tree) - set(fields)
    if unknown:
        raise ValueError(f"config {path}: unknown fields {sorted(unknown)} (saved by another version?)")
    missing = [field for name, field in fields.items() if name not in tree]
    named = ", ".join(f"{field.name} (now {_default(field)})" for field in missing)
    if any(dataclasses.is_dataclass(hints[field.name]) or not _has_default(field) for field in missing):
        raise ValueError(f"config {path}: lacks the fields {named}; add them with what was meant by their absence")
    if missing:
        warnings.warn(f"config {path}: lacks the fields {named}; what they are now is taken", stacklevel=2)
    out = {}
    for key, value in tree.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            out[key] = _build(kind, value, f"{path}.{key}")
        else:
            out[key] = tuple(value) if isinstance(value, list) else value
            if not _fits(out[key], kind):
                raise ValueError(f"config {path}.{key}: {value!r} is not of type {getattr(kind, '__name__', kind)}")
    return cls(**out)


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _default(field: dataclasses.Field) -> str:
    """What a field is where nobody sets it, as JSON has it."""
    if not _has_default(field):
        return "without a default"
    return json.dumps(_plain(field.default if field.default is not dataclasses.MISSING else field.default_factory()))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a leaf has the type that its field declares."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if kind is float:
        return type(value) in (int, float)
    return value is None if kind is type(None) else type(value) is kind
