"""Says whether a training fits devices that need not be attached: memory, work and traffic of one update of each stage.

python scripts/plan.py --config configs/var.py --variant d30 --device v5e-64 --mesh data=8,fsdp=8
python scripts/plan.py --config configs/llamagen.py --variant 3b --device v5p-128 --propose      # settings that fit
python scripts/plan.py --config configs/var.py --variant d16 --device h100-8 --mesh fsdp=8
python scripts/plan.py --config configs/*.py --variant paper --device h100-8 --mesh fsdp=8 --only generator --markdown

TPUs are compiled for by libtpu, which has to be installed (`pip install 'jaxgen[tpu]'`) but needs no TPU. For GPUs the program is
compiled for as many CPU devices: parameters and traffic are theirs, temporaries an estimate. Data are read for the shapes of a
batch; pictures and clips that are not there are drawn instead. Of several configurations, those without the variant are left out.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax

from jaxgen import cli
from jaxgen import config as config_lib
from jaxgen.plan import Devices, parse_devices, plan_updates, proposals
from jaxgen.recipe import Recipe
from jaxgen.tables import markdown_table, text_table
from jaxgen.train import make_mesh

# No device is used, and libtpu must not look for one.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, nargs="+", metavar="FILE", help="files with get_config(variant)")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--device", required=True, help="such as v5e-64, v5p-128, v6e-256, h100-8")
    parser.add_argument("--mesh", help="axes and sizes, such as data=8,fsdp=8; all devices on data if left out")
    cli.add_shard_flag(parser)
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--propose", action="store_true", help="tries meshes, recomputation and smaller batches until one fits")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE", help="edits of the configuration")
    parser.add_argument("--markdown", action="store_true", help="prints the table for a page")
    args = parser.parse_args()
    if args.propose and (args.mesh or args.config[1:]):
        raise ValueError("--propose chooses the mesh, of one configuration")
    devices = parse_devices(args.device)
    jax.config.update("jax_platforms", "cpu")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not devices.chip.topologies:
        jax.config.update("jax_num_cpu_devices", devices.count)
        jax.config.update("jax_disable_most_optimizations", True)  # of machine code, which nobody runs; the program is the same
    table = markdown_table if args.markdown else text_table
    if args.config[1:]:
        print(table(_plan_all(args, devices)))
        return
    recipe = _recipe(cli.load_config_file(args.config[0]), args)
    if not args.propose:
        rows = list(_plan(recipe, devices, args.mesh, only=args.only, shard=args.shard))
        if not rows:
            raise ValueError(f"--only {args.only!r} fits none of the stages that are trained")
        print(table(rows))
        return
    fits = False
    plan = functools.partial(_plan, shard=args.shard)
    for mesh, edits, rows in proposals(recipe, devices, only=args.only or "generator", plan=plan):
        fits = all(row["fits"] for row in rows)
        print(f"\n{'fits' if fits else 'does not fit'}: --mesh {mesh} {'--set ' + ' '.join(edits) if edits else ''}".rstrip())
        print(table(rows), flush=True)
    if not fits:
        raise ValueError(f"--device {args.device}: nothing that was tried fits; more devices are needed")


def _recipe(module: ModuleType, args: argparse.Namespace) -> Recipe:
    """The configuration's recipe, with pictures or clips that can be had here."""
    config = module.get_config(args.variant).config
    if hasattr(config.data, "or_drawn"):
        # One batch is not worth a process.
        config = dataclasses.replace(config, data=dataclasses.replace(config.data.or_drawn(), workers=0))
    return config_lib.override(config, args.set).resolve().recipe()


def _plan(recipe: Recipe, devices: Devices, mesh: str | None, *, only: str, shard: Sequence[str]) -> Iterator[dict]:
    """The rows of a recipe, trained as `train.py` would train it."""
    if shard:
        recipe = cli.with_shards(recipe, make_mesh(mesh, devices.devices()), shard)
    return plan_updates(recipe, devices, mesh, only=only, reduce_dtype=recipe.config.run.reduce_dtype)


def _plan_all(args: argparse.Namespace, devices: Devices) -> list[dict]:
    """The rows of every configuration that has the variant; what goes wrong with one is its row."""
    rows = []
    for path in args.config:
        name = Path(path).stem
        if name == "__init__" or args.variant not in getattr(module := cli.load_config_file(path), "VARIANTS", ()):
            continue
        try:
            found = list(_plan(_recipe(module, args), devices, args.mesh, only=args.only, shard=args.shard))
        except Exception as error:  # the others are wanted all the same
            found = [{"stage": " ".join(f"{type(error).__name__}: {error}".split())[:200]}]
        rows += [{"config": name} | row for row in found]
        print(name, "planned", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    cli.run(main)
