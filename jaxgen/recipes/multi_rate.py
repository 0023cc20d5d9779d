"""M2R2 (S101): adapters that make a language model's early blocks say what its last block says, for drafts and for experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxgen.data.text import text_batches
from jaxgen.decoding import DraftModel, Out, Rejection, chain
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.multi_rate import MultiRateModel
from jaxgen.generators.sequence_sampler import Plain, SequenceSampler, stepper
from jaxgen.objectives.distillation import forward_kl
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.claims import Claim, train_all, trained
from jaxgen.recipes.decoding_claims import compare_samplers, held_out_prompts
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.language import ADAPTER_RULES, LanguageConfig, LanguageTrainConfig, language_stage

__all__ = ["EarlyExit", "FastStream", "MultiRateConfig", "compare_streams", "expert_hits", "fast_stage"]


@dataclasses.dataclass(frozen=True)
class FastConfig:
    """The fast stream.

    Attributes:
      rate: see `MultiRateModel`.
      rank: of its adapters.
      drafts: a target call checks.
    """

    rate: int = 2
    rank: int = 16
    drafts: int = 4

    def __post_init__(self):
        check_fields("fast", self, rate=2, rank=1, drafts=1)


@dataclasses.dataclass(frozen=True)
class FastStream:
    """The fast stream as a draft model, for `SequenceSampler`.

    Attributes:
      model: both streams.
      drafts: in a chain.
    """

    model: MultiRateModel
    drafts: int

    def __call__(self, params, prompt, max_length):
        topology = chain(self.drafts)
        variables = {"base": params["generator"], "adapters": params["fast"]["adapters"]}
        cache = self.model.init_cache(prompt.shape[0], max_length + self.drafts)
        return DraftModel(stepper(self.model), variables, cache, None, prompt, topology), Rejection()


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """The base model's first blocks and its head as a draft model, with nothing trained: what the fast stream is compared with.

    Attributes:
      model: the target.
      blocks: that run.
      drafts: in a chain.
    """

    model: LanguageModel
    blocks: int
    drafts: int

    def __call__(self, params, prompt, max_length):
        def step(variables, cache, view, cond) -> tuple[Out, Any]:
            return self.model.apply(variables, cache, view, cond, layers=(0, self.blocks), method="step")

        cache = self.model.clone(depth=self.blocks).init_cache(prompt.shape[0], max_length + self.drafts)
        return DraftModel(step, params["generator"], cache, None, prompt, chain(self.drafts)), Rejection()


@dataclasses.dataclass(frozen=True)
class MultiRateConfig(LanguageConfig):
    """`LanguageConfig` with a second stage, "fast", that trains the adapters of the fast stream on the frozen model."""

    fast: FastConfig = FastConfig()
    fast_train: LanguageTrainConfig = LanguageTrainConfig(steps=300)

    def build_streams(self) -> MultiRateModel:
        """Both streams."""
        return MultiRateModel(self.build_model(), self.fast.rate, self.fast.rank)

    def method(self) -> FastStream:
        """How the sampler drafts and checks."""
        return FastStream(self.build_streams(), self.fast.drafts)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, stages=(*base.stages, fast_stage(self)))


def _both(model: MultiRateModel, variables, tokens: Int[Array, "b l"]):
    """(logits of the fast stream, logits of the whole model, both streams' vectors) of whole sequences."""
    b, length = tokens.shape
    pos, mask = jnp.arange(length), jnp.tril(jnp.ones((length, length), bool))
    (slow, fast), _ = model.streams(variables, tokens, pos, model.init_cache(b, length), mask)
    early = model.base.apply(variables["base"], fast[-1], method="logits")

    def rest(m, x):
        return m.logits(m.transformer(x, pos, None, mask, layers=(model.exit, m.depth))[0])

    return early, model.base.apply(variables["base"], slow[-1], method=rest), slow, fast


def fast_stage(config: MultiRateConfig) -> Stage:
    """Kullback-Leibler divergence of the fast stream's law from the whole model's, at every position."""
    model = config.build_streams()

    def init(key, frozen):
        return {"fast": model.init(key, modules(frozen)["generator"])}, ()

    def measure(params, batch, frozen):
        variables = {"base": modules(frozen)["generator"], **params["fast"]}
        early, whole, _, _ = _both(model, variables, batch["tokens"][:, :-1])
        kl = forward_kl(early, jax.lax.stop_gradient(whole)).mean()
        same = (early.argmax(-1) == whole.argmax(-1)).astype(jnp.float32).mean()
        overlap = jnp.minimum(jax.nn.softmax(early), jax.nn.softmax(whole)).sum(-1).mean()
        return kl, {"kl": kl, "agreement": same, "acceptance": overlap}

    def loss(params, state, batch, key, step, frozen):
        value, metrics = measure(params, batch, frozen)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        value, metrics = measure(params, batch, frozen)
        return {"loss": value, **metrics}

    fields = dict(init=init, loss=loss, eval_loss=eval_loss, needs=("generator",), rules=ADAPTER_RULES)
    return language_stage("fast", model, config.data, config.fast_train, **fields)


def expert_hits(config: MultiRateConfig, params: Mapping[str, Any], *, limit: int) -> list[dict]:
    """How many of a later block's experts the streams name ahead of time, on held-out text.

    Block R i of the slow stream is matched with what goes into block i of the fast stream, and of the slow one.

    Args:
      config: its model has experts.
      params: variables by module name.
      limit: windows to read.

    Raises:
      ValueError: a model without experts.
    """
    if not config.model.experts:
        raise ValueError("model.experts=0: there are no experts to load")
    model = config.build_streams()
    variables = {"base": params["generator"], **params["fast"]}
    tokens = next(iter(text_batches(config.data, "test", batch_size=limit, train=False)))["tokens"][:, :-1]

    @jax.jit
    def hits(tokens):
        _, _, slow, fast = _both(model, variables, tokens)
        length = tokens.shape[1]
        pos, mask = jnp.arange(length), jnp.tril(jnp.ones((length, length), bool))

        def inputs(m, x):
            out = [x]
            for i in range(model.exit, m.depth):
                x, _ = m.transformer(x, pos, None, mask, layers=(i, i + 1))
                out.append(x)
            return tuple(out)

        later = model.base.apply(variables["base"], slow[-1], method=inputs)
        real = (*slow[:-1], *later)
        found = []
        for i in range(1, model.exit):
            block = model.rate * i
            want = model.routes(variables, real[block], block)
            names = [model.routes(variables, stream[i], block) for stream in (fast, slow)]
            found.append([(guess[..., None] == want[..., None, :]).any(-2).mean() for guess in names])
        return jnp.array(found)

    found = np.asarray(hits(jnp.asarray(tokens)))
    chance = min(config.model.experts_used / config.model.experts, 1.0)
    return [
        {
            "block": config.fast.rate * i,
            "named at block": i,
            "fast stream": round(float(fast), 3),
            "slow stream": round(float(slow), 3),
            "chance": round(chance, 3),
        }
        for i, (fast, slow) in enumerate(found, 1)
    ]


def compare_streams(config: MultiRateConfig, *, prompts: int, new_tokens: int, repeats: int, log: Callable[[str], None]) -> Claim:
    """S101: the fast stream's drafts against plain sampling and against an early exit of the same depth."""
    plain = config.plain()
    _, params, metrics = train_all(config, config.run.seed, trained(plain, config.run.seed, log)[1], log)
    streams, target = config.build_streams(), config.build_model()
    exits = EarlyExit(target, streams.exit, config.fast.drafts)
    methods = {"plain": Plain(), f"early exit after {streams.exit}": exits, "fast stream": config.method()}
    samplers = {name: SequenceSampler(model=target, method=method) for name, method in methods.items()}
    held_out = held_out_prompts(config.data, count=prompts, length=32)
    rows = compare_samplers(samplers, modules(params), held_out, new_tokens=new_tokens, repeats=repeats)
    told = metrics["fast"]
    notes = (
        f"After {streams.exit} of {config.model.depth} blocks the fast stream's law overlaps the whole model's by "
        f"{told['acceptance']:.3f} and has the same first choice at {told['agreement']:.3f} of held-out bytes."
    )
    return Claim("Drafts of a faster residual stream", rows, notes)


def compare_experts(config: MultiRateConfig, *, limit: int, log: Callable[[str], None]) -> Claim:
    """S101: how many experts of later blocks the fast stream names before they are needed."""
    _, params, _ = train_all(config, config.run.seed, {}, log)
    rows = expert_hits(config, modules(params), limit=limit)
    used = f"{config.model.experts_used} of {config.model.experts} experts"
    return Claim("Experts named ahead of time", rows, f"Share of the {used} that a block uses among those named for it.")
