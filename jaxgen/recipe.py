"""A recipe: stages to train in order, and a sampler. What `configs/` builds and `scripts/` run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optax

from jaxgen import config as config_lib

__all__ = ["PICTURES", "Recipe", "Stage", "modules"]

PyTree = Any

# Where samplers of a modality return pictures.
PICTURES = {"image": "images", "video": "clips"}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One training run: a loss over a data source.

    Every function is pure and traceable except `data`, `eval_data`, `fill` and `check`.

    Attributes:
      name: names the stage's checkpoints and its rows in `metrics.jsonl`.
      steps: optimizer updates.
      init: `(key, frozen) -> (params, state)`. `params`, a dict from module names to variables, receive gradients; `state` is
        any other pytree that changes while training (codebook statistics, ...), `()` if there is none.
      fill: `(frozen) -> state`, called in all processes alike where a training starts anew: the state with what takes reading
        data (a database of neighbours), which `init` gives in shape alone; of arrays on the host. `None`: `init` knows all.
      loss: `(params, state, batch, key, step, frozen) -> (scalar, (metrics, state))`, with float32 scalars in `metrics`.
      optimizer: an optax transformation over `params` (clipping, schedule and weight decay included).
      data: `(shard_index, shard_count) -> grain.IterDataset` of this host's training batches (dicts of numpy arrays),
        endless, deterministic, checkpointable.
      needs: earlier stages whose parameters reach this one as `frozen[name]` (EMA weights where they were kept).
      after_update: `(params, state, key, step) -> (params, state)`, run inside the jitted step after each update; for what is
        not a gradient step, such as reviving dead codes.
      eval_data: like `data`, but one pass over held-out examples; `None` if there are none.
      eval_loss: `(params, state, batch, key, frozen) -> metrics`, averaged over `eval_data`; the entry `"loss"` picks
        the best checkpoint.
      ema: decay of the exponential moving average of `params`; 0 keeps none.
      accumulate: micro-batches per update; the batch is split on its first axis.
      rules: sharding table, `(path regex, PartitionSpec)` pairs, first match wins; parameters that match none are replicated.
      notes: said when the stage starts: what a user should know, such as a loss that is missing.
      check: `(frozen) -> None`, called once before the first update: raises ValueError where what earlier stages learnt does not
        fit the stage's data (a token cache of another tokenizer).
    """

    name: str
    steps: int
    init: Callable[..., tuple[PyTree, PyTree]]
    loss: Callable[..., tuple[Any, tuple[dict, PyTree]]]
    optimizer: optax.GradientTransformation
    data: Callable[[int, int], Any]
    fill: Callable[[Mapping[str, PyTree]], PyTree] | None = None
    needs: tuple[str, ...] = ()
    after_update: Callable[..., tuple[PyTree, PyTree]] | None = None
    eval_data: Callable[[int, int], Any] | None = None
    eval_loss: Callable[..., dict] | None = None
    ema: float = 0.0
    accumulate: int = 1
    rules: tuple = ()
    notes: tuple[str, ...] = ()
    check: Callable[[Mapping[str, PyTree]], None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recipe:
    """A system, ready to train and to sample.

    Attributes:
      config: the frozen dataclass that everything below was built from. It has a method `recipe() -> Recipe`, and
        `resolve() -> config`, which fills what only the data can tell (the number of classes).
      stages: trained in this order.
      sample: `(params, key, labels, **options) -> dict` of arrays, where `params` maps stage names to parameters; at least
        `"images"` [b, H, W, C] in [-1, 1] for image systems, `"clips"` [b, f, H, W, C] for those of video; text systems take
        prompts in place of labels and return bytes, `"tokens"` [b, s], and their `"length"` [b]. Compiled once for a batch size.
      modality: "image", "video" or "text".
      prompts: `(texts) -> array [b, ...]`, of systems that make images of captions: what `sample` takes in place of labels.
        Raises ValueError naming a text that it cannot read.
      cfg, top_p: of samples where nobody says others; 0, off, where a sampler does not take them: continuous tokens cannot be
        truncated.
      write: `(folder, tokens) -> paths`, of systems whose samples are files: writes each row of the sampler's output "tokens".
    """

    config: Any
    stages: tuple[Stage, ...]
    sample: Callable[..., dict]
    modality: str = "image"
    cfg: float = 1.5
    top_p: float = 0.96
    prompts: Callable[[Sequence[str]], Any] | None = None
    write: Callable[[str, Any], list] | None = None

    @property
    def shows(self) -> str:
        """What the pictures are called among what `sample` returns, see `PICTURES`."""
        return PICTURES[self.modality]

    def override(self, edits: Iterable[str]) -> Recipe:
        """The recipe with `path.to.field=value` edits applied to its configuration (see `jaxgen.config.override`)."""
        edits = list(edits)
        return config_lib.override(self.config, edits).recipe() if edits else self

    def with_rules(self, rules: tuple) -> Recipe:
        """The recipe with rules that come before each stage's own (see `Stage.rules`)."""
        stages = tuple(dataclasses.replace(stage, rules=(*rules, *stage.rules)) for stage in self.stages)
        return dataclasses.replace(self, stages=stages)

    def stage(self, name: str) -> Stage:
        """The stage called `name`."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage {name!r}; this recipe has {[s.name for s in self.stages]}")


def modules(stages: Mapping[str, Mapping[str, PyTree]]) -> dict[str, PyTree]:
    """Variables by module, from parameters by stage (`frozen` in a stage's functions, `params` of a sampler)."""
    return {name: variables for stage in stages.values() for name, variables in stage.items()}
