"""Masked models of continuous tokens, and a small one that drafts for a large one (S028 CSpD): configuration, stages, sampler."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxgen.data import DataConfig, image_batches, make_source, pixels
from jaxgen.generators.masked_latent import MaskedLatentTransformer, random_known
from jaxgen.generators.masked_latent_sampler import MaskedLatentSampler
from jaxgen.objectives.likelihood import drop_labels
from jaxgen.optim import OptimConfig, adamw
from jaxgen.paths_vp import VPPath
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.classifier import classifier_stage
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.next_scale import RULES, ClassifierConfig
from jaxgen.recipes.token_cache import check_codes, check_no_cache, code_batches, codes
from jaxgen.tokenizers.latents import LatentTokenizer
from jaxgen.train.loop import RunConfig

__all__ = [
    "LatentConfig",
    "LatentModelConfig",
    "LatentTokenizerConfig",
    "LatentTrainConfig",
    "MaskedLatentConfig",
    "SpeculationConfig",
    "TokenizerTrainConfig",
    "tokens_stage",
]

# Transformers as elsewhere, and the layers of the head that the condition enters by.
LATENT_RULES = (
    *(rule for rule in RULES if "blocks" in rule[0]),
    (r"task_ada/kernel", P("fsdp", None, "tensor")),
    (r"head/(blocks_\d+/)?(ada|cond)/kernel", P("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class LatentTokenizerConfig:
    """Sizes of `LatentTokenizer`; the image's size and channels come from the data."""

    image_size: int = 8
    patch: int = 2
    features: int = 0
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    groups: int = 32
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        sizes = dict(image_size=1, patch=1, features=0, ch=1, ch_mult=1, res_blocks=1, groups=1)
        check_fields("tokenizer", self, **sizes)
        if not self.scale > 0:
            raise ValueError(f"tokenizer.scale={self.scale}: expected a positive number")


@dataclasses.dataclass(frozen=True)
class TokenizerTrainConfig:
    """How an autoencoder is trained: squared error and a small KL term (Rombach et al. 2022, section 3.1).

    Attributes:
      steps: updates; 0 takes the tokenizer from the work directory as it is.
      batch_size: global.
      kl_weight: of the KL of an image, over the squared error summed over its numbers.
      optim: AdamW and its schedule.
    """

    steps: int = 1000
    batch_size: int = 64
    kl_weight: float = 1e-6
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        check_fields("tokenizer_train", self, steps=0, batch_size=1, kl_weight=0)


