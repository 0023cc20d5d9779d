"""A frozen language model that reads masks, too, and says what comes after the next token (Samragh et al. 2025, 2507.11851)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.adapters import init_low_rank, linear_layers, low_rank_layers
from jaxgen.decoding import KVCache, Out, View
from jaxgen.generators.language import LanguageModel

__all__ = ["MultiTokenModel", "SamplerHead"]

PyTree = Any


class SamplerHead(nn.Module):
    """The law of a token from what its mask saw and the token before it: two layers of LayerNorm(silu(W z)) on [h; E(y)].

    Attributes:
      dtype: of the computation.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, feats: Float[Array, "*b d"], before: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Vectors for the base model's head, from features and the embedding of the token before."""
        z, width = jnp.concatenate([feats, before], axis=-1), feats.shape[-1]
        for i in range(2):
            z = nn.LayerNorm(dtype=self.dtype, name=f"norm{i}")(nn.silu(nn.Dense(width, dtype=self.dtype, name=f"fc{i}")(z)))
        return feats + z


@dataclasses.dataclass(frozen=True)
class MultiTokenModel:
    """The base model with k masks: ids v, v + 1, ..., which low-rank adapters read and the other tokens never see.

    Variables: {"base": of the language model, "adapters": {path: {"a", "b"}}, "masks": [k, d], "sampler": of `SamplerHead`}; all
    but "base" are trained. The law after a token is the base model's, bit for bit.

    Attributes:
      base: unrolled.
      masks: k.
      rank: of the adapters.
      scale: see `low_rank_layers`.
    """

    base: LanguageModel
    masks: int
    rank: int = 16
    scale: float = 1.0

    def __post_init__(self):
        if self.masks < 1 or self.rank < 1:
            raise ValueError(f"masks={self.masks} and rank={self.rank} must be at least 1")

    @property
    def vocab(self) -> int:
        """v, without the masks."""
        return self.base.vocab

    @property
    def probes(self) -> tuple[int, ...]:
        """The ids of the masks."""
        return tuple(range(self.vocab, self.vocab + self.masks))

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """The base model's."""
        return self.base.init_cache(batch, capacity)

    def init(self, key: Key[Array, ""], base: PyTree) -> PyTree:
        """What is trained, for a base model with variables `base`."""
        adapters, masks, sampler = jax.random.split(key, 3)
        layers = linear_layers(self.base, base, jnp.zeros((1, 4), jnp.int32))
        vector = jnp.zeros((1, self.base.width))
        return {
            "adapters": init_low_rank(adapters, layers, rank=self.rank, where=lambda path: "blocks" in path),
            "masks": self.base.init_std * jax.random.normal(masks, (self.masks, self.base.width)),
            "sampler": SamplerHead(self.base.dtype).init(sampler, vector, vector),
        }

    def apply(self, variables: PyTree, cache: KVCache, view: View, cond=None, *, method: str = "step") -> tuple[Out, KVCache]:
        """The seam of `jaxgen.decoding`: as `LanguageModel.step`, for tokens and masks."""
        if method != "step":
            raise ValueError(f"method={method!r}: only 'step' is there")
        options = dict(vectors=self._embed(variables, view.tokens), method="step")
        with self._adapted(variables, view.tokens):
            return self.base.apply(variables["base"], cache, view, cond, **options)

    def features(self, variables: PyTree, tokens: Int[Array, "b l"], pos, mask) -> Float[Array, "b l d"]:
        """The last block's output for tokens and masks at any positions, without a cache; `mask` bool [b, l, l]."""
        x = self._embed(variables, tokens)
        with self._adapted(variables, tokens):
            return self.base.apply(variables["base"], x, method=lambda m, x: m.transformer(x, pos, None, mask)[0])

    def logits(self, variables: PyTree, features: Float[Array, "b l d"]) -> Float[Array, "b l v"]:
        """The base model's norm and head."""
        return self.base.apply(variables["base"], features, method="logits")

    def sampler_logits(self, variables: PyTree, feats: Float[Array, "b n d"], before: Int[Array, "b n"]) -> Float[Array, "b n v"]:
        """The sampler's law of each mask's token, given the token before it."""
        vectors = SamplerHead(self.base.dtype).apply(variables["sampler"], feats, self._embed(variables, before))
        return self.logits(variables, vectors)

    def _embed(self, variables, tokens):
        table = variables["base"]["params"]["embed"]["embedding"]
        mask = jnp.clip(tokens - self.vocab, 0, self.masks - 1)
        words = jnp.take(table, jnp.minimum(tokens, self.vocab - 1), axis=0)
        return jnp.where((tokens >= self.vocab)[..., None], variables["masks"][mask], words)

    def _adapted(self, variables, tokens):
        return low_rank_layers(variables["adapters"], tokens >= self.vocab, scale=self.scale)
