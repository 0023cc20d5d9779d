"""What decoding costs on this machine: plain cached sampling against each method, the loop's own overhead, and PyTorch."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.decoding import Coupled, Jacobi, KSeq, KVCache, Out, Rejection, Sequential, branches, chain, chains, speculate
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import Draft, Lookup, Plain, SequenceSampler

__all__ = ["bench", "byte_model", "loop_overhead", "torch_sampler"]

PROMPT = 16
TORCH = "PyTorch, plain"


def byte_model(size: str = "25m") -> LanguageModel:
    """The byte model that is sampled from: "25m" weights, or "small" for a quick look."""
    sizes = {"25m": dict(width=512, heads=8, depth=8), "small": dict(width=64, heads=2, depth=2)}
    if size not in sizes:
        raise ValueError(f"size {size!r} is not one of {', '.join(sizes)}")
    return LanguageModel(vocab=256, **sizes[size])


@dataclasses.dataclass(frozen=True)
class _Window:
    """`Jacobi` as a method of `SequenceSampler`."""

    length: int

    def __call__(self, params, prompt, max_length):
        return Jacobi(self.length), Rejection()


def methods(draft: LanguageModel) -> dict[str, Any]:
    """The methods that need nothing but a second model at most."""
    return {
        "plain": Plain(),
        "n-gram, 4 drafts": Lookup(4, 2),
        "Jacobi, 8 drafts": _Window(8),
        "draft, 4": Draft(draft, chain(4)),
        "draft, 4, coupled": Draft(draft, chain(4), Coupled(), coupled=True),
        "draft, tree 3x2": Draft(draft, branches((3, 2))),
        "K-SEQ, 3 x 3": Draft(draft, chains(3, 3), KSeq(), replacement=True),
    }


def bench(*, size: str, batches: tuple[int, ...], new_tokens: int, repeats: int, only: str = "") -> Iterator[dict]:
    """A row for each method and batch, measured in turns: milliseconds a token and a target call, tokens a call, compile seconds.

    Weights are random: the milliseconds a call are those of trained models, the tokens a call are not (the claims measure those).
    PyTorch's row is an equally sized model with a key/value cache of fixed size, where torch is installed.
    """
    model, draft = byte_model(size), LanguageModel(vocab=256, width=64, heads=2, depth=1)
    start = jnp.zeros((1, 4), jnp.int32)
    params = {"generator": jax.jit(model.init)(jax.random.key(0), start), "draft": jax.jit(draft.init)(jax.random.key(1), start)}
    runs = {name: SequenceSampler(model=model, method=method) for name, method in methods(draft).items() if only in name}
    for batch in batches:
        prompt = np.random.default_rng(0).integers(0, 256, (batch, PROMPT)).astype(np.int32)
        made: dict[str, Callable[[int], tuple[float, int]] | str]
        made = {name: _timed(sampler, params, prompt, new_tokens) for name, sampler in runs.items()}
        if only in TORCH:
            made[TORCH] = torch_sampler(params["generator"], model, prompt, new_tokens)
        rows = {name: {"method": name, "batch": batch} for name in made}
        for name, run in made.items():
            rows[name] |= {"not run": run} if isinstance(run, str) else {"compile s": round(run(0)[0], 1)}
        measured: dict[str, list] = {name: [] for name, run in made.items() if not isinstance(run, str)}
        for i in range(1, repeats + 1):
            for name, values in measured.items():
                values.append(made[name](i))
        for name, values in measured.items():
            seconds = statistics.median(s for s, _ in values)
            calls = statistics.fmean(c for _, c in values)
            rows[name] |= {
                "ms a token": round(1e3 * seconds / new_tokens, 3),
                "ms a call": round(1e3 * seconds / calls, 3),
                "tokens a call": round(new_tokens / calls, 2),
            }
        yield from rows.values()


def _timed(sampler, params, prompt, new_tokens) -> Callable[[int], tuple[float, int]]:
    def run(seed):
        start = time.perf_counter()
        result = sampler(params, jax.random.key(seed), prompt, max_length=PROMPT + new_tokens)
        jax.block_until_ready(result.tokens)
        return time.perf_counter() - start, int(result.calls)

    return run


def loop_overhead(*, batches: tuple[int, ...], steps: int = 1000, repeats: int = 5, vocab: int = 256) -> Iterator[dict]:
    """Microseconds a step of the loop around a step function that does nothing, by drafts."""

    def step(params, cache, view, cond):
        return Out(jnp.broadcast_to(params, (*view.tokens.shape, vocab))), cache

    for batch in batches:
        for name, proposer in (("no drafts", Sequential()), ("Jacobi, 4 drafts", Jacobi(4))):

            @jax.jit
            def run(key, proposer=proposer, batch=batch):
                cache = KVCache.zeros(layers=1, batch=batch, capacity=steps + 16, heads=1, head_size=1)
                prompt, law = jnp.zeros((batch, 1), jnp.int32), jnp.zeros((vocab,))
                given = dict(params=law, cache=cache, cond=None, prompt=prompt, max_length=steps + 1, key=key)
                return speculate(step, proposer, Rejection(), **given)

            began = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(0)))
            compile_s, seconds = time.perf_counter() - began, []
            for i in range(repeats):
                began = time.perf_counter()
                result = jax.block_until_ready(run(jax.random.key(i)))
                seconds.append((time.perf_counter() - began) / int(result.calls))
            row = {"method": f"loop alone, {name}", "batch": batch, "compile s": round(compile_s, 1)}
            yield row | {"us a call": round(1e6 * statistics.median(seconds), 1)}


def torch_sampler(variables, model: LanguageModel, prompt, new_tokens: int) -> Callable[[int], tuple[float, int]] | str:
    """The same weights sampled by PyTorch, a call a token, with a key/value cache of fixed size; or why not."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    functional = torch.nn.functional
    p = jax.tree.map(lambda x: torch.from_numpy(np.array(x)), variables["params"])
    batch, capacity = len(prompt), PROMPT + new_tokens
    heads, size = model.heads, model.width // model.heads
    rates = model.theta ** (-torch.arange(0, size, 2) / size)
    blocks = []
    for i in range(model.depth):
        block = p["transformer"][f"blocks_{i}"]
        qkv = block["attention"]["qkv"]["kernel"]  # [d, h, 3, k]
        blocks.append(
            {
                "qkv": qkv.transpose(1, 2).reshape(model.width, -1).T.contiguous(),
                "o": block["attention"]["o"]["kernel"].reshape(-1, model.width).T.contiguous(),
                "w13": block["mlp"]["w13"]["kernel"].reshape(model.width, -1).T.contiguous(),
                "w2": block["mlp"]["w2"]["kernel"].T.contiguous(),
                "norm1": block["attention_norm"]["scale"],
                "norm2": block["mlp_norm"]["scale"],
            }
        )
    head = p["head"]["kernel"].T.contiguous()

    def turn(x, pos):
        angle = pos[:, None] * rates
        cos, sin = torch.cos(angle)[None, None], torch.sin(angle)[None, None]
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def forward(ids, start, caches):
        x, length = p["embed"]["embedding"][ids], ids.shape[1]
        pos = torch.arange(start, start + length)
        for block, (keys, values) in zip(blocks, caches):
            h = functional.rms_norm(x, (model.width,), block["norm1"], 1e-5)
            parts = functional.linear(h, block["qkv"]).view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)
            keys[:, :, start : start + length] = turn(parts[1], pos)
            values[:, :, start : start + length] = parts[2]
            seen = keys[:, :, : start + length], values[:, :, : start + length]
            out = functional.scaled_dot_product_attention(turn(parts[0], pos), *seen, is_causal=length > 1)
            x = x + functional.linear(out.transpose(1, 2).reshape(batch, length, -1), block["o"])
            gate, up = functional.linear(functional.rms_norm(x, (model.width,), block["norm2"], 1e-5), block["w13"]).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, block["w2"])
        return functional.linear(functional.rms_norm(x[:, -1], (model.width,), p["norm"]["scale"], 1e-5), head)

    def run(seed):
        began = time.perf_counter()
        with torch.inference_mode():
            torch.manual_seed(seed)
            caches = [tuple(torch.zeros(batch, heads, capacity, size) for _ in "kv") for _ in blocks]
            ids, start = torch.from_numpy(np.asarray(prompt)).long(), 0
            for _ in range(new_tokens):
                logits = forward(ids, start, caches)
                start += ids.shape[1]
                ids = torch.multinomial(torch.softmax(logits, dim=-1), 1)
        return time.perf_counter() - began, new_tokens

    def logits(ids):
        with torch.inference_mode():
            caches = [tuple(torch.zeros(batch, heads, capacity, size) for _ in "kv") for _ in blocks]
            return forward(torch.from_numpy(np.asarray(ids)).long(), 0, caches).numpy()

    run.logits = logits
    return run
