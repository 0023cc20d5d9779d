"""Trains the stages of a recipe in a work directory; run again to resume.

python scripts/train.py --config configs/var.py --variant small --workdir runs/mnist --set data.path=mnist.npz model.depth=4
"""

import argparse
import dataclasses

from jaxgen import cli
from jaxgen.train import train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a file with get_config(variant)")
    parser.add_argument("--variant", required=True)
    parser.add_argument("--workdir", required=True, help="a folder, or gs://bucket/folder")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE", help="edits of the configuration")
    cli.add_shard_flag(parser)
    parser.add_argument("--until", metavar="STAGE", help="trains this stage and those before it")
    parser.add_argument("--profile", type=int, metavar="N", help="records a trace of N updates in the work directory")
    cli.add_device_flags(parser)
    args = parser.parse_args()
    profile = [] if args.profile is None else [f"run.profile={args.profile}"]
    recipe = cli.load_config_file(args.config).get_config(args.variant).override([*args.set, *profile])
    mesh = cli.open_devices(args, every_device=True)
    recipe = recipe.config.resolve().recipe()
    recipe = cli.check_stages(recipe, mesh, args.shard)
    if args.until:
        last = recipe.stages.index(recipe.stage(args.until))
        recipe = dataclasses.replace(recipe, stages=recipe.stages[: last + 1])
    train(recipe, args.workdir, mesh=mesh, run=recipe.config.run)


if __name__ == "__main__":
    cli.run(main)
