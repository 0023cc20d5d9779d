"""What the scripts share: loading a recipe from a file or a work directory, and turning errors into exit codes."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax
from jax.sharding import Mesh

from jaxgen import storage
from jaxgen.recipe import Recipe
from jaxgen.train import (
    CompileCache,
    Interrupted,
    NonFiniteError,
    abstract_state,
    check_batch,
    check_rules,
    load_config,
    load_params,
    make_mesh,
    parse_rules,
    shardings,
    start_world,
)
from jaxgen.train.distributed import lost_process
from jaxgen.train.mesh import path_name

__all__ = [
    "add_device_flags",
    "add_sampling_flags",
    "add_shard_flag",
    "check_stages",
    "comma_separated",
    "load_config_file",
    "open_devices",
    "open_workdir",
    "output_file",
    "run",
    "sampling_settings",
    "with_shards",
]


def run(main: Callable[[], int | None]) -> None:
    """Runs a script: user errors become one line and exit code 2, an interruption that was saved 130 or 143.

    `JAXGEN_TRACEBACK=1` shows the whole traceback instead.
    """
    sys.stdout.reconfigure(line_buffering=True)  # progress shows at once in a pipe or a log file, too
    # Before jax 0.12 a callback to the host waits for ever where the CPU backend has one thread, the one that calls it.
    os.environ.setdefault("NPROC", str(max(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)))
    try:
        code = main() or 0
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, NonFiniteError, jax.errors.JaxRuntimeError) as error:
        said = lost_process(error) if isinstance(error, jax.errors.JaxRuntimeError) else str(error)
        if os.environ.get("JAXGEN_TRACEBACK") or said is None:
            raise
        print(f"error: {' '.join(said.split())}", file=sys.stderr)
        code = 2
    if code and jax.distributed.is_initialized() and jax.process_count() > 1:
        # An orderly exit would wait for the other processes, which wait for this one; they are told by JAX's runtime.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for which devices a script uses, read by `open_devices`."""
    parser.add_argument("--mesh", help="axes and sizes, such as data=2,fsdp=2")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="process 0 of a run of several processes")
    parser.add_argument("--num_processes", type=int, help="how many take part; clusters say so by themselves")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
    parser.add_argument("--wait_s", type=float, default=300.0, help="seconds to wait for the other processes")
    parser.add_argument("--compile_cache", metavar="DIR", help="keeps compiled programs, but not of several CPU hosts")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for how tokens are drawn, read by `sampling_settings`."""
    parser.add_argument("--cfg", type=float, help="guidance, at the last step; 0 is off; the recipe's own if left out")
    parser.add_argument("--top_k", type=int, default=0, help="0 is off, 1 is greedy")
    parser.add_argument("--top_p", type=float, help="0 is off; the recipe's own if left out")
    parser.add_argument("--temperature", type=float, default=1.0)


def sampling_settings(args: argparse.Namespace, recipe: Recipe) -> dict[str, float]:
    """What `add_sampling_flags` were given, by name; what was left out is as the recipe has it."""
    given = {name: getattr(args, name) for name in ("cfg", "top_k", "top_p", "temperature")}
    return {name: getattr(recipe, name) if value is None else value for name, value in given.items()}


def add_shard_flag(parser: argparse.ArgumentParser) -> None:
    """`--shard`, whose patterns `with_shards` reads."""
    parser.add_argument(
        "--shard",
        nargs="*",
        default=[],
        action="extend",
        metavar="PATTERN=AXES",
        help="where parameters lie whose path has the pattern, by dimension: head/head/kernel=fsdp,tensor; - splits nothing",
    )


def open_devices(args: argparse.Namespace, *, every_device: bool) -> Mesh | None:
    """Connects the processes of a run, and makes the mesh.

    Args:
      args: with the flags of `add_device_flags`.
      every_device: without `--mesh`, whether all devices are used, or none but the first: then there is no mesh.

    Raises:
      ValueError: see `jaxgen.train.start_world` and `jaxgen.train.make_mesh`.
    """
    start_world(coordinator=args.coordinator, num_processes=args.num_processes, process_id=args.process_id, wait_s=args.wait_s)
    if args.compile_cache:
        cache = CompileCache(args.compile_cache)
        atexit.register(lambda: jax.process_index() == 0 and print(cache))
    several = jax.process_count() > 1
    return make_mesh(args.mesh) if args.mesh or every_device or several else None


def load_config_file(path: str) -> ModuleType:
    """The module of a configuration file, which has a function `get_config(variant) -> Recipe`.

    Raises:
      ValueError: there is no such file, or it has no `get_config`.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path}: no such file")
    if not path.endswith(".py"):
        raise ValueError(f"--config {path}: not a Python file")
    spec = importlib.util.spec_from_file_location(f"configs.{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config {path}: has no function get_config")
    return module


