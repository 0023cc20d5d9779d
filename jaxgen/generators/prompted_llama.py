"""The Llama of image tokens with a full-view prompt between the class and the image (VF prompt, Cai et al. 2025)."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import uniform
from jaxgen.decoding.noise import SELECT
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.generators.next_token_sampler import NextTokenSampler

__all__ = ["ClassCodes", "PromptedLlama", "PromptedSampler"]

KINDS = ("learned", "codes", "class")


class ClassCodes(NamedTuple):
    """Images as tokens, class by class: what prompts of the kind "class" are drawn from.

    Attributes:
      tokens: of m images, those of a class side by side.
      first: where each class begins; the last entry, "no class", is all of them.
      count: images of each.
    """

    tokens: Int[Array, "m l"]
    first: Int[Array, "k+1"]
    count: Int[Array, "k+1"]

    @classmethod
    def of(cls, tokens: Int[Array, "m l"], labels: Int[np.ndarray, "m"], num_classes: int) -> ClassCodes:
        """From tokens whose labels rise.

        Raises:
          ValueError: labels that do not, or a class with fewer than two images, so that one of them has no other.
        """
        labels = np.asarray(labels)
        if (np.diff(labels) < 0).any():
            raise ValueError(f"labels {labels[:8]}...: expected those of a class side by side, from the first class on")
        count = np.bincount(labels, minlength=num_classes)
        few = int(count.argmin())
        if len(count) > num_classes or count[few] < 2:
            raise ValueError(f"{count[few]} images of class {few} of {len(count)}: expected {num_classes} classes of at least 2")
        first = np.concatenate([np.cumsum(count) - count, [0]])
        return cls(tokens, jnp.asarray(first), jnp.asarray(np.append(count, len(labels))))

    def draw(self, key: Key[Array, ""], labels: Int[Array, "b"], own: Int[Array, "b l"] | None = None) -> Int[Array, "b l"]:
        """An image of each label, evenly; row i's depends on the key, i and the label. Never `own`, but the one behind it."""
        rows = jnp.arange(len(labels))
        number = uniform(key, rows, jnp.zeros(1, jnp.int32), 1, stream=SELECT)[:, 0, 0]
        first, count = self.first[labels], self.count[labels]
        place = jnp.minimum((number * count).astype(jnp.int32), count - 1)
        drawn = self.tokens[first + place]
        if own is None:
            return drawn
        same = (drawn == own).all(axis=1, keepdims=True)
        return jnp.where(same, self.tokens[first + (place + 1) % count], drawn)


