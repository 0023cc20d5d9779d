"""Finding, checking and reading what `jaxgen.train.checkpoint` wrote; every failure names the checkpoint and its reason."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxgen import storage
from jaxgen.storage import Place
from jaxgen.train.mesh import path_name

__all__ = [
    "check_common_shapes",
    "check_files",
    "check_fit",
    "data_state",
    "directory",
    "eval_loss",
    "find",
    "incomplete",
    "metadata",
    "quiet",
    "read_loss",
    "readable",
    "reason",
    "restore_tree",
    "steps",
]

PyTree = Any

_SHOWN = 5  # parameters named in one error
_TEMPORARY, _COMMITTED = ".orbax-checkpoint-tmp", "commit_success.txt"  # orbax's names


def directory(workdir: str | os.PathLike, stage: str) -> Place:
    """Where the stage's checkpoints lie."""
    top = storage.place(workdir)
    return (top if storage.in_bucket(top) else top.resolve()) / "checkpoints" / stage


def steps(directory: Place) -> list[int]:
    """The steps with a complete checkpoint, in order."""
    return sorted(int(path.name) for path in _folders(directory) if path.name.isdigit() and _complete(path))


def incomplete(directory: Place) -> list[Place]:
    """What saves that never finished have left."""
    left = [path for path in _folders(directory) if _TEMPORARY in path.name or path.name.isdigit() and not _complete(path)]
    return sorted(left)