@dataclasses.dataclass(frozen=True)
class LatentModelConfig:
    """Sizes of `MaskedLatentTransformer`; 0 of the decoder's is the encoder's."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_heads: int = 0
    buffer: int = 64
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    head_width: int = 1024
    head_depth: int = 6
    scan_layers: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(width=1, depth=1, heads=1, decoder_width=0, decoder_depth=0, decoder_heads=0, buffer=1)
        check_fields("model", self, **sizes, mlp_ratio=0.1, head_width=1, head_depth=1, shares=("dropout",))
        check_dtype("model", self.dtype)


@dataclasses.dataclass(frozen=True)
class LatentTrainConfig:
    """How a generator is trained.

    Attributes:
      steps: updates; 0 takes it from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      class_drop: share of labels dropped for guidance.
      least_masked: see `random_known`.
      repeats: noise levels a token.
      optim: AdamW and its schedule.
    """

    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1
    ema: float = 0.0
    class_drop: float = 0.1
    least_masked: float = 0.7
    repeats: int = 4
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        counts = dict(steps=0, batch_size=1, accumulate=1, repeats=1)
        check_fields("train", self, **counts, shares=("ema", "class_drop", "least_masked"))


@dataclasses.dataclass(frozen=True)
class SpeculationConfig:
    """How images are sampled.

    Attributes:
      steps: of generation.
      chain_steps: of the head's chain.
      drafts: steps that the draft goes ahead; 0 samples without it.
      prefill: share of the steps that the target takes alone first.
      at_once: paths of the target drawn together when a token was rejected.
    """

    steps: int = 64
    chain_steps: int = 100
    drafts: int = 8
    prefill: float = 0.15
    at_once: int = 4

    def __post_init__(self):
        check_fields("speculation", self, steps=1, chain_steps=2, drafts=0, at_once=1, shares=("prefill",))


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """What systems of continuous tokens have in common. `recipe()` builds one.

    A system adds its model and its training, and says what to train and to sample with: `generator_stages` and `build_sampler`.

    Attributes:
      num_classes: 0 counts those of the data.
    """

    data: DataConfig = DataConfig()
    tokenizer: LatentTokenizerConfig = LatentTokenizerConfig()
    tokenizer_train: TokenizerTrainConfig = TokenizerTrainConfig()
    num_classes: int = 0
    classifier: ClassifierConfig = ClassifierConfig()
    run: RunConfig = RunConfig()

    def resolve(self) -> LatentConfig:
        """The configuration with the number of classes filled in from the data.

        Raises:
          ValueError: the data cannot be read, or has more classes or images of another size than the models.
        """
        source, data = make_source(self.data, "train"), self.data
        found, side = (data.image_size,) * 2 if data.image_size else source[0]["image"].shape[:2], self.tokenizer.image_size
        if found != (side, side):
            raise ValueError(f"tokenizer.image_size={side}: the images of data.path={data.path} are {found[0]}x{found[1]}")
        if not self.num_classes:
            return dataclasses.replace(self, num_classes=source.num_classes)
        if source.num_classes > self.num_classes:
            raise ValueError(f"num_classes={self.num_classes}: {data.path} has {source.num_classes} classes")
        return self

    def build_tokenizer(self) -> LatentTokenizer:
        """The tokenizer module."""
        return LatentTokenizer(channels=self.data.channels, **dataclasses.asdict(self.tokenizer))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        stages = [latent_tokenizer_stage(self)] if self.tokenizer.features else []
        stages += self.generator_stages()
        if self.classifier.steps:
            fields = dataclasses.asdict(self.classifier)
            stages.append(classifier_stage(self.data, num_classes=self.num_classes, **fields))
        return Recipe(config=self, stages=tuple(stages), sample=functools.partial(_sample, self.build_sampler()), top_p=0.0)


@dataclasses.dataclass(frozen=True)
class MaskedLatentConfig(LatentConfig):
    """Everything that defines a run. `recipe()` builds it.

    Attributes:
      prediction: see `DiffusionHead`.
      schedule: see `VPPath`; 1000 steps in training.
    """

    model: LatentModelConfig = LatentModelConfig()
    model_train: LatentTrainConfig = LatentTrainConfig()
    draft: LatentModelConfig = LatentModelConfig()
    draft_train: LatentTrainConfig = LatentTrainConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    prediction: str = "noise"
    schedule: str = "cosine"

    def build_generator(self, sizes: LatentModelConfig | None = None) -> MaskedLatentTransformer:
        """The generator, or the draft from its sizes."""
        tokenizer, sizes = self.build_tokenizer(), self.model if sizes is None else sizes
        return MaskedLatentTransformer(
            channels=tokenizer.token_channels,
            length=tokenizer.length,
            num_classes=self.num_classes,
            prediction=self.prediction,
            path=VPPath(self.schedule),
            **dataclasses.asdict(sizes) | dict(dtype=jnp.dtype(sizes.dtype)),
        )

    def build_sampler(self) -> MaskedLatentSampler:
        """From key and labels to images."""
        return MaskedLatentSampler(
            generator=self.build_generator(),
            tokenizer=self.build_tokenizer(),
            draft=self.build_generator(self.draft) if self.speculation.drafts else None,
            **dataclasses.asdict(self.speculation),
        )

    def generator_stages(self) -> list[Stage]:
        """The target's and, where it is used, the draft's."""
        stages = [latent_stage(self, "generator", self.model, self.model_train)]
        if self.speculation.drafts:
            stages.append(latent_stage(self, "draft", self.draft, self.draft_train))
        return stages


def _sample(sampler, params, key, labels, *, cfg=0.0, temperature=1.0, top_k=0, top_p=0.0) -> dict:
    """A sampler's images and what else it says; continuous tokens have no top-k and top-p, which must be off."""
    for name, value, off in (("top_k", top_k, (0,)), ("top_p", top_p, (0, 1))):
        if value not in off:
            raise ValueError(f"{name}={value}: continuous tokens cannot be truncated; 0 turns it off")
    images, result = sampler(modules(params), key, labels, cfg=cfg, temperature=temperature)
    return {"images": images, **result._asdict()}