class PromptedLlama(ImageLlama):
    """Condition, a prompt of n vectors and the tokens so far -> logits of the next token (Cai et al. 2025, arXiv:2502.16965).

    What is learnt is p(x_i | x_<i, s_1 .. s_n, c): nothing is predicted before the prompt's end. A "learned" prompt is n vectors
    of the model's own; one of "codes" is n tokens drawn evenly from the codebook, anew for each image in training and sampling
    (the paper's universal prompt); one of "class" is the tokens of another image of the class, drawn as often (its class prompt),
    and of any image where there is no class.

    The prompt lies in rows of the grid above the image, so that it is told apart by rotation. The authors published no code, and
    where they put theirs is not known; where LlamaGen puts captions, keys are 0 and no part of a prompt could be asked for.

    Attributes:
      those of `ImageLlama`.
      prompts: n; as many as the image has tokens is a full view.
      prompt: "learned", "codes" or "class"; the last two are for models of classes.

    Raises:
      ValueError: no prompt, an unknown kind or one that does not fit the condition, or see `ImageLlama`.

    Example:
      >>> model = PromptedLlama(vocab=64, grid=4, num_classes=10, width=64, heads=2, depth=2, prompts=16)
      >>> params = model.init(key, labels, tokens)              # labels [b], tokens [b, 16]
      >>> logits = model.apply(params, labels, tokens)          # [b, 16, 64]
    """

    prompts: int = 16
    prompt: str = "learned"

    def __post_init__(self):
        super().__post_init__()
        check_prompt_fields(self.prompts, self.prompt)
        if self.coded and not self.num_classes:
            raise ValueError(f"prompt={self.prompt!r}: expected a model of classes, not of captions")
        if self.prompt == "class" and self.prompts != self.length:
            raise ValueError(f"prompts={self.prompts}: a prompt of kind 'class' is an image, {self.length} tokens")

    @property
    def coded(self) -> bool:
        """Whether the prompt is tokens, which stand behind the labels."""
        return self.prompt != "learned"

    @property
    def told(self) -> int:
        """Vectors before the image, the prompt included."""
        return self.prefix + self.prompts

    @property
    def _coords(self) -> Int[np.ndarray, "p+l n"]:
        """As in `ImageLlama`, with whole rows for the prompt before the image's."""
        row = math.prod(self.shape[1:])
        rows = -(-self.prompts // row)
        cells = np.indices((rows + self.shape[0], *self.shape[1:])).reshape(len(self.shape), -1).T
        first = np.arange(-self.prefix, 0)[:, None] if len(self.shape) == 1 else np.full((self.prefix, len(self.shape)), -1)
        return np.concatenate([first, cells[: self.prompts], cells[rows * row :]])

    def setup(self):
        super().setup()
        if self.prompt == "learned":
            init = nn.initializers.normal(self.init_std)
            self.prompt_embed = self.param("prompt_embed", init, (self.prompts, self.width))

    def __call__(self, cond, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits, as in `ImageLlama`.

        Where prompts are tokens, `cond` is labels with prompts [b, 1 + n]. For "codes" it may be labels [b]: then prompts are
        drawn, in training with the rng stream "dropout", otherwise always the same.

        Raises:
          ValueError: labels without prompts of the kind "class".
        """
        if self.prompt == "class" and cond.ndim == 1:
            raise ValueError(f"labels {cond.shape}: expected [b, {1 + self.prompts}], each with an image of its class as tokens")
        if self.coded and cond.ndim == 1:
            key = self.make_rng("dropout") if train else jax.random.key(0)
            cond = jnp.concatenate([cond[:, None], self.draw(key, cond.shape[0])], axis=1)
        return super().__call__(cond, tokens, train=train)

    def draw(self, key: Key[Array, ""], batch: int) -> Int[Array, "b n"]:
        """Prompts of codes; row i's depends on the key and i."""
        numbers = uniform(key, jnp.arange(batch), jnp.arange(self.prompts), 1, stream=SELECT)[..., 0]
        return jnp.floor(numbers * self.vocab).astype(jnp.int32)

    def param_shapes(self):
        """Shapes of the parameters, without making any."""
        if not self.coded:
            return super().param_shapes()
        cond, tokens = jnp.zeros((1, 1 + self.prompts), jnp.int32), jnp.zeros((1, self.length), jnp.int32)
        return jax.eval_shape(lambda key: self.init(key, cond, tokens), jax.random.key(0))

    def _condition(self, cond) -> Float[Array, "b p+n d"]:
        if self.coded:
            return jnp.concatenate([super()._condition(cond[:, 0]), self.token_embed(cond[:, 1:])], axis=1)
        first = super()._condition(cond)
        prompt = jnp.broadcast_to(self.prompt_embed, (len(first), *self.prompt_embed.shape))
        return jnp.concatenate([first, prompt.astype(first.dtype)], axis=1)

    def _last(self, cond) -> Float[Array, "b 1 d"]:
        if self.coded:
            return self.token_embed(cond[:, -1:])
        return jnp.broadcast_to(self.prompt_embed[-1], (len(jax.tree.leaves(cond)[0]), 1, self.width))


def check_prompt_fields(prompts: int, prompt: str) -> None:
    """That a prompt is of a known kind and has a length.

    Raises:
      ValueError: it is not, or has none.
    """
    if prompts < 1:
        raise ValueError(f"prompts={prompts}: expected at least 1")
    if prompt not in KINDS:
        raise ValueError(f"prompt={prompt!r} is not one of {', '.join(KINDS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedSampler(NextTokenSampler):
    """`NextTokenSampler` of a `PromptedLlama`; prompts of tokens come from the key.

    Those of "codes" are the same with and without the class. Those of "class" are drawn from `params["prompts"]`, a `ClassCodes`:
    with the class one of its images, without any image.
    """

    generator: PromptedLlama

    def conditions(self, params, key, cond):
        """See `NextTokenSampler`; prompts of tokens stand behind the labels."""
        both, kind = super().conditions(params, key, cond), self.generator.prompt
        if kind == "learned":
            return both
        if kind == "class":
            prompts = [params["prompts"].draw(key, labels) for labels in jnp.split(both, 2)]
        else:
            prompts = [self.generator.draw(key, cond.shape[0])] * 2
        return jnp.concatenate([both[:, None], jnp.concatenate(prompts)], axis=1)
