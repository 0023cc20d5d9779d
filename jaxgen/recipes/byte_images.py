"""S016 JPEG-LM: a plain Llama over the bytes of files; and over the bytes of pixels, which it is measured against."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import storage
from jaxgen.data import DataConfig, image_batches, make_source
from jaxgen.decoding import JpegGrammar, Settings
from jaxgen.generators import ImageLlama, NextTokenSampler
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.optim import adamw
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.classifier import classifier_stage
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.image_llama import RULES, ImageLlamaModelConfig
from jaxgen.recipes.next_scale import ClassifierConfig, ModelTrainConfig
from jaxgen.recipes.token_cache import check_no_cache
from jaxgen.tokenizers.bytes import END, ByteTokenizer, PixelCodec, from_tokens, to_tokens
from jaxgen.tokenizers.jpeg import JpegCodec
from jaxgen.train.loop import RunConfig

__all__ = ["ByteImageConfig", "CodecConfig", "jpeg_grammar", "likelihood", "save_files"]

KINDS = ("jpeg", "pixels")


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """How images become bytes.

    Attributes:
      kind: "jpeg", or "pixels" for a byte a number.
      length: tokens a model reads and makes; files with fewer bytes are filled up, longer ones are cut.
      size: side of the images; 0 is what the data have.
      quality, subsampling, restart, header: see `JpegCodec`.
    """

    kind: str = "jpeg"
    length: int = 64
    size: int = 0
    quality: int = 25
    subsampling: str = "4:2:0"
    restart: int = 0
    header: str = "none"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"codec.kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        check_fields("codec", self, length=1, size=0)
        self.build(3)

    def build(self, channels: int) -> JpegCodec | PixelCodec:
        """The codec of images with so many channels."""
        size = self.size or 8
        if self.kind == "pixels":
            return PixelCodec((size, size, channels))
        try:
            return JpegCodec(size, channels, self.quality, self.subsampling, self.restart, self.header)
        except ValueError as error:
            raise ValueError(f"codec.{error}") from None


@dataclasses.dataclass(frozen=True)
class ByteImageConfig:
    """Everything that defines a run. `recipe()` builds it.

    Attributes:
      constrained: sampling keeps to the grammar of the files, unless it is told otherwise.
    """

    data: DataConfig = DataConfig()
    codec: CodecConfig = CodecConfig()
    model: ImageLlamaModelConfig = ImageLlamaModelConfig()
    model_train: ModelTrainConfig = ModelTrainConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    constrained: bool = True
    run: RunConfig = RunConfig()

    def resolve(self) -> ByteImageConfig:
        """The configuration with the images' size filled in from the data.

        Raises:
          ValueError: the data cannot be read, have more classes or another size, or files longer than `codec.length` among the
            first hundred.
        """
        source, data = make_source(self.data, "train"), self.data
        if source.num_classes > self.model.num_classes:
            raise ValueError(f"model.num_classes={self.model.num_classes}: {data.path} has {source.num_classes} classes")
        found = (data.image_size,) * 2 if data.image_size else source[0]["image"].shape[:2]
        if found[0] != found[1] or self.codec.size not in (0, found[0]):
            raise ValueError(f"images of {found[0]}x{found[1]} (data.path={data.path}): codec.size={self.codec.size}")
        config = dataclasses.replace(self, codec=dataclasses.replace(self.codec, size=found[0]))
        codec, longest = config.codec.build(data.channels), 0
        for image in next(iter(image_batches(data, 100, "test", 0, 1)))["image"]:
            longest = max(longest, len(codec.encode(image)))
        if longest > config.codec.length:
            raise ValueError(f"codec.length={config.codec.length}: there are files of {longest} bytes")
        return config

    @property
    def num_classes(self) -> int:
        """Classes of the generator."""
        return self.model.num_classes

    def build_tokenizer(self) -> ByteTokenizer:
        """The codec as a tokenizer."""
        return ByteTokenizer(codec=self.codec.build(self.data.channels), length=self.codec.length)

    def build_generator(self) -> ImageLlama:
        """The generator module: the tokens have a place in the file only, and so one axis."""
        fields = dict(vocab=ByteTokenizer.vocab, grid=(self.codec.length,), dtype=jnp.dtype(self.model.dtype))
        return ImageLlama(**dataclasses.asdict(self.model) | fields)

    def build_sampler(self, constrained: bool | None = None) -> NextTokenSampler:
        """From key and labels to files, within their grammar if `constrained`; None is as configured. Pixels have none."""
        tokenizer = self.build_tokenizer()
        wanted = self.constrained if constrained is None else constrained
        jpeg = wanted and self.codec.kind == "jpeg"
        grammar = jpeg_grammar(tokenizer.codec, self.codec.length) if jpeg else None
        return NextTokenSampler(generator=self.build_generator(), tokenizer=tokenizer, grammar=grammar, stop=END)

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        check_no_cache(self.data, "files are made of images")
        stages = [_stage(self)]
        if self.classifier.steps:
            fields = dataclasses.asdict(self.classifier)
            stages.append(classifier_stage(self.data, num_classes=self.num_classes, **fields))

        def write(folder, tokens):
            return save_files(folder, self.build_tokenizer().codec, tokens)

        return Recipe(config=self, stages=tuple(stages), sample=functools.partial(_sample, self), write=write)


def jpeg_grammar(codec: JpegCodec, length: int) -> JpegGrammar:
    """The grammar of a codec's bytes, at most `length` of them.

    Raises:
      ValueError: no file is so short.
    """
    blocks = tuple((0, 1) if component == 0 else (2, 3) for component in codec.blocks)
    fields = dict(mcus=codec.mcus, restart=codec.restart, head=codec.head)
    return JpegGrammar(tables=codec.tables, blocks=blocks, length=length, end=END, **fields)


def likelihood(logits, tokens) -> dict:
    """Nats a token and an image, and how often the likeliest is right; what follows an image's first `END` does not count."""
    counts = jnp.cumsum(tokens == END, axis=1) - (tokens == END) == 0
    nll = cross_entropy(logits, tokens) * counts
    hits = ((logits.argmax(-1) == tokens) & counts).sum()
    return {"nll": nll.sum() / counts.sum(), "nll_image": nll.sum(1).mean(), "token_accuracy": hits / counts.sum()}


