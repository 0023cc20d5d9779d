"""Next-scale systems that sample any list of scales from one checkpoint (S064 FlexVAR): configuration, stages and sampler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.data import pixels
from jaxgen.generators import FlexibleSampler, FlexibleTransformer
from jaxgen.objectives.likelihood import cross_entropy, drop_labels
from jaxgen.recipe import Recipe, Stage, modules
from jaxgen.recipes.fields import check_dtype, check_fields
from jaxgen.recipes.next_scale import NextScaleConfig, generator_stage, sample_images
from jaxgen.recipes.token_cache import check_no_cache
from jaxgen.scale_lists import Cells, DrawRule, check_increasing, draw_lists
from jaxgen.tokenizers import FlexibleTokenizer

__all__ = ["FlexibleConfig", "FlexibleTokenizerConfig", "Forcing", "flexible_stage"]

# Lists that training draws from; each is 8 bytes a scale.
LISTS = 4096


@dataclasses.dataclass(frozen=True)
class FlexibleTokenizerConfig:
    """Sizes of `FlexibleTokenizer`; channels come from the data."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    attention: bool = True
    groups: int = 32
    dropout: float = 0.0
    z_channels: int = 256
    vocab: int = 8912
    width: int = 32
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    beta: float = 0.25
    codebook_init: float = 1.0
    decoded: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        sizes = dict(ch=1, ch_mult=1, res_blocks=1, groups=1, z_channels=1, vocab=1, width=1, patch_nums=1, decoded=0)
        check_fields("tokenizer", self, **sizes, beta=0, shares=("dropout",))
        check_increasing(self.patch_nums)
        check_dtype("tokenizer", self.dtype)

    def build(self, channels: int) -> FlexibleTokenizer:
        """The module, for images of so many channels."""
        return FlexibleTokenizer(channels=channels, **dataclasses.asdict(self) | dict(dtype=jnp.dtype(self.dtype)))


class Forcing(NamedTuple):
    """A batch as a next-scale model is trained on it, whatever its list of scales.

    Attributes:
      tokens: what is to be predicted.
      inputs: what the model reads: the true tokens of earlier scales.
      rollout: `predicted tokens -> inputs`, where each scale reads the prediction for the scale before it.
      logits: `(variables, labels, inputs, **kwargs) -> logits` of the generator.
      share: of each position in a mean over all of them.
      ramp: how far through the scales each position is, 0 at the first and 1 at the last.
      first: positions of the first scale, which reads nothing.
    """

    tokens: Int[Array, "b l"]
    inputs: Float[Array, "b l-first c"]
    rollout: Callable[[Int[Array, "b l"]], Float[Array, "b l-first c"]]
    logits: Callable[..., Float[Array, "b l v"]]
    share: Float[Array, "l"]
    ramp: Float[Array, "l"]
    first: int


@dataclasses.dataclass(frozen=True)
class FlexibleConfig(NextScaleConfig):
    """`NextScaleConfig` without residuals, trained on random lists of scales.

    Attributes:
      lists: how lists are drawn in training; evaluation is on the tokenizer's own.
      map_size: see `FlexibleTransformer`.
      guidance, drawn: see `FlexibleSampler`, whose limit is the tokenizer's last scale.

    Raises:
      ValueError: scales that do not increase, or ranges of `lists` that reach the last one.
    """

    tokenizer: FlexibleTokenizerConfig = FlexibleTokenizerConfig()
    lists: DrawRule = DrawRule()
    map_size: int = 32
    guidance: str = "ramp"
    drawn: tuple[int, ...] = ()

    def __post_init__(self):
        draw_lists(self.lists, self.tokenizer.patch_nums, 1)

    def build_tokenizer(self) -> FlexibleTokenizer:
        """The tokenizer module."""
        return self.tokenizer.build(self.data.channels)

    def build_generator(self) -> FlexibleTransformer:
        """The generator module."""
        fields = dict(patch_nums=self.tokenizer.patch_nums, map_size=self.map_size)
        return FlexibleTransformer(**fields, **self._generator_fields())

    def build_sampler(self, patch_nums: Any = None) -> FlexibleSampler:
        """From key and labels to images, on the tokenizer's list or another one."""
        modules = dict(generator=self.build_generator(), tokenizer=self.build_tokenizer())
        sampler = FlexibleSampler(**modules, guidance=self.guidance, trained=self.tokenizer.patch_nums[-1], drawn=self.drawn)
        return sampler if patch_nums is None else sampler.at(patch_nums)

    def forcing(self, variables, images, key) -> Forcing:
        """A training batch, on a list drawn with `key`; one program for all lists.

        Args:
          variables: by module, with the "tokenizer".
          images: in [-1, 1].
          key: of the list.
        """
        tokenizer, generator, frozen = self.build_tokenizer(), self.build_generator(), variables["tokenizer"]
        lists = jnp.asarray(draw_lists(self.lists, self.tokenizer.patch_nums, LISTS))
        sizes = lists[jax.random.randint(key, (), 0, len(lists))]
        longest = self.lists.longest or tokenizer.order.length
        cells = Cells.of(sizes, longest)
        tokens = tokenizer.apply(frozen, images, cells, method="encode")

        def inputs(tokens):
            return jax.lax.stop_gradient(tokenizer.apply(frozen, tokens, cells, method="inputs"))

        def logits(variables, labels, inputs, **kwargs):
            return generator.apply(variables, labels, inputs, cells, method="on_list", **kwargs)

        last = jnp.maximum((sizes[:, 0] > 0).sum() - 1, 1)
        return Forcing(tokens, inputs(tokens), inputs, logits, cells.valid / cells.valid.sum(), cells.step / last, 1)

    def recipe(self) -> Recipe:
        """The stages and the sampler, which takes `patch_nums=` among its options."""
        base = super().recipe()
        stages = tuple(flexible_stage(self) if stage.name == "generator" else stage for stage in base.stages)
        return dataclasses.replace(base, stages=stages, sample=functools.partial(_sample, self))


def _sample(config: FlexibleConfig, params, key, labels, *, patch_nums: Any = None, **options) -> dict:
    """`sample_images` on any list of scales; an edited image has the size of its last."""
    return sample_images(config.build_sampler(patch_nums), params, key, labels, **options)


def flexible_stage(config: FlexibleConfig) -> Stage:
    """Teacher-forced maximum likelihood of the tokens of random lists (Jiao et al. 2025, section 3.3).

    One list an update, as in the authors' trainer; all tokens of a list weigh the same.
    """
    check_no_cache(config.data, "tokens of random lists of scales are made anew in every update")
    train = config.model_train

    def loss(params, state, batch, key, step, frozen):
        list_key, drop_key, path_key = jax.random.split(key, 3)
        labels = drop_labels(drop_key, batch["label"], config.num_classes, train.class_drop)
        forcing = config.forcing(modules(frozen), pixels(batch["image"]), list_key)
        logits = forcing.logits(params["generator"], labels, forcing.inputs, train=True, rngs={"dropout": path_key})

        def mean(x):
            return (x * forcing.share).sum(1).mean()

        nll = mean(cross_entropy(logits, forcing.tokens))
        value = nll
        if train.label_smoothing:
            value = mean(cross_entropy(logits, forcing.tokens, label_smoothing=train.label_smoothing))
        hits = (logits.argmax(-1) == forcing.tokens).astype(jnp.float32)
        return value, ({"nll": nll, "token_accuracy": mean(hits)}, state)

    return dataclasses.replace(generator_stage(config), loss=loss)
