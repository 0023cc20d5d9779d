"""AS-ARM (S109): a byte model that fills in any subset, its training on random subsets, and its claim."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.data.text import TextConfig, encode_bytes
from jaxgen.decoding.any_subset import reading_order
from jaxgen.generators.any_subset import AnySubsetModel, AnySubsetSampler
from jaxgen.objectives.any_subset import lattice_orders, places_ahead
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.claims import Claim, trained
from jaxgen.recipes.decoding_claims import held_out_prompts
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.language import LanguageConfig, LanguageModelConfig, LanguageTrainConfig, language_stage

__all__ = ["AnySubsetConfig", "DraftingConfig", "SubsetConfig", "any_subset_stage", "compare_drafters", "infill_sample"]


@dataclasses.dataclass(frozen=True)
class SubsetConfig:
    """What training hides.

    Attributes:
      hidden: range of the share of tokens that are hidden.
      start: both ends of that range at the first update; they reach `hidden` after `warmup` updates.
      warmup: updates; 0 starts with `hidden`.
      ahead: share of the queries that skip tokens, so that drafts are learnt, see `jaxgen.objectives.any_subset.places_ahead`.
    """

    hidden: tuple[float, ...] = (0.25, 0.95)
    start: float = 0.15
    warmup: int = 0
    ahead: float = 0.5

    def __post_init__(self):
        check_fields("subset", self, warmup=0, shares=("start", "ahead"))
        if len(self.hidden) != 2 or not 0 <= self.hidden[0] <= self.hidden[1] <= 1:
            raise ValueError(f"subset.hidden={self.hidden}: expected a range within [0, 1]")

    def range(self, step: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The share's range at an update."""
        way = jnp.minimum(1.0, step / self.warmup) if self.warmup else 1.0
        low, high = (self.start + (end - self.start) * way for end in self.hidden)
        return low, high


@dataclasses.dataclass(frozen=True)
class DraftingConfig:
    """How the sampler drafts and checks; see `AnySubsetSampler`."""

    drafts: int = 5
    drafter: str = "parallel"
    rule: str = "rejection"


@dataclasses.dataclass(frozen=True)
class AnySubsetConfig(LanguageConfig):
    """`LanguageConfig` of an any-subset model; the defaults have 0.65 million weights and windows of 65 bytes."""

    data: TextConfig = TextConfig(length=64)
    model: LanguageModelConfig = LanguageModelConfig(width=128, heads=4, depth=3)
    model_train: LanguageTrainConfig = LanguageTrainConfig(steps=400)
    subset: SubsetConfig = SubsetConfig()
    drafting: DraftingConfig = DraftingConfig()

    def build_model(self) -> AnySubsetModel:
        """The generator module."""
        return AnySubsetModel(**dataclasses.asdict(self.model) | dict(dtype=jnp.dtype(self.model.dtype)))

    def build_sampler(self) -> AnySubsetSampler:
        """From tokens and what of them is visible to tokens."""
        return AnySubsetSampler(model=self.build_model(), **dataclasses.asdict(self.drafting))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        sample = functools.partial(infill_sample, self.build_sampler())
        return Recipe(config=self, stages=(any_subset_stage(self),), sample=sample, modality="text")


def any_subset_stage(config: AnySubsetConfig) -> Stage:
    """Maximum likelihood of hidden tokens along random orders: the joint objective of Guo and Ermon (2025)."""
    model, settings = config.build_model(), config.subset

    def init(key, frozen):
        start = jnp.zeros((1, 4), jnp.int32)
        return {"generator": model.init(key, start, start, start)}, ()

    def measure(params, tokens, key, hidden, ahead: float):
        (b, length), (which, where) = tokens.shape, jax.random.split(key)
        order, known = lattice_orders(which, b, length, hidden)
        target, counts = places_ahead(where, known, length, furthest=config.drafting.drafts, share=ahead)
        content = jnp.take_along_axis(tokens, order, axis=1)
        logits = model.apply(params["generator"], content[:, :-1], order[:, :-1], jnp.take_along_axis(order, target, axis=1))
        nll = cross_entropy(logits, jnp.take_along_axis(content, target, axis=1))
        skips = target > jnp.arange(1, length)
        return _mean(nll, counts), _mean(nll, counts & ~skips), _mean(nll, counts & skips)

    def loss(params, state, batch, key, step, frozen):
        value, here, ahead = measure(params, batch["tokens"], key, settings.range(step), settings.ahead)
        return value, ({"nll": here, "nll_ahead": ahead}, state)

    def eval_loss(params, state, batch, key, frozen):
        value = measure(params, batch["tokens"], key, (0.5, 0.5), 0.0)[0]
        return {"loss": value, "nll": value}

    fields = dict(init=init, eval_loss=eval_loss)
    return language_stage("generator", model, config.data, config.model_train, loss=loss, **fields)


def _mean(x: Float[Array, "b l"], counts: Bool[Array, "b l"]) -> Float[Array, ""]:
    return jnp.where(counts, x, 0.0).sum() / jnp.maximum(counts.sum(), 1)