def _stage(config: ByteImageConfig) -> Stage:
    """Maximum likelihood of the files' bytes, which the data pipeline makes."""
    train, generator, tokenizer = config.model_train, config.build_generator(), config.build_tokenizer()

    def init(key, frozen):
        return {"generator": generator.init(key, jnp.zeros((1,), jnp.int32), jnp.zeros((1, generator.length), jnp.int32))}, ()

    def loss(params, state, batch, key, step, frozen):
        drop_key, dropout_key = jax.random.split(key)
        labels = drop_labels(drop_key, batch["label"], generator.num_classes, train.class_drop)
        rngs = {"dropout": dropout_key}
        logits = generator.apply(params["generator"], labels, batch["tokens"], train=True, rngs=rngs)
        metrics = likelihood(logits, batch["tokens"])
        return metrics["nll"], (metrics, state)

    def eval_loss(params, state, batch, key, frozen):
        metrics = likelihood(generator.apply(params["generator"], batch["label"], batch["tokens"]), batch["tokens"])
        return {"loss": metrics["nll"], **metrics}

    def to_bytes(batch):
        rows = [to_tokens(tokenizer.codec.encode(image), tokenizer.length) for image in batch["image"]]
        return {"tokens": np.stack(rows), "label": batch["label"]}

    def batches(split, shard_index, shard_count):
        return image_batches(config.data, train.batch_size, split, shard_index, shard_count).map(to_bytes)

    return Stage(
        name="generator",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(batches, "train"),
        eval_data=functools.partial(batches, "test"),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=RULES,
    )


def _sample(
    config: ByteImageConfig, params: Mapping[str, Any], key, labels, *, constrained: bool | None = None, **settings
) -> dict:
    """Files of classes; settings are those of `jaxgen.decoding.Settings`, `constrained` as in `build_sampler`.

    Returns:
      "images" [b, H, W, C], grey where "valid" [b] is false, and the bytes as "tokens" [b, l], see `save_files`.
    """
    sampler = config.build_sampler(constrained)
    variables = modules(params)
    _, tokens = dataclasses.replace(sampler, tokenizer=None)(variables, key, labels, Settings(**settings))
    images, valid = sampler.tokenizer.apply({}, tokens, method="read")
    return {"images": images, "tokens": tokens, "valid": valid}


def save_files(folder: str | os.PathLike, codec: JpegCodec | PixelCodec, tokens) -> list[storage.Place]:
    """Writes each row as a file: `0000.jpg` if it is valid, and its bytes alone as `0000.bin` if it is not.

    Args:
      folder: made if missing.
      codec: of the bytes.
      tokens: [b, l].

    Raises:
      ValueError: a file cannot be written.
    """
    paths, top = [], storage.place(folder)
    for i, data in enumerate(map(from_tokens, np.asarray(tokens))):
        try:
            codec.decode(data)
            path, data = top / f"{i:04}.{codec.suffix}", codec.file(data)
        except ValueError:
            path = top / f"{i:04}.bin"
        try:
            with storage.whole(path) as temporary:
                temporary.write_bytes(data)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths
