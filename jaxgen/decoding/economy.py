"""Step functions that do less: fewer blocks for later tokens, fewer MLPs for tokens that have settled.

Both wrap a step function that takes the keywords of `jaxgen.generators.LanguageModel.step`; what they sample is another law than
the whole model's, nearer to it the less is left out.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxgen.decoding.step import StepFn

__all__ = ["SkipDecode", "SkipFeedForward"]


@dataclasses.dataclass(frozen=True)
class SkipDecode:
    """One number of blocks a position, the same for the whole batch, falling as the sequence grows (Del Corro et al. 2023).

    The token at position i < `start` passes `most` blocks, at `end` or later `least`, linearly between; those are the first
    `warmup` blocks and, above the gap, the last ones. What runs at a position ran at all positions before it, so no key is
    missing. A call with several positions runs what the first of them needs.

    Attributes:
      depth: n, blocks of the model.
      most: blocks of the first tokens.
      least: blocks of the last ones.
      start: where the number begins to fall, such as the prompt's length.
      end: where it has fallen.
      warmup: blocks at the bottom that always run.
    """

    depth: int
    most: int
    least: int
    start: int
    end: int
    warmup: int = 1

    def __post_init__(self):
        if not 0 <= self.warmup <= self.least <= self.most <= self.depth:
            raise ValueError(
                f"warmup={self.warmup}, least={self.least}, most={self.most}, depth={self.depth}: "
                "expected 0 <= warmup <= least <= most <= depth"
            )
        if not 0 <= self.start < self.end:
            raise ValueError(f"start={self.start} and end={self.end}: expected 0 <= start < end")

    def budget(self, pos: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """How many blocks run at each position."""
        fallen = jnp.clip((jnp.asarray(pos) - self.start) / (self.end - self.start), 0.0, 1.0)
        return jnp.round(self.most - (self.most - self.least) * fallen).astype(jnp.int32)

    def active(self, pos: Int[Array, "*b"]) -> Bool[Array, "*b n"]:
        """Which blocks run at each position."""
        block, top = jnp.arange(self.depth), self.depth - (self.budget(pos) - self.warmup)
        return (block < self.warmup) | (block >= top[..., None])

    def __call__(self, step: StepFn) -> StepFn:
        """The step function with this schedule."""

        def skipping(params, cache, view, cond):
            return step(params, cache, view, cond, active=self.active(jnp.min(jnp.asarray(view.pos))))

        return skipping


@dataclasses.dataclass(frozen=True)
class SkipFeedForward:
    """Tokens that an MLP hardly turns skip the MLPs that follow; attention always runs (Jaiswal et al. 2024, FFN-SkipLLM).

    Attributes:
      threshold: of the cosine between what goes into an MLP's residual sum and what comes out; above 1 skips nothing.
      blocks: the first block whose MLP may be skipped, and the one after the last: models turn most at both ends.
      free: positions below this skip nothing.
    """

    threshold: float
    blocks: tuple[int, int]
    free: int = 0

    def __post_init__(self):
        if not -1 <= self.threshold:
            raise ValueError(f"threshold={self.threshold}: a cosine is at least -1")
        if not 0 <= self.blocks[0] <= self.blocks[1] or self.free < 0:
            raise ValueError(f"blocks={self.blocks} and free={self.free}: expected 0 <= first <= last, and free >= 0")

    def __call__(self, step: StepFn) -> StepFn:
        """The step function with this rule."""

        def skipping(params, cache, view, cond):
            return step(params, cache, view, cond, saturation=dataclasses.asdict(self))

        return skipping
