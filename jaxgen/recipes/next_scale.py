"""The next-scale system (S047 VAR): its configuration, its stages and its sampler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxgen import config as config_lib
from jaxgen.data import DataConfig, Source, make_source
from jaxgen.decoding import Known, Settings
from jaxgen.generators import NextScaleSampler, NextScaleTransformer, keep_tokens
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.classifier import classifier_stage
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.token_cache import check_codes, code_batches, codes
from jaxgen.recipes.tokenizer import TokenizerTrainConfig, tokenizer_stage
from jaxgen.tokenizers import MultiScaleTokenizer
from jaxgen.train.loop import RunConfig
from jaxgen.train.mesh import path_name

__all__ = [
    "ClassifierConfig",
    "ModelConfig",
    "ModelTrainConfig",
    "NextScaleConfig",
    "TokenizerConfig",
    "config_of",
    "generator_stage",
    "likelihoods",
    "param_shapes",
    "plain",
    "sample_images",
    "sampler_inputs",
]


# Heads and hidden units over "tensor", the other large axis over "fsdp". Scanned blocks have a leading layer axis.
RULES = (
    (r"blocks/.*/q/kernel", P(None, "fsdp", "tensor", None)),
    (r"blocks/.*kv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r"blocks/.*proj/kernel", P(None, "tensor", None, "fsdp")),
    (r"blocks/.*fc1/kernel", P(None, "fsdp", "tensor")),
    (r"blocks/.*dense/kernel", P(None, "fsdp", None, "tensor")),
    (r"blocks/.*fc2/kernel", P(None, "tensor", "fsdp")),
    (r"(blocks|queries)_\d+/.*/q/kernel", P("fsdp", "tensor", None)),
    (r"(blocks|queries)_\d+/.*kv/kernel", P("fsdp", None, "tensor", None)),
    (r"(blocks|queries)_\d+/.*proj/kernel", P("tensor", None, "fsdp")),
    (r"(blocks|queries)_\d+/.*fc1/kernel", P("fsdp", "tensor")),
    (r"(blocks|queries)_\d+/.*dense/kernel", P("fsdp", None, "tensor")),
    (r"(blocks|queries)_\d+/.*fc2/kernel", P("tensor", "fsdp")),
    # Several things of differing widths side by side: only the other axis can be split.
    (r"blocks/.*mixer/(in|out)/kernel", P(None, ("fsdp", "tensor"), None)),
    (r"blocks_\d+/.*mixer/(in|out)/kernel", P(("fsdp", "tensor"), None)),
    (r"head/head/kernel", P("fsdp", "tensor")),
    (r"(shared_ada|head/ada)/kernel", P("fsdp", None, "tensor")),
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

    def __post_init__(self):
        sizes = dict(ch=1, ch_mult=1, res_blocks=1, groups=1, vocab=1, width=1, patch_nums=1, phis=1)
        check_fields("tokenizer", self, **sizes, beta=0, shares=("dropout", "phi_ratio"))
        check_dtype("tokenizer", self.dtype)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of `NextScaleTransformer`. Width and heads of 0 mean 64 depth and depth, as published; 0 classes are counted."""

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

    def __post_init__(self):
        check_fields("model", self, depth=1, width=0, heads=0, num_classes=0, mlp_ratio=0.1, shares=("drop_path_rate",))
        check_dtype("model", self.dtype)


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

    def __post_init__(self):
        check_fields("model_train", self, steps=0, batch_size=1, accumulate=1, shares=("ema", "class_drop", "label_smoothing"))


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """A small classifier of the real data, whose features and decisions measure the samples; 0 steps trains none."""

    steps: int = 0
    batch_size: int = 128
    width: int = 32
    lr: float = 1e-3

    def __post_init__(self):
        check_fields("classifier", self, steps=0, batch_size=1, width=1, lr=0)


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
        """The configuration with the number of classes filled in from the data.

        Raises:
          ValueError: the data cannot be read, or has more classes or images of another size than the models.
        """
        source, data = self.checked_source(), self.data
        if not self.model.num_classes:
            return dataclasses.replace(self, model=dataclasses.replace(self.model, num_classes=source.num_classes))
        # A label beyond the last class would be read as "no class", which is the number after it.
        if source.num_classes > self.model.num_classes:
            raise ValueError(f"model.num_classes={self.model.num_classes}: {data.path} has {source.num_classes} classes")
        return self

    def checked_source(self) -> Source:
        """The training images, of the size that the tokenizer takes; raises as `resolve`."""
        source, data, sides = make_source(self.data, "train"), self.data, self.build_tokenizer().image_size
        found = (data.image_size,) * 2 if data.image_size else source[0]["image"].shape[:2]
        if found != sides:
            raise ValueError(
                f"images of {found[0]}x{found[1]} (data.path={data.path}, data.image_size={data.image_size}); the tokenizer's "
                f"patch_nums={self.tokenizer.patch_nums} and ch_mult={self.tokenizer.ch_mult} take {sides[0]}x{sides[1]}"
            )
        return source

    @property
    def num_classes(self) -> int:
        """Classes of the generator."""
        return self.model.num_classes

    def build_tokenizer(self) -> MultiScaleTokenizer:
        """The tokenizer module."""
        return MultiScaleTokenizer(**self._tokenizer_fields())

    def _tokenizer_fields(self) -> dict:
        dtype = jnp.dtype(self.tokenizer.dtype)
        return dataclasses.asdict(self.tokenizer) | dict(channels=self.data.channels, dtype=dtype)

    @property
    def rules(self) -> tuple:
        """The generator's sharding table, see `Stage.rules`."""
        return RULES

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

    def objective(self, predict: Callable[..., Any], tokens, inputs, step) -> tuple[Any, dict]:
        """(Training loss, metrics) of a batch: the mean negative log-likelihood of its tokens.

        Args:
          predict: `(inputs, **options) -> logits`, the generator while it trains.
          tokens: [b, l].
          inputs: from `teacher_inputs`.
          step: the update.
        """
        logits = predict(inputs)
        metrics = likelihoods(logits, tokens, last=self.build_generator().order.sizes[-1])
        smoothing = self.model_train.label_smoothing
        return cross_entropy(logits, tokens, label_smoothing=smoothing).mean() if smoothing else metrics["nll"], metrics

    def init_generator(self, key, inputs) -> dict[str, Any]:
        """Variables of all that is trained with the generator, by module; `inputs` as from `teacher_inputs`."""
        return {"generator": self.build_generator().init(key, jnp.zeros((1,), jnp.int32), inputs)}

    def condition(self, params: Mapping[str, Any], batch: Mapping[str, Any], key=None):
        """What the generator is told of a batch: labels, of which some are dropped where there is a key.

        Args:
          params: of the modules of `init_generator`.
          batch: of the data.
          key: of what is dropped while training.
        """
        if key is None:
            return batch["label"]
        return drop_labels(key, batch["label"], self.build_generator().num_classes, self.model_train.class_drop)

    def tokenizer_stage(self) -> Stage:
        """What trains the tokenizer."""
        return tokenizer_stage(self.tokenizer_train, self.data, self.build_tokenizer())

    def judge_stage(self) -> Stage:
        """What trains the judge of samples, a classifier of the data."""
        return classifier_stage(self.data, num_classes=self.num_classes, **dataclasses.asdict(self.classifier))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        stages = [self.tokenizer_stage(), generator_stage(self)]
        if self.classifier.steps:
            stages.append(self.judge_stage())
        return Recipe(config=self, stages=tuple(stages), sample=functools.partial(sample_images, self.build_sampler()))


