"""Clips as a Llama's language: how many of its samples are clips, with and without their grammar, and how good, against codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from jaxgen.data import pixels
from jaxgen.metrics import detail
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims
from jaxgen.recipes.byte_clips import ByteClipConfig, ClipCodecConfig
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.clip_tokens import ClipLlamaConfig
from jaxgen.recipes.evaluation import held_out, sample_outputs

__all__ = ["MOST_PIXELS", "compare_clips", "in_pixels"]

BATCH = 50  # clips that are sampled at once
MOST_PIXELS = 1024  # bytes of a clip up to which those of its pixels are compared


def in_pixels(config: ByteClipConfig) -> ByteClipConfig:
    """The same model and training on the bytes of pixels, of which there are as many as numbers."""
    codec = ClipCodecConfig(kind="pixels", length=int(np.prod(config.build_codec().shape)))
    return dataclasses.replace(config, codec=codec)


def compare_clips(
    config: ByteClipConfig, codes: ClipLlamaConfig, *, seeds: int, samples: int, log: Callable[[str], None]
) -> Claim:
    """H.264 bytes with and without their grammar, the codes of frames, and small clips' pixels, on the same Llama.

    Args:
      config: of H.264 streams.
      codes: of the VQ baseline; its data, model and training are those of `config`.
      seeds: trainings of each.
      samples: clips of each training that are judged.
      log: takes progress lines.
    """
    free, raw = dataclasses.replace(config, constrained=False), in_pixels(config)
    systems = {"S016 AVC-LM": config, "S016 AVC-LM, unconstrained": free, "codes of a VQ tokenizer of frames": codes}
    if raw.codec.length <= MOST_PIXELS:
        systems["bytes of pixels"] = raw
    real = np.concatenate([batch["image"] for batch in held_out(config.data, batch_size=BATCH, limit=1000)])
    real_detail = _detail(np.asarray(pixels(real)))
    claim = claims.compare_generators(
        systems,
        seeds=seeds,
        samples=samples,
        log=log,
        each=lambda recipe, params, seed: _sampled(recipe, params, seed, samples, real_detail),
        same_weights={"S016 AVC-LM, unconstrained": "S016 AVC-LM"},
        title="A Llama on H.264 bytes, with and without their grammar, against the same on codes; equal blocks, data and updates",
    )
    codec = config.build_codec()
    size = np.mean([len(codec.encode(clip)) for clip in real[:100]])
    notes = (
        "`valid`: FFmpeg decodes all pictures and finds no error; `opens`: a reader shows all pictures, and makes up what it "
        f"cannot decode. Real clips take {size:.1f} bytes. Detail is the mean squared difference of neighbouring pixels, as a "
        "share of the real clips'. Samples that are not valid count as grey clips in all measures. An image is a clip here."
    )
    return claim._replace(notes=f"{claim.notes} {notes}")


def _sampled(recipe: Recipe, params: dict, seed: int, samples: int, real_detail: float) -> dict:
    """What is to be known of samples, whose classes come in turn."""
    labels, files = np.arange(samples, dtype=np.int32) % recipe.config.num_classes, isinstance(recipe.config, ByteClipConfig)
    names, key = ("clips", "tokens", "valid") if files else ("clips",), jax.random.key(seed)
    out = sample_outputs(recipe, params, key, labels, names=names, batch_size=min(BATCH, samples), cfg=0.0)
    row = {"detail, share of real": _detail(out["clips"]) / real_detail}
    row["test nats a token"] = claims.test_nats(recipe, params)
    if not files or not recipe.config.build_grammar():
        return row
    tokenizer = recipe.config.build_tokenizer()
    streams = [tokenizer.file(tokens) for tokens in out["tokens"]]
    return row | {
        "valid": float(np.mean(out["valid"])),
        "opens": float(np.mean([tokenizer.codec.opens(tokenizer.codec.file(data)) for data in streams])),
        "bytes a clip": float(np.mean([*map(len, streams)])),
    }


def _detail(clips: np.ndarray) -> float:
    return detail(clips.reshape(-1, *clips.shape[2:]))