def check_stages(recipe: Recipe, mesh: Mesh, shard: Sequence[str] = ()) -> Recipe:
    """Finds sizes that do not fit each other or the mesh in any stage, before hours have gone into the first one.

    Only shapes are computed; where a batch is to be split, one of each stage is read.

    Args:
      recipe, mesh, shard: as in `with_shards`.

    Returns:
      The recipe with these patterns.

    Raises:
      ValueError: as `with_shards`, or a batch that the mesh does not divide.
    """
    recipe = with_shards(recipe, mesh, shard)
    for stage in recipe.stages:
        check_batch(stage, mesh)
    return recipe


def with_shards(recipe: Recipe, mesh: Mesh, shard: Sequence[str]) -> Recipe:
    """The recipe with a user's patterns for where parameters lie, checked against the parameters of all stages.

    Args:
      recipe: to be trained.
      mesh: its devices.
      shard: patterns that come before the recipe's own, see `jaxgen.train.parse_rules`.

    Raises:
      ValueError: what the stage's modules, its optimizer or `jaxgen.train.mesh.shardings` object to, or a pattern (see
        `jaxgen.train.check_rules`).
    """
    rules = parse_rules(shard)
    recipe, params, names = recipe.with_rules(rules), {}, []
    for stage in recipe.stages:
        state = abstract_state(stage, mesh, {name: params[name] for name in stage.needs})
        params[stage.name] = state.params
        leaves = jax.tree_util.tree_leaves_with_path((state.params, state.state))
        names.append([path_name(path[1:]) for path, _ in leaves])
    check_rules(rules, names)
    return recipe


def open_workdir(
    workdir: str | os.PathLike, *, edits: Sequence[str] = (), step: int | str | None = None, mesh: Mesh | None = None
) -> tuple[Recipe, dict[str, dict]]:
    """The recipe that was trained in `workdir`, and the parameters of its stages (averaged ones where they were kept).

    Args:
      workdir: of `scripts/train.py` or `scripts/convert.py`.
      edits: changes to the configuration, such as another `data.path`.
      step: which checkpoint of each stage; None is the latest, "best" the one with the lowest evaluation loss.
      mesh: places parameters as in training; None puts everything on the first device.

    Raises:
      ValueError: not a work directory, or a stage without a checkpoint.
    """
    recipe = load_config(workdir).recipe().override(edits)

    def load(stage):
        place = None if mesh is None else functools.partial(shardings, mesh, rules=stage.rules)
        return load_params(workdir, stage.name, step, shardings=place)[0]

    return recipe, {stage.name: load(stage) for stage in recipe.stages}


def comma_separated(text: str, flag: str, kind=int) -> list:
    """`"0,1,2"` as a list.

    Raises:
      ValueError: naming the flag and the entry that is not a `kind`.
    """
    out = []
    for item in filter(None, text.split(",")):
        try:
            out.append(kind(item))
        except ValueError:
            raise ValueError(f"{flag} {text}: {item!r} is not {kind.__name__}") from None
    if not out:
        raise ValueError(f"{flag} {text!r}: empty")
    return out


@contextlib.contextmanager
def output_file(flag: str, path: str) -> Iterator[Path]:
    """A name to write to; in the end the file moves to `path`, whole, in a folder that is made if missing.

    For process 0 alone, where there are several. The path may be one of a bucket.

    Raises:
      ValueError: it cannot be written; what was at `path` is still there.
    """
    try:
        with storage.whole(storage.place(path)) as temporary:
            yield temporary
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error