def infill_sample(
    sampler: AnySubsetSampler,
    params: Mapping[str, Any],
    key,
    prompts,
    *,
    length: int = 200,
    blank: str | bytes = "_",
    **settings,
) -> dict:
    """Fills in the blanks of prompts, strings or bytes, and continues them up to `length` bytes.

    Args:
      sampler: see `AnySubsetConfig.build_sampler`.
      params: by stage.
      key: of the call.
      prompts: each with at least one byte that is no blank.
      length: bytes of prompt and continuation.
      blank: the byte that stands for one to fill in; empty is none.
      **settings: of the sampler.

    Returns:
      "tokens" [b, length], "length" [b], "status" [b] and "row_calls" [b], calls of the model for drafts and to check them.

    Raises:
      ValueError: a prompt longer than `length` or of blanks alone, or a blank of several bytes.
    """
    given, lengths = encode_bytes(prompts)
    mark = blank.encode() if isinstance(blank, str) else blank
    if len(mark) > 1:
        raise ValueError(f"blank={blank!r}: expected one byte, or none")
    if given.shape[1] > length:
        raise ValueError(f"length={length}: a prompt has {given.shape[1]} bytes")
    tokens = np.zeros((len(given), length), np.int32)
    tokens[:, : given.shape[1]] = given
    visible = (np.arange(length) < lengths[:, None]) & (tokens != (mark[0] if mark else -1))
    result = sampler(modules(params), key, tokens, visible, **settings)
    return {
        "tokens": result.tokens,
        "length": np.full(len(given), length),
        "status": result.status,
        "row_calls": result.target_calls + result.draft_calls,
    }


def compare_drafters(
    config: AnySubsetConfig,
    *,
    windows: int,
    repeats: int,
    hidden: tuple[float, ...] = (0.5, 0.95),
    log: Callable[[str], None],
) -> Claim:
    """S109: calls and time to fill in held-out text, against one token at a time by the same model in the same order.

    Columns: calls of the model a window, for drafts and to check them; hidden tokens a call; medians over `repeats` of
    milliseconds a token, with their ratio to one at a time, for one window and for all; and, as the law is to be the same, what
    the model says of the tokens sampled, in nats a token; the first row of a share is the text itself.
    """
    _, params = trained(config, config.run.seed, log)
    variables, model = modules(params), config.build_model()
    one, k = AnySubsetSampler(model=model, drafts=0), config.drafting.drafts
    samplers = {
        "one token at a time": one,
        f"ASSD, k={k}": dataclasses.replace(one, drafts=k),
        f"ASSD, k={k}, coupled": dataclasses.replace(one, drafts=k, rule="coupled"),
        f"bigrams, k={k}": dataclasses.replace(one, drafts=k, drafter="bigrams"),
    }
    text = held_out_prompts(config.data, count=windows, length=config.data.length + 1)
    score = jax.jit(lambda *args: _nats(model, variables["generator"], *args))
    rows = []
    for share in hidden:
        visible = _subsets(*text.shape, share)
        order, known = reading_order(jnp.asarray(visible))
        seconds: dict[str, dict[int, list[float]]] = {name: {1: [], windows: []} for name in samplers}
        drafts, checks, nats = ({name: [] for name in samplers} for _ in range(3))
        for i in range(repeats + 1):
            for name, sampler in samplers.items():
                for rows_ in seconds[name]:
                    at = np.arange(rows_) if rows_ == windows else np.array([i % windows])
                    start = time.perf_counter()
                    result = jax.block_until_ready(sampler(variables, jax.random.key(i), text[at], visible[at]))
                    if i:
                        seconds[name][rows_].append((time.perf_counter() - start) / (~visible[at]).sum())
                if i:
                    drafts[name].append(float(result.draft_calls.mean()))
                    checks[name].append(float(result.target_calls.mean()))
                    nats[name].append(float(score(result.tokens, order, known)))
        tokens = float((~visible).sum(axis=1).mean())
        own = float(score(jnp.asarray(text), order, known))
        rows.append({"hidden": share, "method": "(the text itself)", "tokens": tokens, "nats a token": round(own, 3)})
        for name, taken in seconds.items():
            calls = statistics.fmean(drafts[name]) + statistics.fmean(checks[name])
            row = {"hidden": share, "method": name, "tokens": tokens, "calls": round(calls, 1)}
            row |= {"drafting calls": round(statistics.fmean(drafts[name]), 1), "tokens a call": round(tokens / calls, 2)}
            for batch, measured in taken.items():
                base = statistics.median(seconds["one token at a time"][batch])
                row[f"ms a token, batch {batch}"] = round(1e3 * statistics.median(measured), 3)
                row[f"speed-up, batch {batch}"] = round(base / statistics.median(measured), 2)
            rows.append(row | {"nats a token": round(statistics.fmean(nats[name]), 3)})
    notes = (
        "Calls are those of both passes; drafting calls are the first pass's. Places are filled from left to right. A round "
        "reads 3k + 3 vectors, one token at a time 2 a token: fewer calls take less time where a call costs what its weights "
        "cost to read, as on accelerators, not where it costs what its vectors cost to compute, as with a small model on a CPU."
    )
    return Claim("Any-subset speculative decoding: the joint law of one token at a time in fewer calls", rows, notes)


def _subsets(n: int, length: int, share: float) -> Bool[np.ndarray, "n l"]:
    """Which tokens of each window are visible: as many in each, at least one."""
    count = max(1, round((1 - share) * length))
    rank = np.argsort(np.random.default_rng(0).random((n, length)), axis=1)
    return np.argsort(rank, axis=1) < count


def _nats(model, variables, tokens, order, known):
    """Mean negative log-likelihood of the tokens that were filled in, along their order."""
    content = jnp.take_along_axis(tokens, order, axis=1)
    logits = model.apply(variables, content[:, :-1], order[:, :-1], order[:, 1:])
    return _mean(cross_entropy(logits, content[:, 1:]), jnp.arange(1, tokens.shape[1]) >= known[:, None])
