"""Language models that serve many requests at a time (S038): `LanguageConfig` with slots."""

from __future__ import annotations

import dataclasses

from jaxgen.generators.batched_sampler import BatchedSampler
from jaxgen.generators.sequence_sampler import Lookup, Method, Plain
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.language import LanguageConfig

__all__ = ["ServedConfig", "ServingConfig"]


@dataclasses.dataclass(frozen=True)
class ServingConfig:
    """How requests share model calls.

    Attributes:
      slots: requests in one call.
      steps: decoding steps between two looks at the queue.
      chunk: prompt tokens that are read at once.
      narrow: smaller numbers of slots to run with when there is little to do.
      lookup: tokens that are drafted from repeated n-grams; 0 is plain sampling.
    """

    slots: int = 8
    steps: int = 8
    chunk: int = 32
    narrow: tuple[int, ...] = (1, 2, 4)
    lookup: int = 0

    def __post_init__(self):
        check_fields("serving", self, slots=1, steps=1, chunk=1, lookup=0)
        if any(not 1 <= width <= self.slots for width in self.narrow):
            raise ValueError(f"serving.narrow={self.narrow}: expected numbers in 1..slots={self.slots}")


@dataclasses.dataclass(frozen=True)
class ServedConfig(LanguageConfig):
    """`LanguageConfig` whose sampler is a server."""

    serving: ServingConfig = ServingConfig()

    def method(self) -> Method:
        """How the sampler drafts and checks."""
        return Lookup(self.serving.lookup) if self.serving.lookup else Plain()

    def build_sampler(self) -> BatchedSampler:
        """From key and prompts to text."""
        s = self.serving
        options = dict(slots=s.slots, steps=s.steps, chunk=s.chunk, widths=s.narrow)
        return BatchedSampler(model=self.build_model(), method=self.method(), **options)
