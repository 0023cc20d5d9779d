"""Official checkpoints into a work directory, and a work directory back into the authors' layout.

python scripts/convert.py import --generator var_d16.pth --tokenizer vae_ch160v4096z32.pth --workdir runs/d16
python scripts/convert.py import --tokenizer vae_ch160v4096z32.pth --workdir runs/mine      # then train a generator on it
python scripts/convert.py import --layout kl16 --tokenizer kl16.ckpt --workdir runs/xar     # the same for other families
python scripts/convert.py import --layout hmar --generator hmar-d16.pth --tokenizer vae_ch160v4096z32.pth --workdir runs/hmar
python scripts/convert.py import --layout llamagen --generator c2i_B_256.pt --tokenizer vq_ds16_c2i.pt --workdir runs/llamagen
python scripts/convert.py export --workdir runs/d16 --generator g.safetensors --tokenizer t.safetensors
"""

import argparse
import functools
from pathlib import Path

from jaxgen import cli, storage
from jaxgen.interop import flexvar, hmar, llamagen, mar, nar, var
from jaxgen.recipe import modules
from jaxgen.recipes import image_llama, next_scale, refined_scale
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.neighbours import NeighbourConfig
from jaxgen.train import save_config, save_params

# What the authors' code fixes and their files therefore leave out.
UNSAVED = {"tokenizer": {"groups": 32, "phi_ratio": 0.5, "cosine": False}}
UNSAVED_LLAMA = {"tokenizer": {"groups": 32}, "model": {"theta": 10000.0}}

# How a tokenizer alone is read; nothing of its parameters depends on the scales.
TOKENIZERS = {
    "var": functools.partial(var.load_tokenizer, patch_nums=var.PATCH_NUMS[680]),
    "hmar": functools.partial(var.load_tokenizer, patch_nums=var.PATCH_NUMS[680]),
    "flexvar": flexvar.load_tokenizer,
    "kl16": mar.load_tokenizer,
    "llamagen": functools.partial(flexvar.load_tokenizer, patch_nums=(llamagen.GRID,)),
    "nar": functools.partial(flexvar.load_tokenizer, patch_nums=(llamagen.GRID,)),
}
# Read in Python alone: no recipe describes them, so that no work directory could hold them.
NO_RECIPE = ("rar", "xar", "infinity", "dinov2")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("--workdir", required=True, help="a folder, or gs://bucket/folder")
    parser.add_argument("--layout", choices=(*TOKENIZERS, *NO_RECIPE), default="var", help="whose files; exports need none")
    parser.add_argument("--generator", help="the generator's file; importing may leave it out")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer's file")
    parser.add_argument("--patch_nums", help="scales, such as 1,2,3,4, or the one grid, where the files do not reveal them")
    parser.add_argument("--num_heads", type=int, help="heads, where the files do not reveal them")
    args = parser.parse_args()
    (import_checkpoints if args.direction == "import" else export_checkpoints)(args)


def import_checkpoints(args):
    workdir = storage.place(args.workdir)
    taken = [name for name in ("config.json", "checkpoints") if storage.exists(workdir / name)]
    if taken:
        raise ValueError(f"--workdir {args.workdir}: already has {' and '.join(taken)}; import into a new one")
    if args.layout in NO_RECIPE:
        raise ValueError(f"--layout {args.layout}: there is no recipe of these models; jaxgen.interop.{args.layout} reads them")
    patch_nums = tuple(cli.comma_separated(args.patch_nums, "--patch_nums")) if args.patch_nums else None
    if not args.generator:
        _, tokenizer = TOKENIZERS[args.layout](args.tokenizer)
        save_params(args.workdir, "tokenizer", {"tokenizer": tokenizer})
        print(f"{args.workdir}: the tokenizer; train a generator on it with --set tokenizer_train.steps=0")
        return
    if args.layout not in GENERATORS:
        raise ValueError(f"--layout {args.layout}: of these files the tokenizer alone is imported; leave --generator out")
    model, config = GENERATORS[args.layout](args, patch_nums)
    for name, variables in model.params.items():
        save_params(args.workdir, name, {name: variables})
    # Last, since it makes the directory a run's.
    save_config(args.workdir, config)
    print(f"{args.workdir}: depth {model.generator.depth}, scales {config.tokenizer.patch_nums}, {model.num_classes} classes")


