"""Measures a work directory: reconstruction of held-out images or clips, and samples in the eyes of a classifier of the real
ones; of models of captions their likelihood with right and wrong captions and, on the world, what the oracle says of samples.

python scripts/evaluate.py --workdir runs/mnist --num 1000 --cfg 1.5 --top_p 0.96
python scripts/evaluate.py --workdir runs/d16 --num 50000 --inception pt_inception-2015-12-05-6726825d.pth \
    --reference VIRTUAL_imagenet256_labeled.npz --mesh data=8         # FID, sFID, IS, precision, recall; run again to go on
"""

import argparse
import json

import jax

from jaxgen import cli, storage
from jaxgen.interop import inception
from jaxgen.recipes.caption_quality import evaluate_captions
from jaxgen.recipes.evaluation import evaluate_images
from jaxgen.recipes.image_quality import data_reference, npz_reference, sample_quality
from jaxgen.train.log import write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--num", type=int, default=1000, help="samples, spread over the classes, or one a held-out caption")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--step", help="a checkpoint's step, or best; the latest if left out")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE", help="such as data.path=...")
    parser.add_argument("--inception", help="InceptionV3's weights: samples are compared by its features")
    parser.add_argument("--reference", help="statistics or images of real ones, .npz; the training data if left out")
    cli.add_device_flags(parser)
    args = parser.parse_args()
    for edit in args.set:
        if not edit.startswith("data."):
            raise ValueError(f"--set {edit}: only the data may differ from what was trained (data.path=...)")
    step = int(args.step) if args.step and args.step.isdigit() else args.step
    mesh = cli.open_devices(args, every_device=False)
    recipe, params = cli.open_workdir(args.workdir, edits=args.set, step=step, mesh=mesh)
    if recipe.modality == "text" or (args.inception and recipe.modality != "image"):
        what = "InceptionV3 reads images" if args.inception else "this measures images and clips"
        raise ValueError(f"--workdir {args.workdir}: makes {recipe.modality}, and {what}")
    recipe.config.resolve()  # says if these data do not fit
    settings = cli.sampling_settings(args, recipe)
    if args.reference and not args.inception:
        raise ValueError(f"--reference {args.reference}: statistics are of InceptionV3's features; --inception is missing")
    if args.inception and recipe.prompts:
        raise ValueError(f"--inception: {args.workdir} makes images of captions, and samples are taken evenly of classes")
    if args.inception:
        results = inception_scores(args, recipe, params, settings, mesh)
        return save("inception.json", args.workdir, results)
    evaluate = evaluate_images if recipe.prompts is None else evaluate_captions
    results, _ = evaluate(
        recipe, params, jax.random.key(args.seed), num=args.num, batch_size=args.batch_size, settings=settings, mesh=mesh
    )
    save("evaluation.json", args.workdir, results)


def inception_scores(args, recipe, params, settings, mesh) -> dict:
    """FID and the like; statistics are kept in the work directory, so that nothing is sampled twice."""
    network, variables = inception.load(args.inception)
    folder, log = storage.place(args.workdir) / "quality", print
    if args.reference:
        reference = npz_reference(args.reference, network, variables, folder=folder / "reference", log=log)
    else:
        reference = data_reference(recipe.config.data, network, variables, folder=folder / "reference", log=log)
    options = dict(num=args.num, batch_size=args.batch_size, settings=settings, mesh=mesh, log=log)
    return sample_quality(
        recipe,
        params,
        jax.random.key(args.seed),
        network,
        variables,
        reference,
        folder=folder / "samples",
        about={"step": args.step},
        **options,
    )


def save(name: str, workdir: str, results: dict) -> None:
    """Prints the measures, and writes them to the work directory."""
    if jax.process_index() == 0:
        write_json(storage.place(workdir) / name, results)
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    cli.run(main)
