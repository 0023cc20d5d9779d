"""Measures compiled functions on this machine, as a table and JSON; or compiles them for a TPU that is not attached.

python scripts/benchmark.py kernels --size small         # full on an accelerator; --only attention
python scripts/benchmark.py decoding --batch 1,32        # --size small for a quick look; --only plain
python scripts/benchmark.py var --depth 16 --batch 1
python scripts/benchmark.py var --depth 16 --batch 1,64 --dtype bfloat16 --train
python scripts/benchmark.py llamagen --batch 1           # LlamaGen-B, 256 tokens; --size small for a quick look
python scripts/benchmark.py checkpoints --size small     # what saving 300 M parameters (small: 1 M) costs a training
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python scripts/benchmark.py var --depth 16 --dtype bfloat16 --train --topology v5e:2x2
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python scripts/benchmark.py recipes --topology v5e:2x2     # every configs/*.py, smoke
"""

import argparse
import dataclasses
import datetime
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgen import benchmark, checkpoint_benchmark, cli, decoding_benchmark, kernel_benchmark, kernel_cases
from jaxgen.decoding import Settings
from jaxgen.generators import ImageLlama, NextScaleSampler, NextTokenSampler
from jaxgen.recipe_compile import compile_recipe
from jaxgen.tables import text_table
from jaxgen.tokenizers import FlexibleTokenizer
from jaxgen.train import abstract_state, init_state, make_mesh, make_step

CONFIGS = Path(__file__).parent.parent / "configs"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("var", "llamagen", "kernels", "decoding", "recipes", "checkpoints"))
    parser.add_argument("--depth", type=int, default=16, help="width is 64 depth, as published")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unrolled", action="store_true", help="do not scan over layers")
    parser.add_argument("--repeats", type=int, help="3, 5 for decoding, 20 for kernels")
    parser.add_argument("--size", help="of the kernels' problems: small or full; of the decoded model: small or 25m; and so on")
    parser.add_argument("--only", default="", help="problems, methods or configs whose name contains this")
    parser.add_argument("--train", action="store_true", help="also the generator's training step")
    parser.add_argument("--topology", help="compile for this TPU topology instead of running, such as v5e:2x2")
    parser.add_argument("--set", nargs="*", default=[], action="extend", metavar="KEY=VALUE")
    parser.add_argument("--json", help="also writes the rows to this file")
    args = parser.parse_args()
    if args.repeats is None:
        args.repeats = {"kernels": 20, "decoding": 5}.get(args.what, 3)
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected at least 1")
    measures = dict(kernels=kernels, decoding=decoding, recipes=recipes, checkpoints=checkpoints, var=var, llamagen=llamagen)
    rows = measures[args.what](args)
    print(text_table(rows))
    print(json.dumps(rows))
    if args.json:
        with cli.output_file("--json", args.json) as path:
            path.write_text(json.dumps(rows, indent=2) + "\n")


def kernels(args) -> list[dict]:
    """Each problem by each implementation that this machine has."""
    size = args.size or ("small" if jax.default_backend() == "cpu" else "full")
    cases = [case for case in kernel_cases.measured(size) if args.only in case.name]
    if not cases:
        raise ValueError(f"--only {args.only!r} fits none of {', '.join(c.name for c in kernel_cases.measured(size))}")
    rows = []
    for row in kernel_benchmark.bench(cases, repeats=args.repeats):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {datetime.date.today()}, median of {args.repeats}")
    return rows


def decoding(args) -> list[dict]:
    """Plain cached sampling of a byte model against each method and PyTorch, and what the loop itself costs."""
    batches = tuple(cli.comma_separated(args.batch, "--batch"))
    if min(batches) < 1:
        raise ValueError(f"--batch {min(batches)}: expected at least 1")
    size = args.size or "25m"
    new_tokens = 16 if size == "small" else 128
    rows = []
    options = dict(size=size, batches=batches, new_tokens=new_tokens, repeats=args.repeats, only=args.only)
    for row in decoding_benchmark.bench(**options):
        print("  ".join(f"{key} {value}" for key, value in row.items()))
        rows.append(row)
    if not args.only:
        rows += decoding_benchmark.loop_overhead(batches=batches, steps=64 if size == "small" else 1000, repeats=args.repeats)
    if not rows:
        raise ValueError(f"--only {args.only!r} fits none of the methods")
    return rows