def _folders(directory: Place) -> list[Place]:
    return [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []


def _complete(path: Place) -> bool:
    """On a disk a whole checkpoint gets its name by a renaming; a bucket has none, and orbax writes a last file instead."""
    return not storage.in_bucket(path) or (path / _COMMITTED).exists()


def find(directory: Place, step: int | str | None) -> Place:
    """The checkpoint of `step`, of the last step (`None`), or of the lowest evaluation loss (`"best"`)."""
    known = steps(directory)
    if not known:
        left = "".join(f"; {path.name} is incomplete" for path in incomplete(directory))
        raise ValueError(f"no checkpoint in {directory}{left}")
    if step is None:
        step = known[-1]
    elif step == "best":
        losses = [read_loss(directory / str(s)) for s in known]
        if not np.isfinite(min(losses)):
            raise ValueError(f"none of the checkpoints {known} in {directory} was evaluated, so none is the best")
        step = known[int(np.argmin(losses))]
    elif step not in known:
        raise ValueError(f"no checkpoint of step {step!r} in {directory}; there are {known}")
    return directory / str(step)


def eval_loss(metrics: dict | None) -> float:
    """The loss that ranks a checkpoint; infinite if it was not evaluated, or to no number."""
    loss = float((metrics or {}).get("loss", np.inf))
    return np.inf if np.isnan(loss) else loss


def read_loss(path: Place) -> float:
    """`eval_loss` of the checkpoint at `path`."""
    file = path / "metrics" / "metrics"
    with readable(path):
        return eval_loss(json.loads(file.read_text())) if file.exists() else float("inf")


def metadata(path: Place) -> dict[str, PyTree]:
    """The saved tree with each array's shape and dtype; tuples and classes have become lists and dicts.

    Raises:
      ValueError: the checkpoint is damaged (see `check_files`).
    """
    check_files(path)
    with readable(path), quiet():
        return ocp.PyTreeCheckpointHandler().metadata(path / "state").tree


def restore_tree(path: Place, wanted: PyTree) -> PyTree:
    """The part of the saved tree that `wanted` (`ShapeDtypeStruct`s with shardings) names, after `metadata` found it whole."""
    with readable(path), quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        return checkpointer.restore(path / "state", args=args)


def check_fit(path: Place, wanted: dict[str, PyTree]) -> None:
    """Compares the shapes and dtypes of the checkpoint with those of `wanted`, a dict of the trees to be restored.

    Raises:
      ValueError: naming the parameters that differ, are missing or are unknown, with both shapes.
    """
    saved = _table({name: tree for name, tree in metadata(path).items() if name in wanted})
    model = _table(wanted)
    problems = []
    for name in sorted(saved.keys() | model.keys()):
        here, there = model.get(name), saved.get(name)
        if there is None:
            problems.append(f"{name} {here} is not in the checkpoint")
        elif here is None:
            problems.append(f"{name} {there} is not in the model")
        elif here != there:
            problems.append(_differs(name, there, here))
    _refuse(path, problems)


def check_common_shapes(path: Place, wanted: dict[str, PyTree]) -> None:
    """Compares the shapes of what the checkpoint and `wanted`, a dict of trees, both have.

    Weights from elsewhere may lack what only training needs, or have it.

    Raises:
      ValueError: naming the parameters that differ, with both shapes.
    """
    trees = metadata(path), wanted
    saved, model = ({path_name(at): x.shape for at, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in trees)
    common = sorted(saved.keys() & model.keys())
    _refuse(path, [_differs(name, list(saved[name]), list(model[name])) for name in common if saved[name] != model[name]])


def _differs(name: str, there: Any, here: Any) -> str:
    return f"{name} is {there} in the checkpoint and {here} in the model"


def _refuse(path: Place, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"checkpoint {path} does not fit the model: {'; '.join(problems[:_SHOWN])}{more}")


def _table(tree: PyTree) -> dict[str, str]:
    """Path -> `float32[4, 3]`."""
    table = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        table[path_name(path)] = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
    return table


def data_state(path: Place) -> Any:
    """The state of the data iterator that grain saved in the checkpoint at `path`, which every process wrote.

    Raises:
      ValueError: there is none, or processes differ.
    """
    with readable(path):
        states = [json.loads(file.read_text()) for file in sorted((path / "data").glob("process_*-of-*.json"))]
        if not states:
            raise ValueError("it holds no state of the data")
        if any(state != states[0] for state in states):
            raise ValueError(f"its processes had come to different places in the data: {states}")
        return states[0]


def check_files(path: Place) -> None:
    """Finds files that are missing or cut short before anything is read from them.

    orbax reads all arrays at once, and when one fails the others print pages of errors from their threads; this walks
    tensorstore's index instead, which says where the bytes of each array lie.

    Raises:
      ValueError: naming the file and, where the index is whole, the parameter.
    """
    state = path / "state"
    with readable(path):
        for file in (state / "_METADATA", *(state / "array_metadatas").glob("*")):
            json.loads(file.read_text())
        where = f"{state}/" if storage.in_bucket(state) else {"driver": "file", "path": f"{state}/"}
        store, size = ts.KvStore.open(where).result(), functools.cache(storage.size)
        pending = [("its index", version["root"]["location"]) for version in ts.ocdbt.dump(store).result()["versions"]]
        while pending:
            name, location = pending.pop()
            kind, folder, file, offset, length = location.split(":")
            file = state / unquote(folder) / unquote(file)
            if (size(file) or 0) < int(offset) + int(length):
                what = "is missing" if size(file) is None else f"is cut short at {size(file)} bytes"
                raise ValueError(f"{file.relative_to(path)} {what}; it holds {name}")
            if kind == "btreenode":
                for entry in ts.ocdbt.dump(store, location).result()["entries"]:
                    place = entry.get("location") or entry.get("indirect_value")
                    if place:
                        pending.append((name if "location" in entry else entry["key"].decode(), place))


@contextlib.contextmanager
def readable(path: Place, problem: str = "cannot be read") -> Iterator[None]:
    """Turns whatever orbax, tensorstore or the disk raise into a `ValueError` that names `path`."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"checkpoint {path} {problem}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of the first cause, without tensorstore's dump of its settings; the system's word if it has one."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.split(r"\s*(?:\[tensorstore_spec|\[source locations|\n)", str(error).strip())[0]
    system = re.search(r": ([^:]+) \[os_error_code", text)
    return system.group(1) if system else text or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from printing pages of traceback for failures that are raised as well.

    It logs them from its threads; and after one array has failed, the others' answers find its event loop closed.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def unraisable(args) -> None:
        if str(args.exc_value) != "Event loop is closed":
            before(args)

    logger, before = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(keep)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        logger.removeFilter(keep)
        sys.unraisablehook = before
