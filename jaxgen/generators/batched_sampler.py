"""Continuing prompts by continuous batching: a server of slots around a model with a step function."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen.decoding.batcher import Batcher
from jaxgen.decoding.server import Server
from jaxgen.decoding.speculate import Result
from jaxgen.decoding.transforms import Sampling
from jaxgen.generators.sequence_sampler import SequenceSampler, stepper

__all__ = ["BatchedSampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchedSampler(SequenceSampler):
    """`SequenceSampler` whose prompts take turns in a fixed number of slots (S038 Flover); used like it, with the same tokens.

    Any number of prompts shares one compiled step, and a prompt may have any length below `max_length`. `method` must draft
    without a look at the prompts, as `Plain` and `Lookup` do.

    Attributes:
      slots: requests that share a model call.
      chunk: see `Batcher`.
      steps: see `Server`.
      widths: see `Server`.
    """

    slots: int = 8
    chunk: int = 32
    steps: int = 8
    widths: tuple[int, ...] = ()

    def server(self, params: Mapping[str, Any], max_length: int, **options) -> Server:
        """A server for requests of up to `max_length` tokens; `options` are those of `Server`."""
        proposer, rule = self.method(params, np.zeros((1, 1), np.int32), max_length)
        batcher = Batcher(
            step=self._step,
            max_length=max_length,
            chunk=self.chunk,
            stops=max(4, len(self.stop)),
            proposer=proposer,
            rule=rule,
        )
        cache = self.model.init_cache(self.slots, batcher.capacity)
        return Server(batcher, params[self.name], cache, **{"steps": self.steps, "widths": self.widths} | options)

    @functools.cached_property
    def _step(self):
        step = stepper(self.model)  # one for all servers: another function would compile anew
        return self.wrap(step) if self.wrap else step

    def _sample(self, params, key, prompt, length, max_length, settings) -> Result:
        sampling = Sampling(*(x.item() for x in settings))
        server = self.server(params, max_length, queue=max(1, len(prompt)))
        for i, (row, n) in enumerate(zip(prompt, np.asarray(length))):
            server.submit(row[:n], key=key, row=i, stop=self.stop, settings=sampling)
        outcomes = server.drain()
        tokens = np.zeros((len(prompt), max_length), np.int32)
        lengths = np.array(length)
        for i, outcome in outcomes.items():
            made = [*prompt[i, : lengths[i]], *outcome.tokens]
            tokens[i, : len(made)], lengths[i] = made, len(made)
        ended = [outcomes[i] for i in range(len(prompt))]
        status, calls = (np.array([getattr(one, name) for one in ended], np.int32) for name in ("status", "calls"))
        return Result(tokens, lengths, status, np.int32(server.calls), calls)
