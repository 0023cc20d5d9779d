"""Language models on bytes: configuration, training stage and sampler; what decoding methods are measured on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxgen import config as config_lib
from jaxgen.data.text import TextConfig, encode_bytes, read_text, text_batches
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import Method, Plain, SequenceSampler
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.train.loop import RunConfig

__all__ = [
    "ADAPTER_RULES",
    "RULES",
    "LanguageConfig",
    "LanguageModelConfig",
    "LanguageTrainConfig",
    "language_stage",
    "text_sample",
    "tiny",
]

# Heads and hidden units over "tensor", the other large axis over "fsdp". Scanned blocks have a leading layer axis.
RULES = (
    (r"blocks/attention/qkv/kernel", P(None, "fsdp", "tensor", None, None)),
    (r"blocks/attention/o/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks/mlp/w13/kernel", P(None, "fsdp", None, "tensor")),
    (r"blocks/mlp/w2/kernel", P(None, "tensor", "fsdp")),
    (r"(blocks_\d+|layer)/attention/qkv/kernel", P("fsdp", "tensor", None, None)),
    (r"(blocks_\d+|layer)/attention/o/kernel", P("tensor", None, "fsdp")),
    (r"(blocks_\d+|layer)/mlp/w13/kernel", P("fsdp", None, "tensor")),
    (r"(blocks_\d+|layer)/mlp/w2/kernel", P("tensor", "fsdp")),
    # Of Mamba-2, several things of differing widths side by side: only the other axis can be split.
    (r"blocks_\d+/(in|out)/kernel", P(("fsdp", "tensor"), None)),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"embed/embedding", P("tensor", "fsdp")),
)

# Of low-rank adapters, whose ranks are small.
ADAPTER_RULES = (
    (r"adapters/.*/a$", P(("fsdp", "tensor"), None)),
    (r"adapters/.*/b$", P(None, ("fsdp", "tensor"))),
)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes of `LanguageModel`."""

    vocab: int = 256
    width: int = 192
    heads: int = 6
    depth: int = 4
    kv_heads: int = 0
    hidden: int = 0
    experts: int = 0
    experts_used: int = 2
    theta: float = 10000.0
    tied: bool = False
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self, vocab=2, width=1, heads=1, depth=1, kv_heads=0, hidden=0, experts=0, experts_used=1, theta=1)
        check_dtype("model", self.dtype)

    def build(self, **fields) -> LanguageModel:
        """The module; `fields` are those of `LanguageModel` that no configuration has."""
        return LanguageModel(**dataclasses.asdict(self) | dict(dtype=jnp.dtype(self.dtype)) | fields)