def sample_images(
    sampler: NextScaleSampler, params: Mapping[str, Any], key, labels, *, image=None, keep=None, **settings
) -> dict:
    """Samples with the modules of all stages; settings are those of `jaxgen.decoding.Settings`.

    With `image` [H, W, C] and the mask `keep` [h, w] (see `keep_tokens`), what lies under the mask stays.

    Raises:
      ValueError: parameters of other shapes than the sampler's modules have, a mask under which everything stays, or see
        `NextScaleSampler.__call__`.
    """
    variables, known = sampler_inputs(sampler, params, len(labels), image=image, keep=keep)
    images, tokens = sampler(variables, key, labels, Settings(**settings), known)
    return {"images": images, "tokens": tokens}


def sampler_inputs(
    sampler: NextScaleSampler, params: Mapping[str, Any], batch: int, *, image=None, keep=None
) -> tuple[dict[str, Any], Known | None]:
    """(Variables by module, tokens to force) of a sampler that is to make `batch` images; raises as `sample_images`."""
    variables = modules(params)
    for name, shapes in param_shapes(sampler).items():
        _check_shapes(name, variables[name], shapes)
    if image is None:
        return variables, None
    tokens = _encode(sampler.tokenizer, variables["tokenizer"], jnp.asarray(image)[None])
    known = Known(jnp.broadcast_to(tokens, (batch, tokens.shape[1])), keep_tokens(sampler.generator.order, keep, batch=batch))
    if known.keep.all():
        raise ValueError(f"what is to change of the image is smaller than a token: all {known.keep.shape[1]} stay")
    return variables, known


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer, variables, images):
    return tokenizer.apply(variables, images, method="encode")


