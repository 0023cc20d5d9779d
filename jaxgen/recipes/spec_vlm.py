"""Speculative captions (S132 SpecVLM): a vision-language model, and a drafter that reads compressed visual tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxgen.data.digit_captions import END, DigitCaptionConfig, DigitCaptions, digit_caption_batches
from jaxgen.data.text import encode_bytes
from jaxgen.data.transforms import pixels
from jaxgen.decoding.topology import RuntimeTree
from jaxgen.generators.feature_drafter import FeatureDraft, FeatureDrafter, embed_tokens, unit_features
from jaxgen.generators.vision_language import Blind, PictureDraft, PictureMethod, VisionLanguageModel, VisionLanguageSampler
from jaxgen.nn.compression import ElasticCompressor
from jaxgen.objectives.likelihood import cross_entropy
from jaxgen.optim import OptimConfig, adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import feature_drafting
from jaxgen.recipes.feature_drafting import DrafterConfig, distil_features
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.language import LanguageModelConfig, LanguageTrainConfig
from jaxgen.train.loop import RunConfig

__all__ = ["CaptionConfig", "CompressorConfig", "SpecVLMConfig", "TreeConfig", "VisionModelConfig", "caption_sample"]

OPTIM = OptimConfig(lr=2e-3, warmup_steps=50, schedule="cosine", lr_end=0.05, clip=1.0, no_decay=("scale",))

# With the layers that read the picture.
RULES = (
    *feature_drafting.RULES,
    (r"convs_\d+/kernel", P(None, None, None, ("fsdp", "tensor"))),
    (r"project/kernel", P("fsdp", "tensor")),
)


@dataclasses.dataclass(frozen=True)
class VisionModelConfig(LanguageModelConfig):
    """Sizes of `VisionLanguageModel`."""

    width: int = 96
    heads: int = 4
    depth: int = 3
    channels: tuple[int, ...] = (16, 32)

    def __post_init__(self):
        super().__post_init__()
        check_fields("model", self, channels=1)

    def build(self, **fields) -> VisionLanguageModel:
        """The module; `image_size` is among the fields."""
        return VisionLanguageModel(**dataclasses.asdict(self) | dict(dtype=jnp.dtype(self.dtype)) | fields)


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Fields of `ElasticCompressor`; with one of the `ways` there is nothing to choose."""

    ways: tuple[str, ...] = ("prune", "pool", "conv", "resample", "drop")
    stride: int = 2
    heads: int = 2


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The tree of a round: how many drafts, how deep, and the beam that finds them, see `BeamDrafts`."""

    drafts: int = 10
    height: int = 5
    beam: int = 3

    def __post_init__(self):
        check_fields("tree", self, drafts=1, height=1, beam=1)


@dataclasses.dataclass(frozen=True)
class CaptionConfig:
    """A vision-language model with a plain sampler. `recipe()` builds it."""

    data: DigitCaptionConfig = DigitCaptionConfig()
    model: VisionModelConfig = VisionModelConfig()
    model_train: LanguageTrainConfig = LanguageTrainConfig(steps=600, batch_size=32, optim=OPTIM)
    run: RunConfig = RunConfig()

    def resolve(self) -> CaptionConfig:
        """The configuration itself, when its data can be read.

        Raises:
          ValueError: they cannot, or the model has fewer tokens than there are bytes.
        """
        DigitCaptions(self.data, "test")
        if self.model.vocab < 256:
            raise ValueError(f"model.vocab={self.model.vocab}: text is read as bytes, of which there are 256")
        return self

    def build_model(self) -> VisionLanguageModel:
        """The target."""
        return self.model.build(image_size=self.data.image_size)

    def method(self) -> PictureMethod:
        """How the sampler drafts and checks."""
        return Blind()

    def build_sampler(self) -> VisionLanguageSampler:
        """From key, pictures and prompts to text."""
        return VisionLanguageSampler(model=self.build_model(), method=self.method(), stop=(ord(END),))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        sample = functools.partial(caption_sample, self.build_sampler(), self.data)
        return Recipe(config=self, stages=(_target_stage(self),), sample=sample, modality="text")


@dataclasses.dataclass(frozen=True)
class SpecVLMConfig(CaptionConfig):
    """`CaptionConfig` with a stage "drafter" and a sampler that drafts with it."""

    compressor: CompressorConfig = CompressorConfig()
    drafter: DrafterConfig = DrafterConfig(block=1, recurrent=0, glance=0.0, soft=1.0)
    drafter_train: LanguageTrainConfig = LanguageTrainConfig(steps=300, batch_size=32, optim=OPTIM)
    tree: TreeConfig = TreeConfig()

    def build_drafter(self) -> FeatureDrafter:
        """The drafter with its compressor."""
        model = self.build_model()
        compressor = ElasticCompressor(grid=model.grid, dtype=model.dtype, **dataclasses.asdict(self.compressor))
        return self.drafter.build(model, compressor=compressor)

    def method(self) -> PictureMethod:
        """How the sampler drafts and checks."""
        topology = RuntimeTree(self.tree.drafts, self.tree.height)
        return PictureDraft(FeatureDraft(self.build_model(), self.build_drafter(), topology, beam=self.tree.beam))

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        base = super().recipe()
        return dataclasses.replace(base, stages=(*base.stages, _drafter_stage(self)))


def caption_sample(
    sampler: VisionLanguageSampler,
    data: DigitCaptionConfig,
    params: Mapping[str, Any],
    key,
    prompts,
    *,
    images: Float[Array, "b H W c"] | None = None,
    length: int = 200,
    **settings,
) -> dict:
    """Answers questions about pictures; without `images` about the first held-out ones, one a prompt.

    Returns:
      "tokens" [b, length], "length" [b], "status" [b], "row_calls" [b], see `jaxgen.decoding.Result`, and "images" in [-1, 1].
    """
    tokens, lengths = encode_bytes(prompts)
    if images is None:
        examples = DigitCaptions(data, "test")
        images = pixels(np.stack([examples[i % len(examples)]["image"] for i in range(len(tokens))]))
    result = sampler(modules(params), key, images, tokens, lengths, max_length=length, **settings)
    return {name: value for name, value in result._asdict().items() if name != "calls"} | {"images": images}


def _weights(batch) -> Float[Array, "b l"]:
    """1 where the next token belongs to the answer."""
    place = jnp.arange(batch["tokens"].shape[1] - 1)
    inside = (place >= batch["prompt"][:, None] - 1) & (place < batch["length"][:, None] - 1)
    return inside.astype(jnp.float32)


def _stage(name: str, config: CaptionConfig, train: LanguageTrainConfig, **fields) -> Stage:
    def batches(split, train_mode, shard_index, shard_count):
        shards = dict(shard_index=shard_index, shard_count=shard_count)
        return digit_caption_batches(config.data, split, batch_size=train.batch_size, train=train_mode, **shards)

    return Stage(
        name=name,
        steps=train.steps,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(batches, "train", True),
        eval_data=functools.partial(batches, "test", False),
        ema=train.ema,
        accumulate=train.accumulate,
        rules=RULES,
        **fields,
    )


def _target_stage(config: CaptionConfig) -> Stage:
    """Maximum likelihood of answers, given picture and question."""
    model = config.build_model()

    def init(key, frozen):
        image = jnp.zeros((1, *config.data.image_size, 1))
        return {"generator": model.init(key, image, jnp.zeros((1, config.data.length), jnp.int32))}, ()

    def measure(params, batch):
        tokens, weights = batch["tokens"], _weights(batch)
        logits = model.apply(params["generator"], pixels(batch["image"]), tokens[:, :-1])
        total = weights.sum()
        nll = (cross_entropy(logits, tokens[:, 1:]) * weights).sum() / total
        return {"nll": nll, "token_accuracy": ((logits.argmax(-1) == tokens[:, 1:]) * weights).sum() / total}

    def loss(params, state, batch, key, step, frozen):
        metrics = measure(params, batch)
        return metrics["nll"], (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        metrics = measure(params, batch)
        return {"loss": metrics["nll"], **metrics}

    return _stage("generator", config, config.model_train, init=init, loss=loss, eval_loss=eval_loss)


def _drafter_stage(config: SpecVLMConfig) -> Stage:
    """Online distillation: the target's laws and features of each batch are made on the way, and nothing is stored."""
    model, drafter = config.build_model(), config.build_drafter()

    def init(key, frozen):
        text, visual = (jnp.zeros((1, n, model.width)) for n in (config.data.length, model.visual_tokens))
        return {"drafter": drafter.init(key, text, text, visual, method=_initialise)}, ()

    def measure(params, batch, frozen, key=None):
        target, tokens = modules(frozen)["generator"], batch["tokens"]
        visual = model.apply(target, pixels(batch["image"]), method="look")
        features = unit_features(model.apply(target, visual, tokens[:, :-1], method="features"))
        n = model.visual_tokens
        gate_key, key = (None, None) if key is None else jax.random.split(key)
        question = embed_tokens(model, target, tokens[:, :1])[:, 0]
        left = drafter.apply(params["drafter"], visual, features[:, :n], question, gate_key, method="see")
        value, metrics = distil_features(
            config.drafter,
            drafter,
            params["drafter"],
            model,
            target,
            tokens,
            features[:, n:],
            _weights(batch),
            key,
            prefix=left.tokens,
            count=left.count,
        )
        return value, metrics | _shares(config.compressor.ways, left.gates)

    def loss(params, state, batch, key, step, frozen):
        value, metrics = measure(params, batch, frozen, key)
        return value, (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        value, metrics = measure(params, batch, frozen)
        return {"loss": value, **metrics}

    fields = dict(init=init, loss=loss, eval_loss=eval_loss, needs=("generator",))
    return _stage("drafter", config, config.drafter_train, **fields)


def _initialise(drafter: FeatureDrafter, text, behind, visual):
    """Runs every part once."""
    left = drafter.see(visual, visual, text[:, 0])
    return drafter(text, behind, prefix=left.tokens, count=left.count)


def _shares(ways: tuple[str, ...], gates: Float[Array, "b w"]) -> dict[str, Float[Array, ""]]:
    """How often each way is taken."""
    return {f"way_{way}": share for way, share in zip(ways, gates.mean(0))} if len(ways) > 1 else {}
