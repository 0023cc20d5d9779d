"""Measuring speculative captions (S132): one target, drafters that see the picture compressed in different ways."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxgen import config as config_lib
from jaxgen.data.digit_captions import END, DigitCaptions
from jaxgen.data.text import decode_bytes
from jaxgen.data.transforms import pixels
from jaxgen.decoding.topology import chain
from jaxgen.generators.sequence_sampler import Lookup
from jaxgen.generators.vision_language import Blind, PictureDraft, VisionLanguageSampler
from jaxgen.recipe import modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.spec_vlm import CaptionConfig, CompressorConfig, SpecVLMConfig

__all__ = ["compare_compressions", "held_out_pictures", "measure_captions", "picture_cost"]

QUESTION = "describe: "


def compare_compressions(config: SpecVLMConfig, *, seeds: int, count: int, log: Callable[[str], None]) -> Claim:
    """Tokens a target call and time, of drafters that read all visual tokens, a quarter of them, none, or what they choose.

    Besides: plain sampling, n-grams of the text, and a chain instead of the tree.

    Args:
      config: of the target, and of the elastic drafter.
      seeds: of the drafters.
      count: pictures, all asked to be described.
      log: takes progress lines.
    """
    base = CaptionConfig(**config_lib.fields_of(config, CaptionConfig))
    _, target = claims.trained(base, 0, log)
    target = {"generator": target["generator"]}
    levels = {
        "all": CompressorConfig(("keep",), 1),
        "1/4 pooled": CompressorConfig(("pool",), 2),
        "none": CompressorConfig(("drop",), 1),
        "elastic": config.compressor,
    }
    images, prompts, right = held_out_pictures(config, count)
    rows = []
    for seed in range(seeds):
        plain = VisionLanguageSampler(model=config.build_model(), stop=(ord(END),))
        samplers = {"plain": plain, "n-grams of the text": dataclasses.replace(plain, method=Blind(Lookup()))}
        params, pictures = modules(target), {}
        for name, compressor in levels.items():
            log(f"seed {seed}: visual tokens {name}")
            system = dataclasses.replace(config, compressor=compressor)
            _, trained, _ = claims.train_all(system, seed, target, log)
            label = f"drafter {name}"
            params[label] = modules(trained)["drafter"]
            method = _named(system.method(), label)
            samplers[f"tree, visual tokens: {name}"] = dataclasses.replace(plain, method=method)
            if name == "all":
                straight = dataclasses.replace(method.draft, topology=chain(config.tree.height))
                samplers["chain, visual tokens: all"] = dataclasses.replace(plain, method=PictureDraft(straight))
            read, shares, cost = picture_cost(plain, method, params, images, prompts)
            pictures[f"tree, visual tokens: {name}"] = {
                "visual tokens read": round(read, 1),
                "drafter's picture, us": round(cost),
                "ways": ", ".join(f"{way} {share:.2f}" for way, share in zip(compressor.ways, shares)),
            }
        for row in measure_captions(samplers, params, images, prompts, right, max_length=config.data.length):
            none = {"visual tokens read": "-", "drafter's picture, us": "-", "ways": "-"}
            rows.append({"seed": seed} | row | pictures.get(row["method"], none))
    notes = (
        f"{count} held-out pictures, {QUESTION!r}, temperature 1, until the text's end. 'Right' is the share of texts that equal "
        "the exact answer; all methods sample the same law. 'Drafter's picture' is the time in which a batch's visual tokens are "
        "compressed and read by the drafter."
    )
    return Claim("Speculative captions with compressed visual tokens", rows, notes)


def _named(method: PictureDraft, name: str) -> PictureDraft:
    return PictureDraft(dataclasses.replace(method.draft, name=name))


def held_out_pictures(
    config: SpecVLMConfig, count: int
) -> tuple[Float[np.ndarray, "n H W c"], Int[np.ndarray, "n p"], list[str]]:
    """(pictures, prompts, right answers) of the first held-out examples with the question."""
    data, images, texts = DigitCaptions(config.data, "test"), [], []
    for i in range(len(data)):
        example = data[i]
        text = decode_bytes(example["tokens"][None], example["length"][None])[0]
        if text.startswith(QUESTION):
            images.append(example["image"])
            texts.append(text)
        if len(images) == count:
            break
    prompts = np.tile(np.frombuffer(QUESTION.encode(), np.uint8).astype(np.int32), (len(images), 1))
    return np.asarray(pixels(np.stack(images))), prompts, texts


def measure_captions(
    samplers: Mapping[str, VisionLanguageSampler],
    params: Mapping[str, Any],
    images: Float[np.ndarray, "n H W c"],
    prompts: Int[np.ndarray, "n p"],
    right: list[str],
    *,
    max_length: int,
    repeats: int = 3,
) -> list[dict]:
    """A row for each sampler: tokens a target call, share of right texts, and milliseconds a token of all pictures as a batch and
    of one alone, with their ratio to the first sampler's. The samplers take turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for i in range(repeats + 1):
        for name, sampler in samplers.items():
            column = found.setdefault(name, {"tokens": [], "right": [], "ms": [], "ms alone": []})
            for batch, label in ((len(images), "ms"), (1, "ms alone")):
                start = time.perf_counter()
                result = sampler(params, jax.random.key(i), images[:batch], prompts[:batch], max_length=max_length)
                made = int(np.asarray(result.length).sum()) - prompts[:batch].size
                if i:
                    column[label].append(1e3 * (time.perf_counter() - start) / made)
                if i and batch > 1:
                    column["tokens"].append(made / int(result.row_calls.sum()))
                    texts = decode_bytes(result.tokens, result.length)
                    column["right"].append(statistics.fmean(a == b for a, b in zip(texts, right)))
    rows, first = [], None
    for name, column in found.items():
        times = {label: statistics.median(column[label]) for label in ("ms", "ms alone")}
        first = first or times
        row = {"method": name, "tokens a target call": round(statistics.fmean(column["tokens"]), 3)}
        row["right"] = round(statistics.fmean(column["right"]), 3)
        for label, what in (("ms alone", "batch 1"), ("ms", f"batch {len(images)}")):
            row[f"ms a token, {what}"] = round(times[label], 4)
            row[f"speed-up, {what}"] = round(first[label] / times[label], 2)
        rows.append(row)
    return rows


def picture_cost(
    sampler: VisionLanguageSampler, method: PictureDraft, params, images, prompts, repeats: int = 5
) -> tuple[float, list[float], float]:
    """(mean number of visual tokens that a drafter reads, how often each way is taken, median microseconds in which all pictures
    are compressed and read)."""

    @jax.jit
    def read(params, seen):
        proposer, _ = method(params, prompts, prompts.shape[1], seen)
        return proposer.drafter.cache, method.look(params, prompts, seen).gates.mean(0)

    seen, _ = jax.jit(sampler.see)(params, images)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        cache, shares = jax.block_until_ready(read(params, seen))
        seconds.append(time.perf_counter() - start)
    return float(cache.length.mean()), shares.tolist(), 1e6 * statistics.median(seconds[1:])
