"""Measuring drafting again: selection among several drafts (S046), distilled drafts (S099), sparse caches (S095)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import config as config_lib
from jaxgen.decoding import KSeq, Rejection, View, chains
from jaxgen.decoding.sparse_cache import RetrievalCache, SinkCache
from jaxgen.generators.long_context import Exposing
from jaxgen.generators.sequence_sampler import Draft, Plain, SequenceSampler, stepper
from jaxgen.objectives.distillation import total_variation
from jaxgen.recipe import modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.decoding_claims import compare_samplers, held_out_prompts
from jaxgen.recipes.drafted import AlignedConfig, DraftedConfig, LongContextConfig
from jaxgen.recipes.language import LanguageConfig

__all__ = ["acceptances", "compare_alignment", "compare_caches", "compare_levels", "compare_selection", "target_of"]

# Bytes of a prompt, and the numbers of drafts whose exact acceptance is computed.
PROMPT, COUNTS = 32, (1, 2, 4, 8)


def target_of(config: LanguageConfig, log: Callable[[str], None]) -> dict[str, Any]:
    """The target's parameters by stage, trained with seed 0 and kept for other claims (`claims.reuse`)."""
    return claims.trained(config.plain(), 0, log)[1]


def compare_selection(
    config: DraftedConfig, *, paths: tuple[int, ...], prompts: int, new_tokens: int, repeats: int, log: Callable[[str], None]
) -> list[Claim]:
    """S046: one chain, and K-SEQ and recursive rejection of several; as tokens a call, and as exact probabilities."""
    _, params, _ = claims.train_all(config, 0, target_of(config, log), log)
    variables, model, draft = modules(params), config.build_model(), config.draft.build()
    length = config.drafting.length

    def sampler(method):
        return SequenceSampler(model=model, method=method)

    samplers = {"plain": sampler(Plain()), "one chain": sampler(Draft(draft, chains(1, length)))}
    for k in paths:
        topology = chains(k, length)
        samplers[f"{k} chains, K-SEQ"] = sampler(Draft(draft, topology, KSeq(), replacement=True))
        samplers[f"{k} chains, recursive"] = sampler(Draft(draft, topology, Rejection(), replacement=True))
    log("sampling")
    text = held_out_prompts(config.data, count=prompts, length=PROMPT)
    rows = compare_samplers(samplers, variables, text, new_tokens=new_tokens, repeats=repeats)
    tokens = {row["method"]: row["tokens a target call"] for row in rows}
    one, best = tokens["one chain"], max(tokens, key=tokens.get)
    notes = (
        f"Chains of {length} drafts. The most tokens a call: {best}, {tokens[best] / one:.2f} times those of one chain. On a CPU "
        "a call costs in proportion to its positions, so that more drafts need not be faster."
    )
    windows = held_out_prompts(config.data, count=prompts, length=config.data.length, seed=1)
    p, q = (jax.jit(m.apply)(variables[name], windows) for m, name in ((model, "generator"), (draft, "draft")))
    exact = [{"drafts": k} | {name: round(value, 4) for name, value in acceptances(p, q, k).items()} for k in COUNTS]
    return [
        Claim("Target calls of one draft model used in several ways", rows, notes),
        Claim("Probability that one of k drafts is accepted, mean over positions of held-out text", exact),
    ]


def acceptances(p: jax.Array, q: jax.Array, k: int) -> dict[str, float]:
    """The exact mean probabilities that one of k independent drafts from logits q [*b, v] stays under logits p.

    K-SEQ: 1 - (1 - beta)^k. Recursive rejection: 1 - prod_i TVD(p_i, q), p_1 = p and p_i+1 the residual of p_i. Any rule, at
    most: sum_x min(p(x), 1 - (1 - q(x))^k) (Sun et al. 2023, lemma 2: a token that was not drafted cannot stay).
    """
    p, q = (np.asarray(jax.nn.softmax(x, axis=-1), np.float64).reshape(-1, x.shape[-1]) for x in (p, q))
    low, high = np.ones(len(p)), np.full(len(p), float(k))
    for _ in range(60):
        rho = (low + high) / 2
        beta = np.minimum(q, p / rho[:, None]).sum(-1)
        fine = 1 - (1 - np.minimum(beta, 1)) ** k <= rho * beta
        low, high = np.where(fine, low, rho), np.where(fine, rho, high)
    beta = np.minimum(np.minimum(q, p / high[:, None]).sum(-1), 1)
    left, rejected = p, np.ones(len(p))
    for _ in range(k):
        residual = np.maximum(left - q, 0)
        mass = residual.sum(-1)
        rejected = rejected * mass
        left = np.where(mass[:, None] > 1e-12, residual / np.maximum(mass, 1e-12)[:, None], left)
    bound = np.minimum(p, 1 - (1 - q) ** k).sum(-1)
    means = {"K-SEQ": 1 - (1 - beta) ** k, "recursive": 1 - rejected, "bound": bound}
    return {name: float(value.mean()) for name, value in means.items()}