@functools.lru_cache(maxsize=8)
def param_shapes(sampler: NextScaleSampler) -> dict[str, Any]:
    """Shapes of the variables that a sampler takes, by module; nothing is computed."""
    return sampler.param_shapes()


def _check_shapes(module: str, variables, shapes) -> None:
    """That `variables`, which come from a checkpoint, are those of a module whose variables have `shapes`."""
    have, want = (
        {path_name(path): np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in (variables, shapes)
    )
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"{module}: {name} has shape {have.get(name, 'none')} in the checkpoint and {want.get(name, 'none')} in the model"
            )


def generator_stage(config: NextScaleConfig) -> Stage:
    """Teacher-forced maximum likelihood of the frozen tokenizer's tokens (Tian et al. 2024, section 3.2)."""
    train, tokenizer, generator = config.model_train, config.build_tokenizer(), config.build_generator()
    order = generator.order

    def init(key, frozen):
        def inputs(variables):
            return config.teacher_inputs(tokenizer, variables, jnp.zeros((1, order.length), jnp.int32))

        shape = jax.eval_shape(inputs, modules(frozen).get("tokenizer", {}))
        return config.init_generator(key, jnp.zeros(shape.shape, shape.dtype)), ()

    def read(batch, frozen):
        variables = modules(frozen).get("tokenizer", {})
        tokens = codes(functools.partial(tokenizer.apply, method="encode"), variables, batch)
        return tokens, jax.lax.stop_gradient(config.teacher_inputs(tokenizer, variables, tokens))

    def loss(params, state, batch, key, step, frozen):
        drop_key, path_key = jax.random.split(key)
        cond = config.condition(params, batch, drop_key)
        tokens, inputs = read(batch, frozen)

        def predict(inputs, **options):
            return generator.apply(params["generator"], cond, inputs, train=True, rngs={"dropout": path_key}, **options)

        value, metrics = config.objective(predict, tokens, inputs, step)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        tokens, inputs = read(batch, frozen)
        logits = generator.apply(params["generator"], config.condition(params, batch), inputs)
        metrics = likelihoods(logits, tokens, last=order.sizes[-1])
        return {"loss": metrics["nll"], **metrics}

    return Stage(
        name="generator",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(code_batches, config.data, train.batch_size, "train"),
        needs=("tokenizer",),
        check=functools.partial(check_codes, config.data),
        eval_data=functools.partial(code_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=config.rules,
    )


def likelihoods(logits, tokens, *, last: int) -> dict:
    """How likely tokens are, all of them and the `last` ones, in nats, and how often they are the likeliest."""
    nll = cross_entropy(logits, tokens)
    accuracy = (logits.argmax(-1) == tokens).astype(jnp.float32).mean()
    return {"nll": nll.mean(), "nll_last_step": nll[:, -last:].mean(), "token_accuracy": accuracy}


def plain(config: NextScaleConfig) -> NextScaleConfig:
    """VAR on the data, tokenizer, sizes and training of a system whose configuration extends VAR's."""
    return NextScaleConfig(**config_lib.fields_of(config, NextScaleConfig))


def config_of(generator: NextScaleTransformer, tokenizer: MultiScaleTokenizer) -> NextScaleConfig:
    """The configuration of modules that exist already, with nothing left to train."""

    def fields(cls, module, **overrides):
        return cls(**config_lib.fields_of(module, cls) | dict(dtype=jnp.dtype(module.dtype).name) | overrides)

    return NextScaleConfig(
        data=DataConfig(image_size=tokenizer.image_size[0], channels=tokenizer.channels),
        tokenizer=fields(TokenizerConfig, tokenizer),
        tokenizer_train=TokenizerTrainConfig(steps=0, adversarial_weight=0.0),
        model=fields(ModelConfig, generator),
        model_train=ModelTrainConfig(steps=0),
    )
