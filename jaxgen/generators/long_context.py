"""Sampling behind long prompts (S095 TriForce): a drafter of fixed memory, the model with a sparse cache, the model itself."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.hierarchical import Hierarchical, Retrieved
from jaxgen.decoding.proposers import DraftModel
from jaxgen.decoding.sparse_cache import SinkCache, exposing
from jaxgen.decoding.topology import chain
from jaxgen.decoding.verify import Coupled, Rejection
from jaxgen.generators.sequence_sampler import stepper

__all__ = ["Exposing", "TriForce"]


@dataclasses.dataclass(frozen=True)
class Exposing:
    """A model whose steps say what they put into the cache, see `jaxgen.decoding.sparse_cache.exposing`: `TriForce`'s target.

    Attributes:
      model: a module with `step`, `init_cache` (a `KVCache`) and `vocab`, see `SequenceSampler.model`.
    """

    model: Any

    @property
    def vocab(self) -> int:
        """The model's."""
        return self.model.vocab

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """The model's."""
        return self.model.init_cache(batch, capacity)

    def apply(self, params, cache, view, cond=None, *, method: str):
        """`step` as of a module."""
        return exposing(stepper(self.model))(params, cache, view, cond)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriForce:
    """Three levels: a draft model with a `SinkCache` drafts for the target with a `RetrievalCache`, which drafts for the target.

    A method of a `SequenceSampler` whose model is `Exposing(target)`.

    Attributes:
      draft: the draft model, with `step` and `init_cache`.
      target: the target, not `Exposing`; it runs with the target's weights.
      length: tokens that the second level proposes.
      inner: tokens that the draft model proposes; the authors' is 1.
      sink, window: first and recent positions that the draft model sees.
      budget, chunk: positions of the prompt that the second level sees, selected in chunks.
      recent: last positions that it sees behind the prompt's whole chunks.
      coupled: all levels share the target's noise: the tokens are those of plain sampling.
      name, draft_name: of the variables.
    """

    draft: Any
    target: Any
    length: int = 6
    inner: int = 1
    sink: int = 16
    window: int = 234
    budget: int = 4096
    chunk: int = 8
    recent: int = 256
    coupled: bool = False
    name: str = "generator"
    draft_name: str = "draft"

    def __call__(self, params, prompt, max_length):
        b, reach = prompt.shape[0], max(self.length, self.inner) + 1
        # Within a round the drafter commits what is then rolled back, and stages what it reads.
        slack = 2 * reach
        drafter = DraftModel(
            stepper(self.draft),
            params[self.draft_name],
            SinkCache.like(self.draft.init_cache(b, 1), sink=self.sink, recent=self.window, slack=slack),
            None,
            prompt,
            chain(self.inner),
            coupled=self.coupled,
            reach=reach,
            chunk=slack,
        )
        middle = Retrieved(
            stepper(self.target),
            params[self.name],
            self.target.init_cache(b, 1),
            None,
            budget=self.budget,
            chunk=self.chunk,
            recent=self.recent,
            slack=self.length + self.inner + 1,
        )
        rule = Coupled() if self.coupled else Rejection()
        return Hierarchical(drafter, middle, self.length, rule, self.coupled), rule