def compare_alignment(
    config: AlignedConfig,
    *,
    seeds: int,
    lengths: tuple[int, ...],
    prompts: int,
    new_tokens: int,
    repeats: int,
    log: Callable[[str], None],
) -> Claim:
    """S099: block efficiency (tokens a target call) of the draft model before and after as many updates with each loss.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    pretrained = DraftedConfig(**config_lib.fields_of(config, DraftedConfig))
    _, given, _ = claims.train_all(pretrained, 0, target_of(config, log), log)
    model, draft = config.build_model(), config.draft.build()
    samplers = {"plain": SequenceSampler(model=model)}
    samplers |= {f"{n} drafts": SequenceSampler(model=model, method=Draft(draft, chains(1, n))) for n in lengths}
    text = held_out_prompts(config.data, count=prompts, length=PROMPT)
    windows = held_out_prompts(config.data, count=4 * prompts, length=config.data.length, seed=1)
    target_logits = jax.jit(model.apply)(modules(given)["generator"], windows)
    draft_logits = jax.jit(draft.apply)

    def measure(params):
        variables = modules(params)
        kept = 1 - total_variation(draft_logits(variables["draft"], windows), target_logits).mean()
        measured = compare_samplers(samplers, variables, text, new_tokens=new_tokens, repeats=repeats)[1:]
        row = {"acceptance on text": float(kept)}
        for n, result in zip(lengths, measured):
            row[f"block efficiency, {n} drafts"] = result["tokens a target call"]
            row[f"speed-up, {n} drafts"] = result["speed-up, batch 1"]
        return row

    log("measuring the draft model before alignment")
    rows = [{"loss": "none"} | {name: round(value, 4) for name, value in measure(given).items()}]
    own = dataclasses.replace(config.align, sampled=False)
    losses = {
        "likelihood of the text, as many updates": dict(loss="likelihood", share=0.0),
        "KL": dict(loss="kl"),
        "TVD": dict(loss="tvd"),
        "TVD++": dict(loss="tvd++"),
        "TVD, sampled": dict(loss="tvd", sampled=True),
        "TVD++, sampled": dict(loss="tvd++", sampled=True),
    }
    for name, options in losses.items():
        system, measured = dataclasses.replace(config, align=dataclasses.replace(own, **options)), []
        for seed in range(seeds):
            log(f"{name}: seed {seed}")
            _, params, _ = claims.train_all(system, seed, given, log)
            measured.append(measure(params))
        rows.append({"loss": name} | {column: claims.mean_and_spread([m[column] for m in measured]) for column in measured[0]})
    notes = (
        f"{seeds} seeds; mean (spread). {config.align.steps} updates of the draft model after its own training; from 'KL' on, "
        f"{config.align.share:.0%} of each batch are the target's responses. Summed over the vocabulary, TVD++'s gradient is "
        "that of TVD times a number; sampled, its variance is lower."
    )
    return Claim("One draft model, aligned to its target with several losses", rows, notes)


def compare_levels(
    config: LongContextConfig, *, prompts: int, new_tokens: int, repeats: int, log: Callable[[str], None]
) -> Claim:
    """S095: plain sampling, two levels, and three, behind prompts that fill the context."""
    _, params, _ = claims.train_all(config, 0, target_of(config, log), log)
    model, sparse = config.build_model(), config.sparse
    draft = Draft(config.draft.build(), chains(1, sparse.length))
    samplers = {
        "plain": SequenceSampler(model=model),
        f"draft model, {sparse.length} drafts": SequenceSampler(model=model, method=draft),
        "TriForce": config.build_sampler(),
    }
    everything = dataclasses.replace(config.method(), budget=_whole_chunks(config, new_tokens))
    samplers["TriForce, all of the cache"] = SequenceSampler(model=Exposing(model), method=everything)
    log("sampling")
    length = config.context.length - new_tokens
    text = held_out_prompts(config.data, count=prompts, length=length)
    rows = compare_samplers(samplers, modules(params), text, new_tokens=new_tokens, repeats=repeats)
    notes = (
        f"Prompts of {length} bytes, read within the time; the second level sees {sparse.budget} selected and up to "
        f"{sparse.recent} recent positions, the draft model {sparse.sink + sparse.window}. The paper gains by reading less of a "
        "cache that is larger than the weights; here the weights are larger, so that a call of the second level costs nearly as "
        "much as the target's."
    )
    return Claim("Three levels of drafting behind long prompts", rows, notes)


def compare_caches(config: LongContextConfig, *, windows: int, new_tokens: int, log: Callable[[str], None]) -> Claim:
    """S095: how much of the target's law survives sparse caches of several sizes, read along held-out text.

    Both caches see as many positions: selected chunks and all that follows, or the first chunk and the most recent positions.
    """
    _, params, _ = claims.train_all(config, 0, target_of(config, log), log)
    model, variables = config.build_model(), modules(params)["generator"]
    length = config.context.length - new_tokens
    text = jnp.asarray(held_out_prompts(config.data, count=windows, length=config.context.length, seed=1))
    log("reading")
    full, cached, last = _read_prompt(model, variables, text, length)
    rows, chunk, lengths = [], config.sparse.chunk, jnp.full((windows,), length)
    for budget in sorted({chunk, 4 * chunk, config.sparse.budget, _whole_chunks(config, new_tokens)}):
        settings = dict(budget=budget, chunk=chunk, recent=chunk + new_tokens, slack=1)
        retrieved = RetrievalCache.select(cached.k, cached.v, last, lengths, **settings)
        first = SinkCache.like(model.init_cache(windows, 1), sink=chunk, recent=budget - chunk + new_tokens, slack=1)
        row = {"positions of the prompt": min(budget, length)}
        for name, cache, start in (("retrieved", retrieved, length), ("first and last", first, 0)):
            laws = _read_along(model, variables, cache, text, start)[:, length - start :]
            row[f"acceptance, {name}"] = round(float(1 - total_variation(laws, full).mean()), 4)
        rows.append(row)
    notes = f"1 - TVD to the full cache's law, mean over {new_tokens} bytes behind prompts of {length} bytes of held-out text."
    return Claim("What sparse caches keep of the target's law", rows, notes)


def _whole_chunks(config: LongContextConfig, new_tokens: int) -> int:
    """A budget for all of a prompt."""
    return -(-(config.context.length - new_tokens) // config.sparse.chunk) * config.sparse.chunk


def _read_prompt(model, variables, text, length: int):
    """(logits behind the prompts, what their reading put into the cache, the queries at their end)."""
    count, whole = text.shape
    view = View(text, jnp.arange(whole), jnp.tril(jnp.ones((whole, whole), bool)))
    step = jax.jit(lambda view: Exposing(model).apply(variables, model.init_cache(count, whole), view, method="step")[0])
    out = step(view)
    return out.params[:, length:], out.feats, out.feats.queries[:, :, length - 1]


def _read_along(model, variables, cache, text, start: int):
    """Logits after each token from `start` on, one token a step."""
    step = stepper(model)

    @jax.jit
    def read(cache, tokens):
        def one(cache, token):
            tokens, pos = token
            view = View(tokens[:, None], jnp.full((len(tokens), 1), pos), jnp.ones((1, 1), bool))
            out, cache = step(variables, cache, view, None)
            return cache.commit(jnp.ones((len(tokens),), jnp.int32)), out.params[:, 0]

        return jax.lax.scan(one, cache, (tokens.T, start + jnp.arange(tokens.shape[1])))[1].swapaxes(0, 1)

    return read(cache.commit(jnp.zeros((len(text),), jnp.int32)), text[:, start:])
