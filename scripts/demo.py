"""The whole story in a few minutes on a CPU: trains a tokenizer, a generator and a classifier on handwritten digits, then
samples, measures, and leaves pictures and numbers in the work directory. `make demo` runs it."""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import cli, pictures, storage
from jaxgen.data import pixels
from jaxgen.recipe import modules
from jaxgen.recipes.evaluation import evaluate_images, held_out
from jaxgen.train import train
from jaxgen.train.log import write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).parent.parent / "configs" / "var.py"))
    parser.add_argument("--variant", default="demo")
    parser.add_argument("--workdir", default="runs/demo", help="a folder, or gs://bucket/folder")
    parser.add_argument("--num", type=int, default=1000, help="samples to measure")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE")
    args = parser.parse_args()
    start = time.monotonic()
    recipe = cli.load_config_file(args.config).get_config(args.variant).override(args.set)
    recipe = recipe.config.resolve().recipe()
    workdir = storage.place(args.workdir)
    results = train(recipe, workdir, run=recipe.config.run)
    params = {name: result.params for name, result in results.items()}
    trained = time.monotonic() - start

    settings = dict(cfg=1.5, top_k=0, top_p=0.96, temperature=1.0)
    print(f"sampling {args.num} images")
    measures, images = evaluate_images(recipe, params, jax.random.key(0), num=args.num, batch_size=100, settings=settings)
    write_pictures(recipe, params, workdir, images)
    measures["seconds"] = {"training": round(trained, 1), "all": round(time.monotonic() - start, 1)}
    write_json(workdir / "metrics.json", measures)
    print(json.dumps(measures, indent=2))
    print(f"see {workdir}/samples.png, reconstructions.png, scales.png, metrics.json")


def write_pictures(recipe, params, workdir: storage.Place, images: np.ndarray) -> None:
    """`samples.png`, `reconstructions.png` and `scales.png`; `images` are sorted by class, equally many of each."""
    classes = recipe.config.model.num_classes
    scale = max(1, 48 // images.shape[1])
    per_class = len(images) // classes
    rows = [images.reshape(classes, per_class, *images.shape[1:])[:, i] for i in range(min(10, per_class))]
    names = [str(i) for i in range(classes)]
    pictures.save_png(workdir / "samples.png", pictures.rows(np.stack(rows, axis=1), names, scale=scale))

    tokenizer, variables = recipe.config.build_tokenizer(), modules(params)["tokenizer"]
    originals = pixels(next(iter(held_out(recipe.config.data, batch_size=12, limit=12)))["image"])

    @functools.partial(jax.jit, static_argnames="method")
    def apply(*args, method):
        return tokenizer.apply(variables, *args, method=method)

    decoded = apply(apply(originals, method="encode"), method="decode")
    picture = pictures.rows([np.asarray(originals), np.asarray(decoded)], ["original", "tokens"], scale=scale)
    pictures.save_png(workdir / "reconstructions.png", picture)

    tokens = recipe.sample(params, jax.random.key(1), jnp.arange(min(classes, 10)))["tokens"]
    steps = np.asarray(apply(tokens, method="decode_scales"))
    names = [f"{h}x{w}" for h, w in tokenizer.order.shapes]
    pictures.save_png(workdir / "scales.png", pictures.rows(steps, names, scale=scale))


if __name__ == "__main__":
    cli.run(main)