def recipes(args) -> list[dict]:
    """Every config's training steps and sampler at smoke size, compiled for a topology, or for this machine."""
    devices = benchmark.topology_devices(args.topology) if args.topology else jax.devices()
    files = [path for path in sorted(CONFIGS.glob("[!_]*.py")) if args.only in path.stem]
    rows = []
    for path in files:
        config = cli.load_config_file(str(path)).get_config("smoke").override(args.set).config.resolve()
        for row in compile_recipe(config.recipe(), devices):
            rows.append({"config": path.stem} | row)
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if not rows:
        raise ValueError(f"--only {args.only!r} fits none of the configs")
    return rows


def checkpoints(args) -> list[dict]:
    """How long a training stands still for a save, and until it is complete, in the system's temporary folder."""
    rows = []
    for row in checkpoint_benchmark.bench(1_000_000 if args.size == "small" else 300_000_000):
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return rows


def var(args) -> list[dict]:
    """The sampler and the training step of VAR."""
    config = (
        cli.load_config_file(str(CONFIGS / "var.py"))
        .get_config("d16")
        .override(
            [
                f"model.depth={args.depth}",
                f"model.scan_layers={not args.unrolled}",
                f"model.dtype={args.dtype}",
                f"tokenizer.dtype={args.dtype}",
                *args.set,
            ]
        )
        .config
    )
    rows, batches = [], cli.comma_separated(args.batch, "--batch")
    if min(batches) < 1:
        raise ValueError(f"--batch {min(batches)}: expected at least 1")
    for batch in batches:
        rows.append(sampling(config, batch, args))
        if args.train:
            rows.append(training(config, batch, args))
    return rows


def llamagen(args) -> list[dict]:
    """LlamaGen-B with its tokenizer, random weights: guided sampling of 256 tokens an image, in one compiled function."""
    small = (args.size or "base") == "small"
    sizes = dict(width=64, heads=4, depth=2) if small else dict(width=768, heads=12, depth=12)
    grid, vocab = (4, 64) if small else (16, 16384)
    conv = dict(ch=32, ch_mult=(1, 2), z_channels=32) if small else dict(ch=128, ch_mult=(1, 1, 2, 2, 4), z_channels=256)
    generator = ImageLlama(vocab=vocab, grid=grid, num_classes=1000, dtype=jnp.dtype(args.dtype), **sizes)
    tokenizer = FlexibleTokenizer(vocab=vocab, width=8, patch_nums=(grid,), dtype=jnp.dtype(args.dtype), **conv)
    sampler, rows = NextTokenSampler(generator=generator, tokenizer=tokenizer), []
    image = jax.ShapeDtypeStruct((1, *tokenizer.image_size, 3), jnp.float32)
    shapes = {"generator": generator.param_shapes(), "tokenizer": jax.eval_shape(tokenizer.init, jax.random.key(0), image)}
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)
    size = sum(x.size for x in jax.tree.leaves(shapes["generator"]))
    for batch in cli.comma_separated(args.batch, "--batch"):
        inputs = (params, jax.random.key(1), jnp.arange(batch) % 1000, Settings(*map(jnp.float32, Settings(cfg=1.0))))
        compiled, report = benchmark.compile_report(type(sampler)._sample, sampler, *inputs)
        times = benchmark.measure(compiled, *inputs, repeats=args.repeats)
        row = {"what": "LlamaGen-B sample", "batch": batch, "dtype": args.dtype, "parameters_M": round(size / 1e6, 1)}
        rows.append(row | report | times | {"ms_a_token": round(1e3 * times["seconds"] / generator.length, 2)})
    return rows


