"""S159 RDM as a recipe: a tokenizer, an encoder of images, and a transformer that sees the neighbours of what it is to make."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.data import DataConfig, Source, batches, make_source, pixels
from jaxgen.decoding import Settings
from jaxgen.generators.retrieval_llama import RetrievalLlama, RetrievalSampler, neighbours
from jaxgen.hosts import to_host
from jaxgen.nn.cross_attention import Context
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import next_scale
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig, feature_stage, image_features
from jaxgen.recipes.fields import check_fields
from jaxgen.recipes.image_llama import RULES, ImageLlamaConfig
from jaxgen.recipes.token_cache import check_no_cache
from jaxgen.retrieval import Index, build_index, check_index, empty_index

__all__ = ["RetrievalConfig", "RetrievalLlamaConfig", "images_of"]


@dataclasses.dataclass(frozen=True)
class RetrievalConfig:
    """What is retrieved from.

    Attributes:
      path: of the database, as `data.path`; empty is the training split of the data.
      classes: only images of these are in the database; empty is all.
      trained: only images of these are trained on; empty is all.
      limit: entries at most.
      k: neighbours of each image.
      below: while training, entries as similar as this to an image are that image, and are not given.
    """

    path: str = ""
    classes: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()
    limit: int = 100_000
    k: int = 4
    below: float = 0.9999

    def __post_init__(self):
        check_fields("retrieval", self, limit=1, k=1, below=-1)
        if self.limit < self.k:
            raise ValueError(f"retrieval.k={self.k}: retrieval.limit={self.limit} entries are fewer neighbours")


@dataclasses.dataclass(frozen=True)
class RetrievalLlamaConfig(ImageLlamaConfig):
    """Everything that defines a run. `recipe()` builds it. The model knows no classes: `model.num_classes` are the data's."""

    features: FeatureConfig = FeatureConfig()
    features_train: FeatureTrainConfig = FeatureTrainConfig()
    retrieval: RetrievalConfig = RetrievalConfig()

    def build_generator(self) -> RetrievalLlama:
        """The generator module."""
        fields = self._generator_fields()
        fields.pop("num_classes")
        return RetrievalLlama(feature_width=self.features.width, **fields)

    def build_sampler(self) -> RetrievalSampler:
        """From a database to images."""
        return RetrievalSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer(), k=self.retrieval.k)

    def build_database(self, variables: Mapping[str, Any], path: str = "", classes: tuple[int, ...] = ()) -> Index:
        """The database, or another one.

        Args:
          variables: by module, the encoder's among them.
          path: in place of the configuration's.
          classes: of the images; empty is the configuration's, or with another path all.

        Raises:
          ValueError: there is nothing at the path, no image of the classes, or fewer than neighbours.
        """
        classes = classes or (() if path else self.retrieval.classes)
        features, labels = [], []
        for images, own in images_of(self.database_config(path), classes, self.retrieval.limit):
            features.append(to_host(_describe(self, variables["encoder"], images)))
            labels.append(own)
        index = build_index(np.concatenate(features), np.concatenate(labels))
        check_index(index, self.retrieval.k, self.features.width)
        return index

    def database_config(self, path: str = "") -> DataConfig:
        """Where the images of the database are, or of the one at `path`."""
        path = path or self.retrieval.path
        return dataclasses.replace(self.data, path=path, flip=False) if path else self.data

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        check_no_cache(self.data, "neighbours are looked up by the features of images")
        base = super().recipe()
        encoder = feature_stage(self.features, self.features_train, self.data)
        stages = []
        for stage in base.stages:
            stages += [encoder, retrieval_stage(self, stage)] if stage.name == "generator" else [stage]
        return dataclasses.replace(base, stages=tuple(stages), sample=functools.partial(_sample, self, {}))


@functools.partial(jax.jit, static_argnums=0)
def _describe(config: RetrievalLlamaConfig, variables, images):
    """What neighbours are compared by, and the model sees of them: the mean of the patches' features."""
    return image_features(config.features, variables, pixels(images))[:, 1:].mean(axis=1)


