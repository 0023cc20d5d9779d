"""Clips as a Llama's language: how many of its samples a decoder reads without an error, with and without their grammar."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data import pixels
from jaxgen.metrics import psnr
from jaxgen.recipes import claims
from jaxgen.recipes.byte_clips import ByteClipConfig
from jaxgen.recipes.claims import Claim

__all__ = ["judge_clips"]

BATCH = 50  # clips that are sampled at once


def judge_clips(config: ByteClipConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """The share of samples that are clips, with and without the grammar, of the same weights; and what the codec keeps.

    Args:
      config: of H.264 streams.
      seeds: trainings.
      samples: clips of each training that are judged.
      log: takes progress lines.

    Raises:
      ValueError: no seeds, or no samples.
    """
    for name, value in (("seeds", seeds), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    systems = {"S016 AVC-LM": True, "S016 AVC-LM, unconstrained": False}
    measured: dict[str, list[dict]] = {name: [] for name in systems}
    for seed in range(seeds):
        log(f"S016 AVC-LM: seed {seed}")
        _, params, metrics = claims.train_all(config, seed, {}, log)
        nats = {"test nats a clip": metrics["generator"]["nll_image"], "test nats a token": metrics["generator"]["nll"]}
        for name, constrained in systems.items():
            measured[name].append(nats | _sampled(dataclasses.replace(config, constrained=constrained), params, seed, samples))
    kept = _kept(config)
    rows = []
    for name, found in measured.items():
        means = {column: claims.mean_and_spread([row[column] for row in found]) for column in found[0]}
        rows.append({"system": name, **means, **kept})
    notes = (
        f"{seeds} seeds, {samples} samples of each; mean (spread). `valid`: FFmpeg decodes all pictures and finds no error; "
        "`opens`: a reader shows all pictures, and makes up what it cannot decode. PSNR is of test clips after the codec."
    )
    return Claim("A Llama on H.264 bytes: samples that are clips, with the grammar and without it", rows, notes)


def _sampled(config: ByteClipConfig, params: dict, seed: int, samples: int) -> dict:
    """What is to be known of samples, whose classes come in turn."""
    recipe, tokenizer = config.recipe(), config.build_tokenizer()
    codec, files, valid = tokenizer.codec, [], []
    for i in range(0, samples, BATCH):
        labels = np.arange(i, i + BATCH, dtype=np.int32) % config.num_classes
        out = recipe.sample(params, jax.random.fold_in(jax.random.key(seed), i), labels, cfg=0.0)
        files += [tokenizer.file(row) for row in np.asarray(out["tokens"])]
        valid += np.asarray(out["valid"]).tolist()
    files, valid = files[:samples], valid[:samples]
    return {
        "valid": float(np.mean(valid)),
        "opens": float(np.mean([codec.opens(codec.file(data)) for data in files])),
        "bytes a clip": float(np.mean([len(data) for data in files])),
    }


def _kept(config: ByteClipConfig, limit: int = 100) -> dict:
    """What the codec does to test clips."""
    codec, source = config.build_codec(), config.data.source("test")
    clips = [source[i]["clip"] for i in range(min(limit, len(source)))]
    files = [codec.encode(clip) for clip in clips]
    real, again = (pixels(jnp.asarray(np.concatenate(x))) for x in (clips, [*map(codec.decode, files)]))  # pictures
    return {
        "bytes a real clip": round(float(np.mean([*map(len, files)])), 1),
        "PSNR of the codec": round(float(psnr(real, again).mean()), 2),
    }