def sampling(config, batch: int, args) -> dict:
    """From key and labels to images, with guidance."""
    generator, tokenizer = config.build_generator(), config.build_tokenizer()
    image = jax.ShapeDtypeStruct((1, *tokenizer.image_size, tokenizer.channels), jnp.float32)
    shapes = {
        "generator": generator.param_shapes(tokenizer.width),
        "tokenizer": jax.eval_shape(tokenizer.init, jax.random.key(0), image),
    }
    sampler = NextScaleSampler(generator=generator, tokenizer=tokenizer)
    settings = Settings(*map(jnp.float32, Settings(top_p=0.96)))
    row = describe("sample", config, batch, shapes["generator"]) | {"TFLOP": flops(config, batch)}
    inputs = (jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((batch,), jnp.int32), settings)
    if args.topology:
        mesh = Mesh(np.array(benchmark.topology_devices(args.topology)).reshape(-1), ("data",))
        place = NamedSharding(mesh, P())
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), inputs)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        return (
            row | benchmark.compile_report(type(sampler)._sample, sampler, shapes, *inputs, None)[1] | {"device": args.topology}
        )
    params = jax.tree.map(lambda x: 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)
    labels = jnp.arange(batch) % config.model.num_classes
    inputs = (params, jax.random.key(1), labels, settings, None)
    compiled, report = benchmark.compile_report(type(sampler)._sample, sampler, *inputs)
    times = benchmark.measure(compiled, *inputs, repeats=args.repeats)
    return row | report | times | {"images_per_s": batch / times["seconds"]}


def flops(config, batch: int) -> float:
    """TFLOP of sampling a batch, from the program before optimisation and with layers unrolled: XLA counts a loop once."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=False))
    sampler = config.build_sampler()
    image = jax.ShapeDtypeStruct((1, *sampler.tokenizer.image_size, sampler.tokenizer.channels), jnp.float32)
    shapes = {
        "generator": sampler.generator.param_shapes(sampler.tokenizer.width),
        "tokenizer": jax.eval_shape(sampler.tokenizer.init, jax.random.key(0), image),
    }
    inputs = (jax.random.key(0), jax.ShapeDtypeStruct((batch,), jnp.int32), Settings(*map(jnp.float32, Settings())), None)
    return round(type(sampler)._sample.lower(sampler, shapes, *inputs).cost_analysis()["flops"] / 1e12, 4)


def training(config, batch: int, args) -> dict:
    """One update of the generator, encoding included."""
    train = dataclasses.replace(config.model_train, batch_size=batch)
    config = dataclasses.replace(config, model_train=train)
    stages = {stage.name: stage for stage in config.recipe().stages}
    devices = benchmark.topology_devices(args.topology) if args.topology else None
    mesh = make_mesh(f"data={len(devices)}", devices) if devices is not None else make_mesh("data=1", jax.devices()[:1])
    size = config.data.image_size
    placed = NamedSharding(mesh, P("data"))
    batch_shapes = {
        "image": jax.ShapeDtypeStruct((batch, size, size, config.data.channels), jnp.uint8, sharding=placed),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=placed),
    }
    tokenizer_state = abstract_state(stages["tokenizer"], mesh, {})
    frozen = {"tokenizer": {"tokenizer": tokenizer_state.params["tokenizer"]}}
    stage = stages["generator"]
    state = abstract_state(stage, mesh, frozen)
    step = make_step(stage, mesh, frozen)
    row = describe("train step", config, batch, state.params)
    if args.topology:
        return row | benchmark.compile_report(step, state, batch_shapes, frozen)[1] | {"device": args.topology}
    compiled, report = benchmark.compile_report(step, state, batch_shapes, frozen)
    frozen, data = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), (frozen, batch_shapes))
    live = {"state": init_state(stage, jax.random.key(0), mesh, frozen)}

    def once():
        live["state"], metrics = compiled(live["state"], data, frozen)
        return metrics

    times = benchmark.measure(once, repeats=args.repeats)
    return row | report | times | {"images_per_s": batch / times["seconds"]}


def describe(what: str, config, batch: int, params) -> dict:
    """What a row is about."""
    size = sum(x.size for x in jax.tree.leaves(params))
    return {
        "what": f"VAR-d{config.model.depth} {what}",
        "pixels": config.data.image_size,
        "batch": batch,
        "dtype": config.model.dtype,
        "scan_layers": config.model.scan_layers,
        "parameters_M": round(size / 1e6, 1),
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    cli.run(main)