@dataclasses.dataclass(frozen=True)
class LanguageTrainConfig:
    """How a model is trained.

    Attributes:
      steps: updates; 0 takes the weights from the work directory as they are.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      balance: weight of the experts' load balance, where the model has experts.
      optim: AdamW and its schedule.
    """

    steps: int = 500
    batch_size: int = 16
    accumulate: int = 1
    ema: float = 0.0
    balance: float = 0.01
    optim: OptimConfig = OptimConfig(lr=2e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, clip=1.0, no_decay=("scale",))

    def __post_init__(self):
        check_fields("model_train", self, steps=0, batch_size=1, accumulate=1, balance=0, shares=("ema",))


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Everything that defines a run; the defaults are a byte model of 1.8 million weights. `recipe()` builds it."""

    data: TextConfig = TextConfig()
    model: LanguageModelConfig = LanguageModelConfig()
    model_train: LanguageTrainConfig = LanguageTrainConfig()
    run: RunConfig = RunConfig()

    def resolve(self) -> LanguageConfig:
        """The configuration itself, when its data can be read.

        Raises:
          ValueError: they cannot, or the model has fewer tokens than there are bytes.
        """
        for split in ("train", "test"):
            read_text(self.data, split)
        if self.model.vocab < 256:
            raise ValueError(f"model.vocab={self.model.vocab}: text is read as bytes, of which there are 256")
        return self

    def build_model(self) -> LanguageModel:
        """The generator module."""
        return self.model.build()

    def plain(self) -> LanguageConfig:
        """The model alone, so that systems on one model share its training."""
        return LanguageConfig(**config_lib.fields_of(self, LanguageConfig))

    def method(self) -> Method:
        """How the sampler drafts and checks."""
        return Plain()

    def build_sampler(self) -> SequenceSampler:
        """From key and prompts to text."""
        return SequenceSampler(model=self.build_model(), method=self.method())

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        stage = language_stage("generator", self.build_model(), self.data, self.model_train)
        return Recipe(config=self, stages=(stage,), sample=functools.partial(text_sample, self.build_sampler()), modality="text")


def language_stage(
    name: str,
    model: Any,
    data: TextConfig,
    train: LanguageTrainConfig,
    *,
    loss: Callable | None = None,
    options: Mapping[str, Any] | None = None,
    **fields,
) -> Stage:
    """Maximum likelihood of the next byte, of a module from tokens [b, l] to logits [b, l, v].

    Args:
      name: of the stage and of the module's variables.
      model: the module.
      data: the text.
      train: how long, and with what.
      loss: replaces the training loss, as in `Stage`.
      options: keyword arguments of the module's call.
      **fields: other fields of the stage.
    """

    def init(key, frozen):
        return {name: model.init(key, jnp.zeros((1, data.length), jnp.int32))}, ()

    def measure(params, batch):
        tokens = batch["tokens"]
        logits, told = model.apply(params[name], tokens[:, :-1], **(options or {}), mutable=["balance"])
        nll = cross_entropy(logits, tokens[:, 1:])
        hits = (logits.argmax(-1) == tokens[:, 1:]).astype(jnp.float32)
        metrics = {"nll": nll.mean(), "token_accuracy": hits.mean()}
        loads = jax.tree.leaves(told)
        return metrics | {"balance": sum(x.mean() for x in loads) / len(loads)} if loads else metrics

    def likelihood(params, state, batch, key, step, frozen):
        metrics = measure(params, batch)
        return metrics["nll"] + train.balance * metrics.get("balance", 0.0), (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        metrics = measure(params, batch)
        return {"loss": metrics["nll"], **metrics}

    def batches(split, train_mode, shard_index, shard_count):
        shards = dict(shard_index=shard_index, shard_count=shard_count)
        return text_batches(data, split, batch_size=train.batch_size, train=train_mode, **shards)

    settings = dict(
        name=name,
        steps=train.steps,
        init=init,
        loss=loss or likelihood,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(batches, "train", True),
        eval_data=functools.partial(batches, "test", False),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=RULES,
    )
    return Stage(**settings | fields)


def text_sample(sampler: SequenceSampler, params: Mapping[str, Any], key, prompts, *, length: int = 200, **settings) -> dict:
    """Continues prompts, strings or bytes, up to `length` bytes in all; settings are those of `SequenceSampler.__call__`.

    Returns:
      "tokens" [b, length], "length" [b], "status" [b] and "row_calls" [b], see `jaxgen.decoding.Result`.
    """
    tokens, lengths = encode_bytes(prompts)
    result = sampler(modules(params), key, tokens, lengths, max_length=length, **settings)
    return {name: value for name, value in result._asdict().items() if name != "calls"}


def tiny(config: LanguageConfig, **fields) -> LanguageConfig:
    """The configuration with everything tiny, for tests and `smoke` variants: every part runs, nothing is learnt."""
    optim = dataclasses.replace(config.model_train.optim, warmup_steps=2)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path="python", test_path="", length=32),
        model=dataclasses.replace(config.model, width=32, heads=2, depth=2, kv_heads=1),
        model_train=dataclasses.replace(config.model_train, steps=4, batch_size=4, optim=optim),
        **fields,
    )
