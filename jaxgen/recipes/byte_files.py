"""A plain Llama over the bytes of files, whatever they show: what the recipes of S016 share."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from jaxgen import storage
from jaxgen.decoding import FileGrammar, FileTokens, Settings
from jaxgen.generators import ImageLlama, NextTokenSampler
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.optim import adamw
from jaxgen.recipe import PICTURES, Recipe, Stage, modules
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.image_llama import RULES, ImageLlamaModelConfig
from jaxgen.recipes.next_scale import ClassifierConfig, ModelTrainConfig
from jaxgen.tokenizers.bytes import END, ByteTokenizer, Codec
from jaxgen.tokenizers.pairs import Pairs, learn_pairs
from jaxgen.train.loop import RunConfig

__all__ = ["LEARNT_FROM", "ByteFileConfig", "FileCodecConfig", "likelihood", "save_files"]

LEARNT_FROM = 128  # training files that pairs are learnt from


@dataclasses.dataclass(frozen=True)
class FileCodecConfig:
    """How files become tokens.

    Attributes:
      length: tokens a model reads and makes; files with fewer are filled up, longer ones are cut.
      merges: tokens for pairs of bytes, of pairs, and so on; 0: a token is a byte.
      pairs: what they stand for, see `Pairs.merges`; empty until `resolve` has learnt them from training files.
      kind: of the files, or "pixels" for a byte a number.
    """

    length: int = 64
    merges: int = 0
    pairs: tuple[int, ...] = ()
    kind: str = "pixels"

    kinds = ("pixels",)  # a fact of the class, not a field

    def __post_init__(self):
        if self.kind not in self.kinds:
            raise ValueError(f"codec.kind={self.kind!r}: expected one of {', '.join(self.kinds)}")
        check_fields("codec", self, length=1, merges=0)
        try:
            learnt = len(Pairs(self.pairs))
        except ValueError as error:
            raise ValueError(f"codec.pairs: {error}") from None
        if learnt > self.merges:
            raise ValueError(f"codec.pairs: {learnt} merges, expected at most codec.merges={self.merges}")


# Bytes and the end: one more than a number that devices divide.
BYTE_RULES = (
    (r"token_embed/embedding", P(None, ("fsdp", "tensor"))),
    (r"head/kernel", P(("fsdp", "tensor"), None)),
    *RULES,
)


@dataclasses.dataclass(frozen=True)
class ByteFileConfig:
    """A run, but for its data and its codec, the fields `data` and `codec` (a `FileCodecConfig`) of those that derive from it.

    Attributes:
      constrained: sampling keeps to the grammar of the files, unless it is told otherwise.
      classifier: that judges samples.
    """

    model: ImageLlamaModelConfig = ImageLlamaModelConfig()
    model_train: ModelTrainConfig = ModelTrainConfig()
    constrained: bool = True
    classifier: ClassifierConfig = ClassifierConfig()
    run: RunConfig = RunConfig()

    modality = "image"  # see `Recipe`; a fact of the class, not a field

    def build_codec(self) -> Codec:
        """Between what the data are and bytes."""
        raise NotImplementedError

    def build_grammar(self) -> FileGrammar | None:
        """Of the files; None if there is none to keep to."""
        raise NotImplementedError

    def token_batches(self, split: str, shard_index: int, shard_count: int):
        """Batches of the files' "tokens" [b, l] and the "label" [b] of each."""
        raise NotImplementedError

    def judge_stage(self) -> Stage:
        """What trains the judge of samples, a classifier of the data."""
        raise NotImplementedError

    def with_pairs(self, files: Iterable[bytes]) -> ByteFileConfig:
        """The configuration with pairs that are learnt from files, if it wants some and has none."""
        if not self.codec.merges or self.codec.pairs:
            return self
        pairs = learn_pairs(files, self.codec.merges)
        return dataclasses.replace(self, codec=dataclasses.replace(self.codec, pairs=pairs.merges))

    def check_length(self, files: Iterable[bytes]) -> None:
        """Raises ValueError if there are files of more tokens than a model makes."""
        pairs, codec = Pairs(self.codec.pairs), self.codec
        longest = max(len(pairs.encode(file)) for file in files)
        if longest > codec.length:
            raise ValueError(f"codec.length={codec.length}: there are files of {longest} {'tokens' if codec.merges else 'bytes'}")

    @property
    def num_classes(self) -> int:
        """Classes of the generator."""
        return self.model.num_classes

    def build_tokenizer(self) -> ByteTokenizer:
        """The codec as a tokenizer."""
        fields = dict(length=self.codec.length, pairs=Pairs(self.codec.pairs), merges=self.codec.merges)
        return ByteTokenizer(codec=self.build_codec(), **fields)

    def build_file_tokenizer(self) -> ByteTokenizer:
        """`build_tokenizer`, for files that a model is to learn from.

        Raises:
          ValueError: pairs that have not been learnt yet.
        """
        if self.codec.merges and not self.codec.pairs:
            raise ValueError(f"codec.merges={self.codec.merges}: codec.pairs is empty; resolve() the configuration first")
        return self.build_tokenizer()

    def build_generator(self) -> ImageLlama:
        """The generator module: the tokens have a place in the file only, and so one axis."""
        fields = dict(vocab=self.build_tokenizer().vocab, grid=(self.codec.length,), dtype=jnp.dtype(self.model.dtype))
        return ImageLlama(**dataclasses.asdict(self.model) | fields)

    def build_sampler(self, constrained: bool | None = None) -> NextTokenSampler:
        """From key and labels to files, within their grammar if `constrained`; None is as configured."""
        tokenizer, wanted = self.build_tokenizer(), self.constrained if constrained is None else constrained
        grammar = self.build_grammar() if wanted else None
        if grammar is not None:
            grammar = FileTokens(grammar, tokenizer.length, tokenizer.pairs.pieces, tokenizer.vocab, END)
        return NextTokenSampler(generator=self.build_generator(), tokenizer=tokenizer, grammar=grammar, stop=END)

    def recipe(self) -> Recipe:
        """The generator's stage, that of the judge if it is trained, and the sampler."""

        def write(folder, tokens):
            return save_files(folder, self.build_tokenizer(), tokens)

        sample = functools.partial(_sample, self)
        stages = (_stage(self), *([self.judge_stage()] if self.classifier.steps else []))
        return Recipe(config=self, stages=stages, sample=sample, write=write, modality=self.modality)