def read_next_scale(args, patch_nums, *, refined: bool):
    """(the model in a pair of files, its configuration)"""
    load = hmar.load if refined else var.load
    model = load(generator=args.generator, tokenizer=args.tokenizer, patch_nums=patch_nums, num_heads=args.num_heads)
    return model, refined_scale.config_of(model.sampler) if refined else next_scale.config_of(model.generator, model.tokenizer)


def read_llama(args, patch_nums, *, cls: type[ImageLlamaConfig]):
    """See `read_next_scale`."""
    if patch_nums and len(patch_nums) != 1:
        raise ValueError(f"--patch_nums {args.patch_nums}: models of layout {args.layout} have one grid")
    grid = dict(grid=patch_nums[0] if patch_nums else None, num_heads=args.num_heads)
    load = nar.load if cls is NeighbourConfig else llamagen.load
    model = load(generator=args.generator, tokenizer=args.tokenizer, **grid)
    return model, image_llama.config_of(model.generator, model.tokenizer, cls)


# Layouts whose generators are read.
GENERATORS = {
    "var": functools.partial(read_next_scale, refined=False),
    "hmar": functools.partial(read_next_scale, refined=True),
    "llamagen": functools.partial(read_llama, cls=ImageLlamaConfig),
    "nar": functools.partial(read_llama, cls=NeighbourConfig),
}


def export_checkpoints(args):
    if not args.generator:
        raise ValueError("--generator: exporting writes both files")
    for flag, path in (("--generator", args.generator), ("--tokenizer", args.tokenizer)):
        if not path.endswith(".safetensors") or not Path(path).parent.is_dir():
            raise ValueError(f"{flag} {path}: expected a name that ends in .safetensors, in a folder that exists")
    recipe, params = cli.open_workdir(args.workdir)
    params = {name: variables for name, variables in modules(params).items() if name in ("generator", "tokenizer")}
    config = recipe.config
    if isinstance(config, ImageLlamaConfig):
        return export_llama(args, config, params)
    check_unsaved(args, config, UNSAVED)
    used = sum(name.startswith("phi_") for name in params["tokenizer"]["params"]["quantizer"])
    if used != config.tokenizer.phis:
        raise ValueError(
            f"{args.workdir}: tokenizer.phis={config.tokenizer.phis}, of which its {len(config.tokenizer.patch_nums)} scales use "
            f"{used}; files in the authors' layout have them all"
        )
    model = var.VAR(generator=config.build_generator(), tokenizer=config.build_tokenizer(), params=params)
    model.save(generator=args.generator, tokenizer=args.tokenizer)
    print(f"{args.generator}, {args.tokenizer}: written in the authors' layout")


def export_llama(args, config, params):
    """In the layout of LlamaGen or NAR."""
    models = {ImageLlamaConfig: llamagen.LlamaGen, NeighbourConfig: nar.NAR}
    if type(config) not in models:
        raise ValueError(f"{args.workdir}: there is no published layout of a {type(config).__name__}")
    check_unsaved(args, config, UNSAVED_LLAMA)
    model = models[type(config)](generator=config.build_generator(), tokenizer=config.build_tokenizer(), params=params)
    model.save(generator=args.generator, tokenizer=args.tokenizer)
    unsaid = f"--num_heads {config.model.heads} --patch_nums {config.tokenizer.patch_nums[0]}"
    print(f"{args.generator}, {args.tokenizer}: written in the authors' layout, which does not say {unsaid}")


def check_unsaved(args, config, unsaved):
    """That fields which the files leave out are what the authors' code makes of them."""
    for group, fields in unsaved.items():
        for field, theirs in fields.items():
            if (ours := getattr(getattr(config, group), field)) != theirs:
                raise ValueError(
                    f"{args.workdir}: {group}.{field}={ours}; files in the authors' layout do not say so, and are read as "
                    f"{field}={theirs}"
                )


if __name__ == "__main__":
    cli.run(main)
