"""State-space language models whose drafts are trees (S119 STree): configuration, stages and claim."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from jaxgen.decoding import Coupled, Rejection, branches, chain
from jaxgen.generators.sequence_sampler import Draft, Plain
from jaxgen.generators.state_space import StateSpaceModel
from jaxgen.recipe import modules
from jaxgen.recipes.claims import Claim, train_all
from jaxgen.recipes.decoding_claims import compare_samplers, held_out_prompts
from jaxgen.recipes.drafted import DraftedConfig
from jaxgen.recipes.fields import check_fields

__all__ = ["StateSpaceConfig", "StateSpaceFields", "compare_shapes"]


@dataclasses.dataclass(frozen=True)
class StateSpaceFields:
    """What `StateSpaceModel` has besides the fields of a language model.

    Attributes:
      state_size, head_size, expand, conv_size, attention_every: see `StateSpaceModel`.
    """

    state_size: int = 32
    head_size: int = 32
    expand: int = 2
    conv_size: int = 4
    attention_every: int = 0

    def __post_init__(self):
        check_fields("ssm", self, state_size=1, head_size=1, expand=1, conv_size=1, attention_every=0)


@dataclasses.dataclass(frozen=True)
class StateSpaceConfig(DraftedConfig):
    """`DraftedConfig` whose target is a state-space model and whose drafts are a tree.

    Attributes:
      ssm: the target's own sizes; of `model` its vocabulary, width, heads (of attention), depth and type are used.
      tree: children of each node, level by level; of ones it is a chain. It replaces `drafting`'s paths.
    """

    ssm: StateSpaceFields = StateSpaceFields()
    tree: tuple[int, ...] = (3, 2, 1, 1)

    def __post_init__(self):
        super().__post_init__()
        if not self.tree or min(self.tree) < 1:
            raise ValueError(f"tree={self.tree}: expected numbers of children, at least 1 each")
        if self.drafting.rule == "k_seq":
            raise ValueError("drafting.rule='k_seq': siblings of a tree are drawn without replacement; rejection or coupled")

    def build_model(self) -> StateSpaceModel:
        """The target."""
        m, fields = self.model, dataclasses.asdict(self.ssm)
        sizes = dict(vocab=m.vocab, width=m.width, heads=m.heads, depth=m.depth, dtype=jnp.dtype(m.dtype))
        return StateSpaceModel(**sizes, **fields)

    def method(self) -> Draft:
        """A tree of the draft model's."""
        coupled = self.drafting.rule == "coupled"
        return Draft(self.draft.build(), branches(self.tree), Coupled() if coupled else Rejection(), coupled=coupled)


def compare_shapes(
    config: StateSpaceConfig, *, seeds: int, prompts: int, new_tokens: int, repeats: int, log: Callable[[str], None]
) -> Claim:
    """S119: trees against chains of the same drafts, on a state-space target; tokens a target call and time."""
    recipe, params, metrics = train_all(config, config.run.seed, {}, log)
    variables, draft = modules(params), config.draft.build()
    sampler, levels = recipe.config.build_sampler(), len(config.tree)
    methods = {
        "plain": Plain(),
        f"chain of {levels}": Draft(draft, chain(levels)),
        f"chain of {2 * levels}": Draft(draft, chain(2 * levels)),
        f"tree {'x'.join(map(str, config.tree))}": Draft(draft, branches(config.tree)),
        f"tree {'x'.join(map(str, config.tree))}, coupled": Draft(draft, branches(config.tree), Coupled(), coupled=True),
    }
    samplers = {name: dataclasses.replace(sampler, method=method) for name, method in methods.items()}
    held_out = held_out_prompts(config.data, count=prompts, length=32, seed=config.run.seed)
    rows = compare_samplers(samplers, variables, held_out, new_tokens=new_tokens, repeats=repeats * seeds)
    for row, method in zip(rows, methods.values()):
        row["positions a call"] = 1 if isinstance(method, Plain) else method.topology.queries
    nll = " and ".join(f"{metrics[name]['nll']:.3f}" for name in ("generator", "draft"))
    notes = (
        f"Nats a held-out byte of target and draft: {nll}. {repeats * seeds} samplings of {prompts} prompts. A tree is read in "
        "one call without a state for each node; read path by path it would take a call, or a copy of the state, for each leaf."
    )
    return Claim("Trees of drafts on a state-space model", rows, notes)
