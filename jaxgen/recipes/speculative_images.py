"""Image tokens several at a time (S089 SJD, S054 LANTERN, S039 GSD): a next-token system with a speculative sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxgen.decoding import Coupled, NGram, Proposer, Rejection, Rule, Sequential, Settings, Topology, branches, chain
from jaxgen.decoding.jacobi import INITIAL, Jacobi
from jaxgen.decoding.relaxed import Grouped, Lantern, nearest_codes
from jaxgen.decoding.speculate import Transform
from jaxgen.generators import NextTokenTransformer
from jaxgen.generators.speculative_image_sampler import Draft, SpeculativeImageSampler
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.next_scale import ModelConfig, ModelTrainConfig, generator_stage
from jaxgen.recipes.next_token import NextTokenConfig

__all__ = ["DecodeConfig", "SpeculativeImageConfig", "codebook_of", "draft_stage"]

PROPOSERS = ("none", "jacobi", "ngram", "draft")
RULES = ("rejection", "coupled", "lantern", "grouped")

# So that configurations which draft nothing sample by one program.
_SEQUENTIAL = Sequential()


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How tokens are drafted, and which drafts stay.

    Attributes:
      proposer: "none" (one token a call), "jacobi", "ngram", or "draft", a smaller generator.
      length: drafts in a window or chain.
      branches: children of a node of each depth, for a tree of the draft's; empty is a chain of `length`.
      initial: see `Jacobi`.
      order: see `NGram`.
      rule: "rejection" or "coupled", which keep the generator's law; "lantern" or "grouped", which do not.
      neighbours, delta, relative: see `Lantern`; a codebook with fewer codes gives all of its neighbours.
      below, above, p_radius, d_radius: see `Grouped`.
    """

    proposer: str = "jacobi"
    length: int = 16
    branches: tuple[int, ...] = ()
    initial: str = "uniform"
    order: int = 2
    rule: str = "rejection"
    neighbours: int = 1000
    delta: float = 0.1
    relative: bool = False
    below: int = 7
    above: int = 7
    p_radius: float = 0.15
    d_radius: float = 0.5

    def __post_init__(self):
        for name, known in (("proposer", PROPOSERS), ("initial", INITIAL), ("rule", RULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"decode.{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        check_fields("decode", self, length=1, order=1, neighbours=1, delta=0, below=0, above=1, p_radius=0, d_radius=0)
        if self.branches and (self.proposer != "draft" or min(self.branches) < 1):
            raise ValueError(f"decode.branches={self.branches}: expected positive numbers, with decode.proposer=draft")
        if self.proposer != "jacobi" and self.initial != "uniform":
            raise ValueError(f"decode.initial={self.initial!r}: decode.proposer={self.proposer!r} has no window to fill")

    @property
    def topology(self) -> Topology:
        """Of a draft."""
        return branches(self.branches) if self.branches else chain(self.length)

    def build_rule(self, codebook: Any) -> Rule:
        """The rule, with tables made from the tokenizer's codebook [v, w]."""
        if self.rule == "lantern":
            neighbours = jax.jit(nearest_codes, static_argnums=1)(codebook, min(self.neighbours, len(codebook) - 1))
            return Lantern(neighbours, self.delta, self.relative)
        if self.rule == "grouped":
            return Grouped(codebook, self.below, self.above, self.p_radius, self.d_radius)
        return Coupled() if self.rule == "coupled" else Rejection()


@dataclasses.dataclass(frozen=True)
class SpeculativeImageConfig(NextTokenConfig):
    """`NextTokenConfig` with a speculative sampler and, for `decode.proposer=draft`, a stage "draft" that trains a smaller
    generator on the same tokens."""

    decode: DecodeConfig = DecodeConfig()
    draft: ModelConfig = ModelConfig(depth=1)
    draft_train: ModelTrainConfig = ModelTrainConfig()

    def build_draft(self) -> NextTokenTransformer:
        """The smaller generator's module."""
        return self._as_draft().build_generator()

    def _as_draft(self) -> SpeculativeImageConfig:
        """The configuration in which the draft is the generator."""
        model = dataclasses.replace(self.draft, num_classes=self.model.num_classes)
        return dataclasses.replace(self, model=model, model_train=self.draft_train)

    def build_proposer(self) -> Proposer | Draft:
        """What drafts."""
        decode, coupled = self.decode, self.decode.rule == "coupled"
        if decode.proposer == "jacobi":
            return Jacobi(decode.length, coupled=coupled, initial=decode.initial, width=self.tokenizer.patch_nums[0])
        if decode.proposer == "ngram":
            return NGram(decode.length, decode.order)
        if decode.proposer == "draft":
            return Draft(self.build_draft(), decode.topology, coupled=coupled)
        return _SEQUENTIAL

    def build_sampler(self) -> SpeculativeImageSampler:
        """From key and labels to images."""
        return SpeculativeImageSampler(
            generator=self.build_generator(), tokenizer=self.build_tokenizer(), proposer=self.build_proposer()
        )

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        stages = (*base.stages, draft_stage(self)) if self.decode.proposer == "draft" else base.stages
        return dataclasses.replace(base, stages=stages, sample=_Sample(self.build_sampler(), self.decode))


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A recipe's sampler; the rule's tables are made once for a codebook."""

    sampler: SpeculativeImageSampler
    decode: DecodeConfig
    _last: list = dataclasses.field(default_factory=list, compare=False, repr=False)

    def __call__(self, params: Mapping[str, Any], key, labels, *, mark: Transform | None = None, **settings) -> dict:
        variables = modules(params)
        codebook = codebook_of(self.sampler.tokenizer, variables["tokenizer"])
        if not self._last or self._last[0] is not codebook:
            self._last[:] = [codebook, self.decode.build_rule(codebook)]
        return self.sampler(variables, key, labels, Settings(**settings), self._last[1], mark)._asdict()


def codebook_of(tokenizer, variables) -> Any:
    """[v, w], the vectors that tokens stand for."""
    return tokenizer.apply(variables, method=lambda module: module.quantizer.codebook)


def draft_stage(config: SpeculativeImageConfig) -> Stage:
    """`generator_stage` for the smaller generator, whose parameters are called "draft"."""
    base = generator_stage(config._as_draft())

    def init(key, frozen):
        params, state = base.init(key, frozen)
        return {"draft": params["generator"]}, state

    def loss(params, state, batch, key, step, frozen):
        return base.loss({"generator": params["draft"]}, state, batch, key, step, frozen)

    def eval_loss(params, state, batch, key, frozen):
        return base.eval_loss({"generator": params["draft"]}, state, batch, key, frozen)

    return dataclasses.replace(base, name="draft", init=init, loss=loss, eval_loss=eval_loss)
