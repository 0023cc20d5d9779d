"""The Llama of neighbours: all cells at one distance from the corner at a time, a head an axis (NAR, He et al. 2025)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.config import fields_of
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import Out, View
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.nn.llama import LlamaTransformer
from jaxgen.orders import Neighbours, Order

__all__ = ["NeighbourLlama"]


class NeighbourLlama(ImageLlama):
    """Condition and the tokens nearer to the first corner -> logits of all tokens one step further (He et al. 2025, sec. 3.2).

    Every token predicts its next neighbour along each axis, with a head for each. The head of the last axis (to the right) reads
    `depth` blocks; that of each axis before it (below; then the next frame) reads `head_depth` blocks more. A token's logits are
    the mean of what its neighbours predict for it; the first token's that of all heads at the last vector of the condition. A
    token sees its own distance and all nearer ones.

    Attributes:
      those of `ImageLlama`, with a grid of two or three axes (with three the published model adds learned positions; here they
        turn in either).
      head_depth: blocks between one head and the next.

    Raises:
      ValueError: a grid of one axis, heads without a block of their own, or see `ImageLlama`.

    Example:
      >>> model = NeighbourLlama(vocab=64, grid=(4, 4), num_classes=10, width=64, heads=2, depth=2)
      >>> params = model.init(key, labels, tokens)              # labels [b], tokens [b, 16] in raster order
      >>> logits = model.apply(params, labels, tokens)          # [b, 16, 64]
    """

    head_depth: int = 1

    def __post_init__(self):
        super().__post_init__()
        if len(self.shape) == 1 or self.head_depth < 1:
            raise ValueError(f"grid={self.grid}, head_depth={self.head_depth}: expected two or three axes, and at least 1 block")

    @property
    def neighbours(self) -> Neighbours:
        """The order of the cells."""
        return Neighbours(self.shape)

    @property
    def layers(self) -> int:
        """See `ImageLlama`; those before the heads included."""
        return self.depth + self.head_depth * (len(self.shape) - 1)

    @property
    def order(self) -> Order:
        """One step a distance."""
        return self.neighbours.order

    def arrange(self, tokens: Int[Array, "b l"]) -> Int[Array, "b l"]:
        """See `TokenModel`."""
        return self.neighbours.join(tokens)

    def setup(self):
        super().setup()
        fields, axes = fields_of(self, LlamaTransformer) | dict(depth=self.head_depth), len(self.shape) - 1
        starts = [self.depth + i * self.head_depth for i in range(axes)]
        self.stacks = [LlamaTransformer(**fields | dict(first_layer=start)) for start in starts]
        self.norms = [nn.RMSNorm(epsilon=1e-5) for _ in range(axes)]
        head = dict(use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype)
        self.heads_before = [nn.Dense(self.vocab, **head) for _ in range(axes)]

    def __call__(self, cond, tokens: Int[Array, "b l"], *, train: bool = False) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits of all tokens, in raster order; arguments as in `ImageLlama`."""
        neighbours = self.neighbours
        known = self.order.length - self.order.sizes[-1]  # the last step predicts nothing
        x = jnp.concatenate([self._condition(cond), self.token_embed(neighbours.split(tokens)[:, :known])], axis=1)
        x = self.drop_tokens(x, deterministic=not train)
        coords = np.concatenate([np.full((self.prefix, len(self.shape)), -1), neighbours.coords[:known]])
        mask = self._mask(cond, Order(((1,),) * self.prefix + self.order.shapes[:-1]))
        hidden, _ = self._hidden(x, coords[None], None, mask, train)
        logits = self._mean(hidden, neighbours.before + self.prefix, _weights(neighbours.before))
        return neighbours.join(logits)

    def step(self, cache: KVCache, view: View, cond) -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding.sample_tokens`: reads the step before, or the condition, and predicts `view.time`'s."""
        k, plan = view.time, _plan(self.shape)
        x = jnp.where(k == 0, self._last(cond), self.token_embed(view.tokens))
        hidden, cache = self._hidden(x, jnp.asarray(plan.coords)[k][None], cache, view.mask)
        return Out(self._mean(hidden, jnp.asarray(plan.sources)[k], jnp.asarray(plan.weights)[k])), cache

    def init_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache with room for the condition, `capacity` tokens (None is an image's) and the width of a step."""
        return super().init_cache(batch, (capacity or self.length) + max(self.order.sizes))

    def _hidden(self, x, coords, cache, mask, train: bool = False) -> tuple[list[Float[Array, "b q d"]], KVCache | None]:
        """(What the head of each axis reads, the cache)."""
        x, cache = self.transformer(x, coords, cache, mask, train=train)
        hidden = [self.norm(x)]
        for stack, norm in zip(self.stacks, self.norms):
            x, cache = stack(x, coords, cache, mask, train=train)
            hidden.append(norm(x))
        return hidden[::-1], cache

    def _mean(self, hidden, sources: Int[Array, "q n"], weights: Float[Array, "q n"]) -> Float[Array, "b q v"]:
        """Of the heads' logits at the places that predict a token, one an axis."""
        heads = [*self.heads_before[::-1], self.head]
        logits = [head(h[:, sources[:, i]].astype(self.dtype)) for i, (head, h) in enumerate(zip(heads, hidden))]
        return sum(weights[:, i, None] * part.astype(jnp.float32) for i, part in enumerate(logits))


def _weights(before: Int[np.ndarray, "l n"]) -> Float[np.ndarray, "l n"]:
    """How much each axis says about each position: as much as the others that say anything, all of them at the first."""
    there = (before >= 0) | (before < 0).all(1, keepdims=True)
    return (there / there.sum(1, keepdims=True)).astype(np.float32)


class _Plan(NamedTuple):
    """What every call of sampling reads and predicts, w positions of each; places past a step's end say nothing.

    Attributes:
      coords: of what is read, -1 where it is no cell.
      sources: which of what is read predicts each position, by axis.
      weights: see `_weights`.
    """

    coords: Int[np.ndarray, "k w n"]
    sources: Int[np.ndarray, "k w n"]
    weights: Float[np.ndarray, "k w n"]


@functools.lru_cache(maxsize=16)
def _plan(shape: tuple[int, ...]) -> _Plan:
    neighbours, order = Neighbours(shape), Neighbours(shape).order
    sizes = (order.steps, max(order.sizes), len(shape))
    plan = _Plan(np.full(sizes, -1), np.zeros(sizes, np.int32), np.zeros(sizes, np.float32))
    for k in range(order.steps):
        (start, end), n = order.span(k), order.sizes[k]
        plan.weights[k, :n] = _weights(neighbours.before)[start:end]
        if k:
            first, last = order.span(k - 1)
            plan.coords[k, : last - first] = neighbours.coords[first:last]
            plan.sources[k, :n] = np.maximum(neighbours.before[start:end] - first, 0)
    return plan
