"""The next-scale system (S047 VAR): its configuration, its stages and its sampler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxgen.data import DataConfig, batches, make_source, pixels
from jaxgen.decoding import Known, Settings
from jaxgen.generators import NextScaleSampler, NextScaleTransformer, keep_tokens
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.classifier import classifier_stage
from jaxgen.recipes.tokenizer import TokenizerTrainConfig, tokenizer_stage
from jaxgen.tokenizers import MultiScaleTokenizer
from jaxgen.train.loop import RunConfig

__all__ = ["ClassifierConfig", "ModelConfig", "ModelTrainConfig", "NextScaleConfig", "TokenizerConfig", "config_of"]

# Heads and hidden units over "tensor", the other large axis over "fsdp". Scanned blocks have a leading layer axis.
RULES = (
    (r"blocks/.*qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks/.*(fc1|dense)/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/.*fc2/kernel", P(None, "tensor", "fsdp")),
    (r"blocks_\d+/.*qkv/kernel", P("fsdp", None, "tensor", None)),
    (r"blocks_\d+/.*proj/kernel", P("tensor", None, "fsdp")),
    (r"blocks_\d+/.*(fc1|dense)/kernel", P("fsdp", "tensor")),
    (r"blocks_\d+/.*fc2/kernel", P("tensor", "fsdp")),
    (r"head/head/kernel", P("fsdp", "tensor")),
    (r"shared_ada/kernel", P("fsdp")),
)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of `MultiScaleTokenizer`; channels come from the data."""

    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    vocab: int = 4096
    width: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    phis: int = 4
    phi_ratio: float = 0.5
    beta: float = 0.25
    cosine: bool = False
    codebook_init: float = 1.0
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of `NextScaleTransformer`. Width and heads of 0 mean 64 depth and depth, as published."""

    depth: int = 16
    width: int = 0
    heads: int = 0
    num_classes: int = 0
    mlp_ratio: float = 4.0
    l2_norm: bool = True
    shared_adaln: bool = False
    drop_path_rate: float = 0.0
    gate_init: float = 1e-3
    rest_init: float = 0.5
    head_init: float = 0.02
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class ModelTrainConfig:
    """How the generator is trained.

    Attributes:
      steps: updates; 0 takes the generator from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      class_drop: share of labels dropped for guidance.
      label_smoothing: of the cross-entropy.
      optim: AdamW and its schedule.
    """

    steps: int = 1000
    batch_size: int = 768
    accumulate: int = 1
    ema: float = 0.0
    class_drop: float = 0.1
    label_smoothing: float = 0.0
    optim: OptimConfig = OptimConfig()


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A small classifier of the real data, whose features and decisions measure the samples; 0 steps trains none."""

    steps: int = 0
    batch_size: int = 128
    width: int = 32
    lr: float = 1e-3