def latent_stage(config: MaskedLatentConfig, name: str, sizes: LatentModelConfig, train: LatentTrainConfig) -> Stage:
    """The diffusion loss of tokens that are unknown, given a random set of known ones (Li et al. 2024, section 4)."""

    def inputs(key, labels, tokens):
        key_known, key_loss = jax.random.split(key)
        return labels, tokens, random_known(key_known, *tokens.shape[:2], train.least_masked), key_loss

    return tokens_stage(config, name, config.build_generator(sizes), train, inputs, repeats=train.repeats)


def tokens_stage(config: LatentConfig, name: str, module, train, inputs, *, encode=None, **options) -> Stage:
    """The training of a model of the frozen tokenizer's tokens whose call is its loss.

    Args:
      config: data and tokenizer.
      name: of the stage and the module.
      module: with `num_classes`; `module(*inputs(key, labels, tokens), train=..., **options)` is a scalar.
      train: with the fields `steps`, `batch_size`, `accumulate`, `ema`, `class_drop` and `optim` of `LatentTrainConfig`.
      inputs: from key, labels [b] and tokens [b, l, c].
      encode: from the tokenizer's variables and images in [-1, 1] to what `inputs` takes as tokens; None is the tokens.
      options: of the call.
    """
    if encode is not None:
        check_no_cache(config.data, f"stage {name!r} makes its own tokens")
    encode = encode or functools.partial(config.build_tokenizer().apply, method="encode")

    def init(key, frozen):
        side = config.tokenizer.image_size
        images = jnp.zeros((1, side, side, config.data.channels))
        shapes = jax.eval_shape(encode, modules(frozen).get("tokenizer", {}), images)
        tokens = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return {name: module.init(key, *inputs(key, jnp.zeros((1,), jnp.int32), tokens))}, ()

    def score(params, batch, key, labels, frozen, **kwargs):
        variables = modules(frozen).get("tokenizer", {})
        tokens = jax.lax.stop_gradient(codes(encode, variables, batch))
        return module.apply(params[name], *inputs(key, labels, tokens), **options, **kwargs)

    def loss(params, state, batch, key, step, frozen):
        key, key_labels, key_dropout = jax.random.split(key, 3)
        labels = drop_labels(key_labels, batch["label"], module.num_classes, train.class_drop)
        return score(params, batch, key, labels, frozen, train=True, rngs={"dropout": key_dropout}), ({}, state)

    def eval_loss(params, state, batch, key, frozen):
        return {"loss": score(params, batch, key, batch["label"], frozen)}

    return Stage(
        name=name,
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(code_batches, config.data, train.batch_size, "train"),
        needs=("tokenizer",) if config.tokenizer.features else (),
        check=functools.partial(check_codes, config.data),
        eval_data=functools.partial(code_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=LATENT_RULES,
    )


def latent_tokenizer_stage(config: LatentConfig) -> Stage:
    """The autoencoder of `LatentTokenizer`."""
    train, tokenizer = config.tokenizer_train, config.build_tokenizer()

    def init(key, frozen):
        side = config.tokenizer.image_size
        return {"tokenizer": tokenizer.init(key, jnp.zeros((1, side, side, config.data.channels)), key)}, ()

    def score(params, batch, key):
        images = pixels(batch["image"])
        output, kl = tokenizer.apply(params["tokenizer"], images, key)
        error, numbers = jnp.square(images - output).mean(), images[0].size
        return error + train.kl_weight * kl.mean() / numbers, {"l2": error, "kl": kl.mean()}

    def loss(params, state, batch, key, step, frozen):
        value, metrics = score(params, batch, key)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        value, metrics = score(params, batch, key)
        return {"loss": value, **metrics}

    return Stage(
        name="tokenizer",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(image_batches, config.data, train.batch_size, "train"),
        eval_data=functools.partial(image_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
    )
