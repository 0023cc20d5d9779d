"""One stream of requests served in several ways (S038): one at a time, in static batches, in slots that are filled anew."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen.data.text import read_text
from jaxgen.decoding.server import Server
from jaxgen.decoding.transforms import Sampling
from jaxgen.generators.batched_sampler import BatchedSampler
from jaxgen.recipe import modules
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.drafted_claims import target_of
from jaxgen.recipes.serving import ServedConfig

__all__ = ["Arrival", "compare_serving", "serve", "stream"]


class Arrival(NamedTuple):
    """A request and when it arrives, in seconds."""

    at: float
    request: dict[str, Any]


def stream(
    config: ServedConfig, *, requests: int, gap: float, prompt: tuple[int, int], new: tuple[int, int], seed: int
) -> list[Arrival]:
    """Requests at exponential distances of `gap` seconds on average, with lengths uniform in ranges and mixed settings."""
    text, rng = read_text(config.data, "test"), np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(gap, requests))
    found = []
    for i in range(requests):
        length, start = rng.integers(prompt[0], prompt[1] + 1), rng.integers(len(text) - prompt[1])
        request = dict(
            prompt=text[start : start + length].astype(np.int32),
            key=jax.random.key(seed * requests + i),
            max_new=int(rng.integers(new[0], new[1] + 1)),
            settings=Sampling(temperature=rng.choice([0.7, 1.0]), top_p=rng.choice([0.9, 1.0])),
        )
        found.append(Arrival(float(at[i]), request))
    return found


class _Clock:
    """Seconds since it was made, and those that were skipped because nothing was to be done."""

    def __init__(self):
        self.start = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.start

    def skip_to(self, moment: float) -> None:
        self.start -= max(0.0, moment - self())


class Served(NamedTuple):
    """What became of a stream: seconds from start to end, latencies, and tokens of each request; model calls in all."""

    seconds: float
    latency: list[float]
    tokens: list[list[int]]
    calls: int


def serve(make: Callable[..., Server], arrivals: Sequence[Arrival], *, together: bool = False) -> Served:
    """Serves requests as they arrive.

    Args:
      make: `(clock=...) -> Server`, with a queue that is long enough.
      arrivals: in order.
      together: static batches: those that have arrived, as many as there are slots, start when the last batch is done.
    """
    clock = _Clock()
    server, pending = make(clock=clock), collections.deque(arrivals)
    batch = server.slots
    clock.start = time.perf_counter()
    while pending or server.waiting or server.running:
        idle = not server.waiting and not server.running
        if idle:
            clock.skip_to(pending[0].at)
        room = batch if together and idle else 0 if together else len(pending)
        while pending and pending[0].at <= clock() and room:
            server.submit(**pending.popleft().request)
            room -= 1
        server.step()
    outcomes = server.drain()
    latency = [outcomes[i].ended - arrival.at for i, arrival in enumerate(arrivals)]
    return Served(clock() - arrivals[0].at, latency, [outcomes[i].tokens for i in range(len(arrivals))], server.calls)


def compare_serving(
    config: ServedConfig,
    *,
    requests: int,
    prompt: tuple[int, int],
    new: tuple[int, int],
    seeds: int,
    log: Callable[[str], None],
) -> Claim:
    """Throughput and latency of one model under one stream of requests.

    Requests arrive as fast as all slots together could serve them if a call cost what it costs for one. All systems are the same
    compiled code and differ in when a request may start; they take turns, so that a machine that slows down slows all.

    Raises:
      ValueError: no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: expected at least 1")
    params, sampler = modules(target_of(config, log)), config.build_sampler()
    slots, longest = sampler.slots, prompt[1] + new[1]
    whole = dataclasses.replace(sampler, widths=())
    systems: Mapping[str, tuple[BatchedSampler, bool]] = {
        "one request at a time": (dataclasses.replace(whole, slots=1), False),
        f"static batches of {slots}": (whole, True),
        f"{slots} slots": (whole, False),
        f"{slots} slots, reordered": (sampler, False),
    }
    makers = {
        name: lambda sampler=sampler, **options: sampler.server(params, longest, queue=requests, **options)
        for name, (sampler, _) in systems.items()
    }
    options = dict(requests=requests, prompt=prompt, new=new)
    burst = stream(config, gap=1e-9, seed=seeds, **options)[:slots]
    for name, make in makers.items():
        log(f"compiling {name}")
        make().warm_up()
    gap = min(serve(makers["one request at a time"], burst).seconds for _ in range(2)) / len(burst) / slots
    measured: dict[str, list[Served]] = {name: [] for name in systems}
    for seed in range(seeds):
        arrivals = stream(config, gap=gap, seed=seed, **options)
        for name, (_, together) in systems.items():
            measured[name].append(serve(makers[name], arrivals, together=together))
            log(f"seed {seed}: {name}: {measured[name][-1].seconds:.2f} s")
    rows = [_row(name, served, measured) for name, served in measured.items()]
    best = max(float(str(row["speed-up"]).split()[0]) for row in rows[2:])
    notes = (
        f"{seeds} streams of {requests} requests, prompts of {prompt[0]} to {prompt[1]} and {new[0]} to {new[1]} new bytes, "
        f"one every {1e3 * gap:.2f} ms on average; mean (spread). The paper reports 11 to 16 times one at a time on GPUs, "
        f"where reading the weights bounds a call; here it is {best:.1f} times. {_same(measured)}"
    )
    return Claim("One model, one stream of requests, served in several ways", rows, notes)


def _row(name: str, served: list[Served], measured: Mapping[str, list[Served]]) -> dict:
    alone, static = (measured[other] for other in list(measured)[:2])

    def over(values):
        return claims.mean_and_spread([float(f"{value:.4g}") for value in values])

    made = [sum(map(len, one.tokens)) for one in served]
    return {
        "served": name,
        "tokens/s": over(tokens / one.seconds for tokens, one in zip(made, served)),
        "speed-up": over(base.seconds / one.seconds for base, one in zip(alone, served)),
        "against static": over(base.seconds / one.seconds for base, one in zip(static, served)),
        "model calls": over(one.calls for one in served),
        "tokens a call": over(tokens / one.calls for tokens, one in zip(made, served)),
        "latency s, mean": over(np.mean(one.latency) for one in served),
        "latency s, 95th percentile": over(np.percentile(one.latency, 95) for one in served),
    }


def _same(measured: Mapping[str, list[Served]]) -> str:
    """Whether the systems gave every request the same tokens."""
    runs = list(zip(*measured.values()))
    equal = sum(len({tuple(tokens) for tokens in request}) == 1 for run in runs for request in zip(*(one.tokens for one in run)))
    total = sum(len(run[0].tokens) for run in runs)
    return f"{equal} of {total} requests got the same tokens from all."