@dataclasses.dataclass(frozen=True)
class NextScaleConfig:
    """Everything that defines a run. `recipe()` builds it."""

    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokenizer_train: TokenizerTrainConfig = TokenizerTrainConfig()
    model: ModelConfig = ModelConfig()
    model_train: ModelTrainConfig = ModelTrainConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    run: RunConfig = RunConfig()

    def resolve(self) -> NextScaleConfig:
        """The configuration with the number of classes filled in from the data."""
        if self.model.num_classes:
            return self
        num_classes = make_source(self.data, "train").num_classes
        return dataclasses.replace(self, model=dataclasses.replace(self.model, num_classes=num_classes))

    def build_tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer module."""
        fields = dataclasses.asdict(self.tokenizer)
        return MultiScaleTokenizer(channels=self.data.channels, **fields | dict(dtype=jnp.dtype(fields["dtype"])))

    def build_generator(self) -> NextScaleTransformer:
        """The generator module."""
        return NextScaleTransformer(patch_nums=self.tokenizer.patch_nums, **self._generator_fields())

    def _generator_fields(self) -> dict:
        m = self.model
        sizes = dict(width=m.width or 64 * m.depth, heads=m.heads or m.depth, dtype=jnp.dtype(m.dtype))
        return dataclasses.asdict(m) | sizes | dict(vocab=self.tokenizer.vocab)

    def build_sampler(self) -> NextScaleSampler:
        """From key and labels to images."""
        return NextScaleSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def teacher_inputs(self, tokenizer, variables, tokens):
        """What the generator reads in training, from the tokens that it is to predict."""
        return tokenizer.apply(variables, tokens, method="inputs")

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        stages = [tokenizer_stage(self.tokenizer_train, self.data, self.build_tokenizer()), generator_stage(self)]
        if self.classifier.steps:
            fields = dataclasses.asdict(self.classifier)
            stages.append(classifier_stage(self.data, num_classes=self.model.num_classes, **fields))
        return Recipe(config=self, stages=tuple(stages), sample=functools.partial(_sample, self.build_sampler()))


def _sample(sampler, params: Mapping[str, Any], key, labels, *, image=None, keep=None, **settings) -> dict:
    """Samples with the modules of all stages; settings are those of `jaxgen.decoding.Settings`.

    With `image` [H, W, C] and the mask `keep` [h, w] (see `keep_tokens`), what lies under the mask stays.
    """
    params = modules(params)
    known = None
    if image is not None:
        tokens = sampler.tokenizer.apply(params["tokenizer"], jnp.asarray(image)[None], method="encode")
        tokens = jnp.broadcast_to(tokens, (len(labels), tokens.shape[1]))
        known = Known(tokens, keep_tokens(sampler.generator.order, keep, batch=len(labels)))
    images, tokens = sampler(params, key, labels, Settings(**settings), known)
    return {"images": images, "tokens": tokens}


def generator_stage(config: NextScaleConfig) -> Stage:
    """Teacher-forced maximum likelihood of the frozen tokenizer's tokens (Tian et al. 2024, section 3.2)."""
    train, tokenizer, generator = config.model_train, config.build_tokenizer(), config.build_generator()
    order = generator.order
    last = order.span(order.steps - 1)[0]

    def init(key, frozen):
        def inputs(variables):
            return config.teacher_inputs(tokenizer, variables, jnp.zeros((1, order.length), jnp.int32))

        shape = jax.eval_shape(inputs, modules(frozen)["tokenizer"])
        return {"generator": generator.init(key, jnp.zeros((1,), jnp.int32), jnp.zeros(shape.shape, shape.dtype))}, ()

    def forward(params, batch, labels, frozen, **kwargs):
        variables = modules(frozen)["tokenizer"]
        tokens = tokenizer.apply(variables, pixels(batch["image"]), method="encode")
        inputs = jax.lax.stop_gradient(config.teacher_inputs(tokenizer, variables, tokens))
        logits = generator.apply(params["generator"], labels, inputs, **kwargs)
        nll = cross_entropy(logits, tokens)
        metrics = {
            "nll": nll.mean(),
            "nll_last_step": nll[:, last:].mean(),
            "token_accuracy": (logits.argmax(-1) == tokens).astype(jnp.float32).mean(),
        }
        return logits, tokens, metrics

    def loss(params, state, batch, key, step, frozen):
        drop_key, path_key = jax.random.split(key)
        labels = drop_labels(drop_key, batch["label"], generator.num_classes, train.class_drop)
        logits, tokens, metrics = forward(params, batch, labels, frozen, train=True, rngs={"dropout": path_key})
        value = metrics["nll"]
        if train.label_smoothing:
            value = cross_entropy(logits, tokens, label_smoothing=train.label_smoothing).mean()
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        metrics = forward(params, batch, batch["label"], frozen)[-1]
        return {"loss": metrics["nll"], **metrics}

    def data(split, train_mode, shard_index, shard_count):
        source = make_source(config.data, split)
        kwargs = dict(batch_size=train.batch_size, train=train_mode, shard_index=shard_index, shard_count=shard_count)
        return batches(source, config.data, **kwargs)

    return Stage(
        name="generator",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(data, "train", True),
        needs=("tokenizer",),
        eval_data=functools.partial(data, "test", False),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=RULES,
    )


def config_of(generator: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> NextScaleConfig:
    """The configuration of modules that exist already, with nothing left to train."""

    def fields(cls, module, **overrides):
        values = {f.name: getattr(module, f.name) for f in dataclasses.fields(cls) if hasattr(module, f.name)}
        return cls(**values | dict(dtype=jnp.dtype(module.dtype).name) | overrides)

    return NextScaleConfig(
        data=DataConfig(image_size=tokenizer.image_size[0], channels=tokenizer.channels),
        tokenizer=fields(TokenizerConfig, tokenizer),
        tokenizer_train=TokenizerTrainConfig(steps=0, adversarial_weight=0.0),
        model=fields(ModelConfig, generator),
        model_train=ModelTrainConfig(steps=0),
    )