def images_of(data: DataConfig, classes: tuple[int, ...], limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(Images as held-out ones are prepared, uint8; labels) of the training split, at most `limit` of them, in one random order.

    They come in parts, as they are read: all of them may be more than a host has memory for.

    Raises:
      ValueError: none of the classes.
    """
    source = _of_classes(make_source(data, "train"), classes, data)
    with contextlib.closing(iter(batches(source, data, batch_size=min(256, limit), train=False))) as parts:
        for batch in parts:
            yield batch["image"][:limit], batch["label"][:limit]
            limit -= len(batch["label"])
            if limit <= 0:
                return


def _of_classes(source: Source, classes: tuple[int, ...], data: DataConfig) -> Source:
    """The examples of these classes; all, where none are named."""
    if not classes:
        return source
    if not hasattr(source, "labels"):
        raise ValueError(f"classes={classes}: the images of data.path={data.path} are drawn, and cannot be chosen by class")
    places = np.flatnonzero(np.isin(source.labels, classes))
    if not len(places):
        raise ValueError(f"classes={classes}: data.path={data.path} has no image of them, only 0..{source.num_classes - 1}")
    return source.subset(places)


def retrieval_stage(config: RetrievalLlamaConfig, base: Stage) -> Stage:
    """Maximum likelihood of an image's tokens, given the database's entries most similar to it (equation 3 of the paper).

    The database is what the stage keeps beside its parameters; whoever samples builds it again, or another one.
    """
    train, tokenizer, generator = config.model_train, config.build_tokenizer(), config.build_generator()
    k, below = config.retrieval.k, config.retrieval.below

    def init(key, frozen):
        database = config.database_config()
        source = _of_classes(make_source(database, "train"), config.retrieval.classes, database)
        count = min(len(source), config.retrieval.limit)
        if count < k + (not config.retrieval.path):
            own = "" if config.retrieval.path else ", and an image is no neighbour of its own"
            raise ValueError(f"retrieval.k={k}: the database has {count} images{own}")
        context = generator.unconditional(1, k)
        params = {"generator": generator.init(key, context, jnp.zeros((1, generator.length), jnp.int32))}
        return params, empty_index(count, config.features.width)

    def read(batch, frozen, index):
        variables = modules(frozen)
        tokens = tokenizer.apply(variables["tokenizer"], pixels(batch["image"]), method="encode")
        queries = _describe(config, variables["encoder"], batch["image"])
        return tokens, neighbours(index, queries, k, below=below)

    def loss(params, index, batch, key, step, frozen):
        drop_key, path_key = jax.random.split(key)
        tokens, found = read(batch, frozen, index)
        kept = ~jax.random.bernoulli(drop_key, train.class_drop, (len(tokens), 1))
        found = Context(found.features, found.mask & kept)
        logits = generator.apply(params["generator"], found, tokens, train=True, rngs={"dropout": path_key})
        value, metrics = config.objective(lambda tokens: logits, tokens, tokens, step)
        return value, (metrics, index)

    def eval_loss(params, index, batch, key, frozen):
        tokens, found = read(batch, frozen, index)
        value, metrics = config.objective(lambda tokens: generator.apply(params["generator"], found, tokens), tokens, tokens, 0)
        return {"loss": metrics["nll"], **metrics}

    def data(split, shard_index, shard_count):
        source = _of_classes(make_source(config.data, split), config.retrieval.trained, config.data)
        shard = dict(shard_index=shard_index, shard_count=shard_count)
        return batches(source, config.data, batch_size=train.batch_size, train=split == "train", **shard)

    return dataclasses.replace(
        base,
        init=init,
        fill=lambda frozen: config.build_database(modules(frozen)),
        loss=loss,
        eval_loss=eval_loss,
        data=functools.partial(data, "train"),
        eval_data=functools.partial(data, "test"),
        needs=(*base.needs, "encoder"),
        rules=(*RULES, *next_scale.RULES),  # the latter for the attention to neighbours
    )


def _sample(
    config: RetrievalLlamaConfig, kept: dict, params, key, labels, *, database: str | Index = "", classes=(), **settings
) -> dict:
    """Images from neighbours in the database, or in another one: `database` is its path, or an index of features.

    `classes` are those of the images in it. Databases are built once for an encoder; see `RetrievalSampler.__call__` for errors.
    """
    variables = modules(params)
    index = database
    if not isinstance(database, Index):
        asked = database, tuple(classes)
        encoder, index = kept.get(asked, (None, None))
        if encoder is not variables["encoder"]:
            index = config.build_database(variables, *asked)
            kept[asked] = variables["encoder"], index
    images, tokens, ids = config.build_sampler()(variables, key, index, labels, Settings(**settings))
    return {"images": images, "tokens": tokens, "neighbours": ids}