def likelihood(logits, tokens) -> dict:
    """Nats a token and a file, and how often the likeliest is right; what follows a file's first `END` does not count.

    With pairs a file's nats are those of its one segmentation, an upper bound of those of its bytes.
    """
    counts = jnp.cumsum(tokens == END, axis=1) - (tokens == END) == 0
    nll = cross_entropy(logits, tokens) * counts
    hits = ((logits.argmax(-1) == tokens) & counts).sum()
    return {"nll": nll.sum() / counts.sum(), "nll_image": nll.sum(1).mean(), "token_accuracy": hits / counts.sum()}


def _stage(config: ByteFileConfig) -> Stage:
    """Maximum likelihood of the files' bytes, which the data pipeline makes."""
    train, generator = config.model_train, config.build_generator()

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

    return Stage(
        name="generator",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(config.token_batches, "train"),
        eval_data=functools.partial(config.token_batches, "test"),
        eval_loss=eval_loss,
        ema=train.ema,
        accumulate=train.accumulate,
        rules=BYTE_RULES,
    )


def _sample(
    config: ByteFileConfig, params: Mapping[str, Any], key, labels, *, constrained: bool | None = None, **settings
) -> dict:
    """Files of classes; settings are those of `jaxgen.decoding.Settings`, `constrained` as in `build_sampler`.

    Returns:
      What the files show as "images" or "clips" [b, ..., H, W, C], grey where "valid" [b] is false, and the bytes as "tokens"
      [b, l], see `save_files`.
    """
    sampler = config.build_sampler(constrained)
    variables = modules(params)
    _, tokens = dataclasses.replace(sampler, tokenizer=None)(variables, key, labels, Settings(**settings))
    pictures, valid = sampler.tokenizer.apply({}, tokens, method="read")
    return {PICTURES[config.modality]: pictures, "tokens": tokens, "valid": valid}


def save_files(folder: str | os.PathLike, tokenizer: ByteTokenizer, tokens) -> list[storage.Place]:
    """Writes each row as a file: `0000.jpg` if it is valid, and its bytes alone as `0000.bin` if it is not.

    Args:
      folder: made if missing.
      tokenizer: of the files.
      tokens: [b, l].

    Raises:
      ValueError: a file cannot be written.
    """
    codec, paths, top = tokenizer.codec, [], storage.place(folder)
    for i, data in enumerate(map(tokenizer.file, np.asarray(tokens))):
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
