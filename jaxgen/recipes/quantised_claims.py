"""Measuring what 4-bit weights cost and save (S137): one generator in several precisions, and one layer alone."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import config as config_lib
from jaxgen.adapters import int4_layers, kernel_bytes, unstack_layers
from jaxgen.data import pixels
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.recipe import modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.evaluation import evaluate_images, held_out
from jaxgen.recipes.next_scale import NextScaleConfig
from jaxgen.recipes.quantised import QuantisedConfig, int4_stage, packed_generator
from kernels_pallas import explain
from kernels_pallas.int4 import int4_matmul, pack_int4

__all__ = ["compare_precisions", "layer_speed"]


def compare_precisions(
    config: QuantisedConfig, *, seeds: int, samples: int, batches: tuple[int, ...], log: Callable[[str], None]
) -> Claim:
    """One generator with bfloat16 weights, weights rounded to nearest, and GPTQ's: likelihood, agreement, samples, bytes, time.

    Each row holds means over the seeds, which share a tokenizer and a judge. Agreement is the share of test tokens whose most
    likely value, given the true scales before it, is that of the float32 weights. Samples are without guidance and truncation.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    config = dataclasses.replace(config, int4=dataclasses.replace(config.int4, method="gptq"))
    measured, shared = {}, {}
    for seed in range(seeds):
        log(f"seed {seed}")
        recipe, params, _ = claims.train_all(config, seed, shared, log)
        shared = {name: params[name] for name in ("tokenizer", "classifier") if name in params}
        for name, (system, weights) in _precisions(recipe.config, params).items():
            log(f"seed {seed}: measuring {name}")
            row = _quality(system.recipe(), weights, params, seed, samples)
            measured.setdefault(name, []).append(row)
    rows, timed = [], []
    for name, (system, weights) in _precisions(recipe.config, params).items():
        row = {"weights": name} | _traffic(weights)
        for column in measured[name][0]:
            row[column] = claims.mean_and_spread([m[column] for m in measured[name]])
        rows.append(row)
        timed.append((system.recipe(), weights))
    claims.add_times(rows, timed, batches)
    baseline, best = rows[0]["MB a model call"], rows[-1]["MB a model call"]
    notes = (
        f"{seeds} seeds; mean (spread). A model call reads {baseline / best:.2f} times fewer bytes of weights than in bfloat16; "
        f"computed on {jax.devices()[0].device_kind} by {_implementation()!r}."
    )
    return Claim("One generator, its weights in three precisions", rows, notes)


def layer_speed(*, size: int, rows: tuple[int, ...], log: Callable[[str], None], repeats: int = 11) -> Claim:
    """x w for a square w in bfloat16 and in 4 bits, groups of 128 (the paper's figure 1): bytes, and median seconds."""
    keys = jax.random.split(jax.random.key(0))
    w = jax.random.normal(keys[0], (size, size), jnp.bfloat16) * size**-0.5
    packed = pack_int4(w, group=128)
    dense, int4 = jax.jit(jnp.matmul), jax.jit(int4_matmul)
    table = []
    for m in rows:
        log(f"layer of {size} x {size}, {m} rows")
        x = jax.random.normal(keys[1], (m, size), jnp.bfloat16)
        traffic = [2 * m * size * 2 + weights for weights in (w.nbytes, packed.nbytes)]
        seconds = [_median_seconds(fn, x, weights, repeats) for fn, weights in ((dense, w), (int4, packed))]
        table.append(
            {
                "rows": m,
                "bf16 MB": round(traffic[0] / 1e6, 2),
                "int4 MB": round(traffic[1] / 1e6, 2),
                "bytes ratio": round(traffic[0] / traffic[1], 2),
                "bf16 ms": round(1e3 * seconds[0], 3),
                "int4 ms": round(1e3 * seconds[1], 3),
                "speedup": round(seconds[0] / seconds[1], 3),
            }
        )
    device = jax.devices()[0]
    notes = f"Measured on {device.device_kind} by {_implementation()!r}. Where bytes are the limit, their ratio is the speedup."
    if device.platform == "cpu":
        notes += " This is a CPU, which has no kernel of its own: weights are unpacked by XLA, and time is arithmetic, not bytes."
    return Claim(f"One layer of {size} x {size}", table, notes)


def _precisions(config: QuantisedConfig, params: Mapping[str, Any]) -> dict[str, tuple[NextScaleConfig, dict]]:
    """(system, parameters by stage) of every row."""
    plain = NextScaleConfig(**config_lib.fields_of(config, NextScaleConfig))
    rtn = dataclasses.replace(config, int4=dataclasses.replace(config.int4, method="rtn"))
    nearest, _ = jax.jit(int4_stage(rtn).init)(jax.random.key(0), params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), params["generator"])
    floats = {name: value for name, value in params.items() if name != "int4"}
    group = f"4 bits, groups of {config.int4.group_size}"
    return {
        "bfloat16": (plain, floats | {"generator": half}),
        f"{group}, nearest": (rtn, dict(params) | {"int4": nearest}),
        f"{group}, GPTQ": (config, dict(params)),
    }


def _variables(weights: Mapping[str, Any]):
    """The generator's, unrolled, packed where there are 4-bit weights."""
    by_module = modules(weights)
    if "int4" in by_module:
        return packed_generator(by_module["generator"], by_module["int4"])
    return unstack_layers(by_module["generator"])


def _traffic(weights) -> dict[str, float]:
    count = sum(x.size for x in jax.tree.leaves(modules(weights)["generator"]))
    size = kernel_bytes(_variables(weights))
    return {"MB a model call": round(size["total"] / 1e6, 4), "bits a weight": round(8 * size["total"] / count, 2)}


def _quality(recipe, weights, params, seed: int, samples: int) -> dict[str, float]:
    settings = dict(cfg=0.0, top_k=0, top_p=0.0)
    result, _ = evaluate_images(recipe, weights, jax.random.key(seed), num=samples, batch_size=100, settings=settings)
    reference = _variables({name: params[name] for name in ("tokenizer", "generator")})
    nll, agreement = _likelihood(recipe.config, modules(params)["tokenizer"], _variables(weights), reference)
    row = {"test nll": nll, "agreement": agreement}
    if "class_accuracy" in result["generation"]:
        row |= {"class accuracy": result["generation"]["class_accuracy"], "Frechet": result["generation"]["frechet"]}
    return row


def _likelihood(config: NextScaleConfig, tokenizer_variables, variables, reference) -> tuple[float, float]:
    """Nats a test token, and the share of tokens on whose most likely value two sets of weights agree."""
    tokenizer, generator = config.build_tokenizer(), config.build_generator().clone(scan_layers=False)

    @jax.jit
    def one(variables, reference, images, labels):
        tokens = tokenizer.apply(tokenizer_variables, images, method="encode")
        inputs = config.teacher_inputs(tokenizer, tokenizer_variables, tokens)
        with int4_layers():
            logits = generator.apply(variables, labels, inputs)
        same = logits.argmax(-1) == generator.apply(reference, labels, inputs).argmax(-1)
        return cross_entropy(logits, tokens).mean(-1), same.mean(-1)

    test = held_out(config.data, batch_size=128, limit=10_000)
    found = [one(variables, reference, pixels(batch["image"]), batch["label"]) for batch in test]
    nll, same = (np.concatenate(column) for column in zip(*found))
    return float(nll.mean()), float(same.mean())


def _implementation() -> str:
    x = jnp.ones((16, 1024), jnp.bfloat16)
    return explain(int4_matmul, x, pack_int4(jnp.ones((1024, 128)), group=128))[0].implementation


def _median_seconds(fn, x, w, repeats: int) -> float:
    fn(x, w).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn(x, w).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
