"""Encodes a data set once with a trained tokenizer, so that generators train from tokens; run again to go on.

python scripts/train.py --config configs/var.py --variant d16 --workdir runs/d16 --set data.path=imagenet/ --until tokenizer
python scripts/cache_tokens.py --workdir runs/d16 --views 10 --out tokens/
python scripts/train.py --config configs/var.py --variant d16 --workdir runs/d16 --set data.path=imagenet/ data.tokens=tokens/

Several hosts share the work, with the flags of train.py. Crops and flips are drawn anew for each view, and recorded.
"""

import argparse

import jax

from jaxgen import cli
from jaxgen.recipes.token_cache import cache_tokens
from jaxgen.train import load_config, load_params


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run whose tokenizer is trained")
    parser.add_argument("--out", required=True, help="the folder of the tokens")
    parser.add_argument("--views", type=int, default=1, help="crops and flips of each training image")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--step", help="a checkpoint's step, or best; the latest if left out")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE", help="such as data.path=...")
    cli.add_device_flags(parser)
    args = parser.parse_args()
    cli.open_devices(args, every_device=False)
    step = int(args.step) if args.step and args.step.isdigit() else args.step
    recipe = load_config(args.workdir).recipe().override(args.set)
    params = {"tokenizer": load_params(args.workdir, "tokenizer", step)[0]}
    cache_tokens(recipe.config, params, args.out, views=args.views, batch_size=args.batch_size)
    if jax.process_index() == 0:
        print(f"{args.out}: train from it with --set data.tokens={args.out}")


if __name__ == "__main__":
    cli.run(main)
