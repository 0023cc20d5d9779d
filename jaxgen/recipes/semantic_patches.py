"""S140 SemAIM as a recipe: an encoder that learns by predicting patches, the ones that say most first."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxgen.data import DataConfig, Preprocess, image_batches, make_source, pixels
from jaxgen.generators.semantic_patches import SemanticPatchModel, SemanticPatchSampler
from jaxgen.hosts import to_host
from jaxgen.objectives.alignment import cosine_distance
from jaxgen.optim import OptimConfig, adamw
from jaxgen.orders_semantic import KINDS, patch_order, similarities
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes import next_scale
from jaxgen.recipes.features import FeatureConfig, FeatureTrainConfig, feature_stage, image_features
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.token_cache import check_no_cache
from jaxgen.resample import blur
from jaxgen.tokenizers.latents import LatentTokenizer
from jaxgen.train.loop import RunConfig

__all__ = ["SemanticModelConfig", "SemanticPatchConfig", "SemanticTrainConfig"]


@dataclasses.dataclass(frozen=True)
class SemanticModelConfig:
    """Sizes of `SemanticPatchModel`.

    Attributes:
      patch: side of a patch, in pixels.
      width, depth, heads, query_depth, mlp_ratio, dtype: see `SemanticPatchModel`.
    """

    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    query_depth: int = 12
    mlp_ratio: float = 4.0
    dtype: str = "float32"

    def __post_init__(self):
        check_fields("model", self, patch=1, width=1, depth=1, heads=1, query_depth=1, mlp_ratio=0.1)
        check_dtype("model", self.dtype)


@dataclasses.dataclass(frozen=True)
class SemanticTrainConfig:
    """How it is trained.

    Attributes:
      steps: updates; 0 takes it from the work directory as it is.
      batch_size: global.
      accumulate: micro-batches an update.
      ema: decay, 0 is off.
      order: see `patch_order`.
      target: "features" of each patch in the eyes of the frozen encoder, whose features order the patches, too; or "pixels",
        where the model's own features of the whole image order them.
      blur: of the images whose pixels are predicted, in pixels.
      optim: AdamW and its schedule.
    """

    steps: int = 1000
    batch_size: int = 256
    accumulate: int = 1
    ema: float = 0.0
    order: str = "semantic"
    target: str = "features"
    blur: float = 1.0
    optim: OptimConfig = OptimConfig()

    def __post_init__(self):
        check_fields("model_train", self, steps=0, batch_size=1, accumulate=1, blur=0, shares=("ema",))
        for name, known in (("order", KINDS), ("target", ("features", "pixels"))):
            if getattr(self, name) not in known:
                raise ValueError(f"model_train.{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class SemanticPatchConfig:
    """Everything that defines a run. `recipe()` builds it.

    Attributes:
      image_size: side of the images.
    """

    data: DataConfig = DataConfig()
    image_size: int = 224
    features: FeatureConfig = FeatureConfig()
    features_train: FeatureTrainConfig = FeatureTrainConfig()
    model: SemanticModelConfig = SemanticModelConfig()
    model_train: SemanticTrainConfig = SemanticTrainConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self):
        if self.image_size != self.features.grid * self.model.patch:
            raise ValueError(
                f"image_size={self.image_size}: expected features.grid={self.features.grid} patches of "
                f"model.patch={self.model.patch} pixels"
            )

    def resolve(self) -> SemanticPatchConfig:
        """The configuration itself, once it is known to fit the data.

        Raises:
          ValueError: the data cannot be read, or has images of another size.
        """
        source = make_source(self.data, "train")
        found = (self.data.image_size,) * 2 if self.data.image_size else source[0]["image"].shape[:2]
        if found != (self.image_size,) * 2:
            raise ValueError(f"image_size={self.image_size}: the images of data.path={self.data.path} are {found[0]}x{found[1]}")
        return self

    def build_tokenizer(self) -> LatentTokenizer:
        """Images <-> patches of pixels."""
        return LatentTokenizer(image_size=self.image_size, channels=self.data.channels, patch=self.model.patch)

    def build_generator(self) -> SemanticPatchModel:
        """The model."""
        tokenizer, fields = self.build_tokenizer(), dataclasses.asdict(self.model)
        fields.pop("patch")
        return SemanticPatchModel(
            length=tokenizer.length,
            channels=tokenizer.token_channels,
            targets=self.features.width if self.model_train.target == "features" else tokenizer.token_channels,
            **fields | dict(dtype=jnp.dtype(self.model.dtype)),
        )

    def build_sampler(self) -> SemanticPatchSampler:
        """From images to their completions."""
        return SemanticPatchSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())

    def recipe(self) -> Recipe:
        """The stages and the sampler."""
        check_no_cache(self.data, "patches are cut from images")
        stages = [pretraining_stage(self)]
        if self.model_train.target == "features":
            stages.insert(0, feature_stage(self.features, self.features_train, self.data))
        return Recipe(config=self, stages=tuple(stages), sample=functools.partial(_sample, self), cfg=0.0, top_p=0.0)

    def encode(self, params: dict[str, Any], images: Float[Array, "b H W C"]) -> Float[Array, "b 1+n d"]:
        """What was learnt: the model's features of images in [-1, 1], the whole first.

        Args:
          params: by stage.
          images: of the size of the data.
        """
        return _encode(self.build_sampler(), modules(params)["generator"], images)

    def judge(self, params: dict[str, Any], images: Float[Array, "b H W C"]) -> Float[Array, "b 1+n d"]:
        """The features by which the patches of images are ordered; traceable, without gradients.

        Args:
          params: variables by module.
          images: in [-1, 1].
        """
        if self.model_train.target == "features":
            return image_features(self.features, params["encoder"], images)
        patches = self.build_tokenizer().encode(images)
        return jax.lax.stop_gradient(self.build_generator().apply(params["generator"], patches, method="encode"))


@functools.partial(jax.jit, static_argnums=0)
def _encode(sampler: SemanticPatchSampler, variables, images):
    return sampler.generator.apply(variables, sampler.tokenizer.encode(images), method="encode")


def pretraining_stage(config: SemanticPatchConfig) -> Stage:
    """The mean distance of patches from what was predicted of them (section 3 of the paper, and its released losses).

    Features: the squared distance of unit vectors. Pixels: the squared error of patches of the blurred image, each with mean 0
    and deviation 1. To both, the squared error of pixels that are read without teaching anything else.
    """
    train, tokenizer, model = config.model_train, config.build_tokenizer(), config.build_generator()

    def init(key, frozen):
        patches = jnp.zeros((1, tokenizer.length, tokenizer.token_channels))
        return {"generator": model.init(key, patches, jnp.arange(tokenizer.length)[None])}, ()

    def score(params, batch, key, frozen):
        images = pixels(batch["image"])
        patches = tokenizer.encode(images)
        told = config.judge(modules(frozen) | params, images)
        orders = patch_order(train.order, similarities(told), key)
        predicted, seen = model.apply(params["generator"], patches, orders)
        if train.target == "features":
            value = 2 * cosine_distance(predicted, told[:, 1:]).mean()
        else:
            target = tokenizer.encode(blur(images, train.blur))
            std = jnp.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
            value = jnp.square(predicted - (target - target.mean(-1, keepdims=True)) / std).mean()
        error = jnp.square(seen - patches).mean()
        return value, error

    def loss(params, state, batch, key, step, frozen):
        value, error = score(params, batch, key, frozen)
        return value + error, ({"prediction": value, "pixels": error}, state)

    def eval_loss(params, state, batch, key, frozen):
        value, error = score(params, batch, key, frozen)
        return {"loss": value, "pixels": error}

    return Stage(
        name="generator",
        steps=train.steps,
        init=init,
        loss=loss,
        optimizer=adamw(train.optim, train.steps) if train.steps else optax.identity(),
        data=functools.partial(image_batches, config.data, train.batch_size, "train"),
        needs=("encoder",) if train.target == "features" else (),
        eval_data=functools.partial(image_batches, config.data, train.batch_size, "test"),
        eval_loss=eval_loss,
        rules=next_scale.RULES,
        ema=train.ema,
        accumulate=train.accumulate,
    )


def _sample(
    config: SemanticPatchConfig, params, key, labels, *, known=0.25, cfg=0.0, temperature=1.0, top_k=0, top_p=0.0
) -> dict:
    """Held-out images of the wanted classes, of which the first `known` share of the patches stays and the rest is completed.

    Raises:
      ValueError: a class that no held-out image has, a share out of range, or settings of laws, of which there are none.
    """
    settings = dict(cfg=(cfg, 0), temperature=(temperature, 1), top_k=(top_k, 0), top_p=(top_p, 0, 1))
    for name, (value, *off) in settings.items():
        if value not in off:
            raise ValueError(f"{name}={value}: what is predicted is a mean, not a law; {name}={off[0]} turns it off")
    if not 0 <= known <= 1:
        raise ValueError(f"known={known}: expected a share in [0, 1]")
    sampler, variables = config.build_sampler(), modules(params)
    keys = jax.random.split(key)
    images = _held_out(config.data, to_host(labels), keys[0])
    orders = _orders(config, variables, images, keys[1])
    made = sampler(variables["generator"], images, orders, round(known * sampler.generator.length))
    return {"images": made, "originals": images, "orders": orders}


@functools.partial(jax.jit, static_argnums=0)
def _orders(config: SemanticPatchConfig, variables, images, key) -> Int[Array, "b n"]:
    return patch_order(config.model_train.order, similarities(config.judge(variables, images)), key)


def _held_out(data: DataConfig, labels: Int[np.ndarray, "b"], key) -> Float[Array, "b H W C"]:
    """A random held-out image of each label's class; different ones where a label comes again, as long as there are some."""
    source = make_source(data, "test")
    prepare = Preprocess(**{name: getattr(data, name) for name in ("channels", "image_size", "mid_scale")})
    waiting = {label: np.flatnonzero(labels == label).tolist() for label in set(labels.tolist())}
    found: dict[int, np.ndarray] = {}
    for index in np.random.default_rng(np.asarray(jax.random.key_data(key))).permutation(len(source)).tolist():
        if not any(waiting.values()):
            break
        example = source[index]
        places = waiting.get(int(example["label"]))
        if places:
            found[places.pop(0)] = prepare(example)["image"]
    for label, places in waiting.items():
        same = [found[place] for place in np.flatnonzero(labels == label).tolist() if place in found]
        if not same:
            raise ValueError(f"label {label}: no held-out image of data.path={data.path} is of this class")
        found |= {place: same[i % len(same)] for i, place in enumerate(places)}
    return pixels(np.stack([found[place] for place in range(len(labels))]))
