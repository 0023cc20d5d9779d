"""From prompts to sequences in one compiled function: a model with a step function, and how tokens are drafted and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from jaxgen.decoding import (
    Coupled,
    DraftModel,
    NGram,
    Proposer,
    Rejection,
    Result,
    Rule,
    Sequential,
    StepFn,
    Topology,
    check_settings,
    speculate,
    truncate,
)

__all__ = ["Draft", "Lookup", "Method", "Plain", "SequenceSampler", "check_prompt", "stepper"]

PyTree = Any


class Method(Protocol):
    """How tokens are drafted and checked: hashable, so that equal methods share a compiled function."""

    def __call__(self, params: Mapping[str, PyTree], prompt: Int[Array, "b p"], max_length: int) -> tuple[Proposer, Rule]:
        """The proposer and the rule, made while tracing; `params` are the variables of all modules by name."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """One token a call."""

    def __call__(self, params, prompt, max_length):
        return Sequential(), Coupled()


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts what followed the same n-gram before.

    Attributes:
      length, order: see `NGram`.
    """

    length: int = 4
    order: int = 3

    def __call__(self, params, prompt, max_length):
        return NGram(self.length, self.order), Rejection()


@dataclasses.dataclass(frozen=True)
class Draft:
    """Drafts with another model.

    Attributes:
      model: with `step` and `init_cache`, as `SequenceSampler.model`.
      topology: of the drafts.
      rule: see `jaxgen.decoding.verify`.
      replacement, coupled: see `DraftModel`.
      name: of its variables.
    """

    model: Any
    topology: Topology
    rule: Rule = Rejection()
    replacement: bool = False
    coupled: bool = False
    name: str = "draft"

    def __call__(self, params, prompt, max_length):
        cache = self.model.init_cache(prompt.shape[0], max_length + self.topology.drafts)
        step, options = stepper(self.model), dict(replacement=self.replacement, coupled=self.coupled)
        return DraftModel(step, params[self.name], cache, None, prompt, self.topology, **options), self.rule


def stepper(model):
    """The step function of a module that has `step(cache, view, cond)`; keyword arguments are passed on."""

    def step(params, cache, view, cond, **options):
        return model.apply(params, cache, view, cond, method="step", **options)

    return step


def check_prompt(prompt, prompt_length, vocab: int) -> tuple[Int[np.ndarray, "b p"], Int[Array, "b"]]:
    """(prompt, length of each row), where None is the whole prompt.

    Raises:
      ValueError: tokens outside the vocabulary, or lengths outside 1..p.
    """
    prompt = np.asarray(prompt, np.int32)
    length = np.full(prompt.shape[:1], prompt.shape[-1]) if prompt_length is None else np.asarray(prompt_length)
    if prompt.ndim != 2 or prompt.min(initial=0) < 0 or prompt.max(initial=0) >= vocab:
        raise ValueError(f"prompt {prompt.shape}: expected rows of tokens in 0..{vocab - 1}")
    if length.shape != prompt.shape[:1] or (prompt.size and not ((length >= 1) & (length <= prompt.shape[1])).all()):
        raise ValueError(f"prompt_length {length.tolist()}: expected a length in 1..{prompt.shape[1]} for each row")
    return prompt, jnp.asarray(length, jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceSampler:
    """Continues prompts.

    Attributes:
      model: a module with `step(cache, view, cond)`, see `jaxgen.decoding.step`, and `init_cache(batch, capacity)`.
      method: how tokens are drafted and checked.
      stop: tokens that end a sequence.
      wrap: changes the step function, see `jaxgen.decoding.economy`; hashable.
      name: of the model's variables.

    Example:
      >>> sampler = SequenceSampler(model=LanguageModel(vocab=256, width=64, heads=2, depth=2), method=Lookup())
      >>> result = sampler({"generator": variables}, jax.random.key(0), prompt, max_length=200, top_p=0.9)
    """

    model: Any
    method: Method = Plain()
    stop: tuple[int, ...] = ()
    wrap: Callable[[StepFn], StepFn] | None = None
    name: str = "generator"

    def __call__(
        self,
        params: Mapping[str, PyTree],
        key: Key[Array, ""],
        prompt: Int[Array, "b p"],
        prompt_length: Int[Array, "b"] | None = None,
        *,
        max_length: int,
        temperature=1.0,
        top_k=0,
        top_p=0.0,
    ) -> Result:
        """Samples until each row has `max_length` tokens or a stop token. One compilation for each [b, p] and `max_length`.

        Args:
          params: variables by module name.
          key: row i's tokens depend on the key and i only, not on the batch.
          prompt: tokens, left-aligned.
          prompt_length: of each row; None is p.
          max_length: of prompt and continuation.
          temperature, top_k, top_p: see `truncate`; traced.

        Raises:
          ValueError: tokens outside the vocabulary, lengths outside 1..p, a setting out of range, or see `speculate`.
        """
        check_settings(temperature=temperature, top_k=top_k, top_p=top_p, vocab=self.model.vocab)
        prompt, length = check_prompt(prompt, prompt_length, self.model.vocab)
        settings = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
        return self._sample(params, key, prompt, length, max_length, settings)

    @functools.partial(jax.jit, static_argnums=(0, 5))
    def _sample(self, params, key, prompt, length, max_length, settings):
        temperature, top_k, top_p = settings
        proposer, rule = self.method(params, prompt, max_length)
        step = stepper(self.model)
        return speculate(
            self.wrap(step) if self.wrap else step,
            proposer,
            rule,
            params=params[self.name],
            cache=self.model.init_cache(prompt.shape[0], max_length + proposer.topology.queries - 1),
            cond=None,
            prompt=prompt,
            prompt_length=length,
            max_length=max_length,
            key=key,
            transform=lambda logits, context: truncate(logits, temperature=temperature, top_k=top_k, top_p=top_p),
            stop=self.stop,
        )
