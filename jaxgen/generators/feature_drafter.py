"""Drafters that read a target's features: tokens and the hidden states before them become guesses of the next hidden states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.feature_drafts import BeamDrafts, BlockDrafts
from jaxgen.decoding.topology import RuntimeTree, Topology
from jaxgen.decoding.verify import Rejection, Rule
from jaxgen.nn.llama import LlamaBlock
from jaxgen.nn.lstm import LSTM

__all__ = ["BoundDrafter", "FeatureDraft", "FeatureDrafter", "embed_tokens", "unit_features"]

PyTree = Any


def unit_features(features: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Features of mean square 1: what drafters read and predict. The target's last norm makes the same of both."""
    features = features.astype(jnp.float32)
    return features / jnp.sqrt((features**2).mean(-1, keepdims=True) + 1e-6)


class FeatureDrafter(nn.Module):
    """Pairs of a token and the feature before it -> the target's features of the next `block` positions.

    Pair j is (embedding of token j, feature of token j - 1). A linear map (EAGLE, Li et al. 2024, arXiv:2401.15077) or an LSTM
    over the pairs (Falcon, Gao et al. 2024, arXiv:2412.12639, section 3.2) makes one vector of each; they are read by one
    decoder block under a block-relaxed causal mask: vectors see their own block of k and all blocks before. The block that ends
    with pair j gives the features of tokens j, ..., j + k - 1, so that k tokens are drafted in one pass. The target's embedding
    and head are used as they are.

    k - 1 learned vectors stand before pair 0, so that the last k vectors are always there: vector s gives feature s, and pair j
    is vector j + k - 1. With just one decoder block, keys and values do not depend on where blocks begin, so that what a cache
    holds serves whatever was accepted.

    Attributes:
      width: d, the target's.
      heads, kv_heads, hidden, theta: of the decoder block, see `LlamaTransformer`; kv_heads=0 is heads, hidden=0 is 8 / 3 d.
      block: k.
      recurrent: layers of the LSTM; 0 is the linear map.
      compressor: makes few vectors of many visual ones, see `jaxgen.nn.compression`; None reads no pictures.
      dtype: of the decoder block.

    Both inputs are normalised first, which SpecVLM (Huang et al. 2025, arXiv:2509.11815) found to stabilise training.
    """

    width: int
    heads: int
    kv_heads: int = 0
    hidden: int = 0
    theta: float = 10000.0
    block: int = 1
    recurrent: int = 0
    compressor: nn.Module | None = None
    dtype: Any = jnp.float32

    def setup(self):
        if self.block < 1 or self.recurrent < 0:
            raise ValueError(f"block={self.block} must be at least 1 and recurrent={self.recurrent} at least 0")
        normal = nn.initializers.normal(0.02)
        self.first = self.param("first", normal, (self.width,))
        if self.block > 1:
            self.before = self.param("before", normal, (self.block - 1, self.width))
        self.norms = [nn.RMSNorm(epsilon=1e-5, name=f"{name}_norm") for name in ("token", "feature")]
        if self.recurrent:
            self.lstm = [LSTM(self.width, self.dtype) for _ in range(self.recurrent)]
        else:
            self.mix = nn.Dense(self.width, dtype=self.dtype)
        if self.compressor is not None:
            self.look = nn.Dense(self.width, dtype=self.dtype)
        self.layer = LlamaBlock(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            hidden=self.hidden or -(-8 * self.width // 96) * 32,
            depth=1,
            theta=self.theta,
            dtype=self.dtype,
        )

    def __call__(
        self,
        embedded: Float[Array, "b l d"],
        behind: Float[Array, "b l d"],
        *,
        shift: int | Int[Array, ""] = 0,
        prefix: Float[Array, "b m d"] | None = None,
        count: Int[Array, "b"] | None = None,
    ) -> Float[Array, "b l+k-1 d"]:
        """Features of tokens 0, ..., l + k - 2, each guessed from the block that its vector lies in.

        Args:
          embedded: tokens 0..l-1.
          behind: unit features of the token before each; the first, before which there is none, is not looked at.
          shift: in 0..k-1; blocks end at vectors k - 1 - shift, 2 k - 1 - shift, ...
          prefix: compressed visual vectors, which all see.
          count: how many of them there are.
        """
        b, l, _ = embedded.shape
        behind = jnp.concatenate([self.no_feature(b), behind[:, 1:]], axis=1)
        _, x = self.fuse(self.zero_state(b), embedded, behind)
        x = jnp.concatenate([self.padding(b), x], axis=1)
        n, m = l + self.block - 1, 0 if prefix is None else prefix.shape[1]
        blocks = (jnp.arange(n) + shift) // self.block
        seen = jnp.broadcast_to(blocks[:, None] >= blocks, (b, n, n))
        if m:
            x = jnp.concatenate([prefix.astype(x.dtype), x], axis=1)
            there = jnp.broadcast_to(jnp.arange(m) < count[:, None], (b, m))
            seen = jnp.concatenate([jnp.broadcast_to(there[:, None], (b, n, m)), seen], axis=2)
            # A picture's vectors are keys and values only; each sees itself, so that its softmax is over something.
            itself = jnp.broadcast_to(jnp.eye(m, m + n, dtype=bool), (b, m, m + n))
            seen = jnp.concatenate([itself, seen], axis=1)
        features, _ = self.read(x, jnp.arange(m + n), None, seen)
        return features[:, m:]

    def fuse(self, states, embedded: Float[Array, "b q d"], behind: Float[Array, "b q d"]):
        """(recurrent states after each pair [b, q, ...], vectors [b, q, d]) of pairs, from the state before the first."""
        pair = jnp.concatenate([norm(x).astype(self.dtype) for norm, x in zip(self.norms, (embedded, behind))], axis=-1)
        if not self.recurrent:
            return (), self.mix(pair)
        after = []
        for layer, state in zip(self.lstm, states):
            after.append(layer(pair if not after else after[-1][1], state))
        return tuple(after), after[-1][1]

    def read(self, x: Float[Array, "b q d"], pos, cache: KVCache | None, mask: Bool[Array, "*b q q"]):
        """(features [b, q, d], cache) of vectors."""
        (out, cache), _ = self.layer((x, cache), 0, pos, mask)
        return out.astype(jnp.float32), cache

    def see(self, visual: Float[Array, "b n d"], features: Float[Array, "b n d"], question: Float[Array, "b d"], key=None):
        """What the compressor makes of visual tokens, the target's unit features there, and the mean token of the question."""
        pair = jnp.concatenate([norm(x).astype(self.dtype) for norm, x in zip(self.norms, (visual, features))], axis=-1)
        return self.compressor(self.look(pair), self.norms[0](question), key)

    def zero_state(self, batch: int):
        """The recurrent state before the first pair."""
        zeros = jnp.zeros((batch, self.width), self.dtype)
        return tuple((zeros, zeros) for _ in range(self.recurrent))

    def padding(self, batch: int) -> Float[Array, "b k-1 d"]:
        """The vectors before pair 0."""
        before = self.before if self.block > 1 else jnp.zeros((0, self.width))
        return jnp.broadcast_to(before, (batch, *before.shape))

    def no_feature(self, batch: int) -> Float[Array, "b 1 d"]:
        """The feature before token 0."""
        return jnp.broadcast_to(self.first, (batch, 1, self.width))

    def init_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` vectors."""
        heads = self.kv_heads or self.heads
        sizes = dict(batch=batch, capacity=capacity, heads=heads, head_size=self.width // self.heads)
        return KVCache.zeros(layers=1, dtype=self.dtype, **sizes)


def embed_tokens(model, params: PyTree, tokens: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    """A target's own embeddings."""
    return model.apply(params, tokens, method=lambda module, x: module.embed(x))


@dataclasses.dataclass(frozen=True, eq=False)
class BoundDrafter:
    """A `FeatureDrafter` with its variables and its target's, as `jaxgen.decoding.feature_drafts` calls it.

    Attributes:
      module, params: the drafter.
      model, target: the target, which has `embed` and `logits`.
      cache: empty, or with a picture's vectors in it.
      offset: position of the first text vector.
    """

    module: FeatureDrafter
    params: PyTree
    model: nn.Module
    target: PyTree
    cache: KVCache
    offset: int = 0

    @property
    def block(self) -> int:
        """k."""
        return self.module.block

    def start(self, batch: int):
        """(cache, state, vectors before pair 0, feature before token 0)."""
        state, padding, first = (self._call(name, batch) for name in ("zero_state", "padding", "no_feature"))
        return self.cache, state, padding, first

    def fuse(self, states, tokens, features):
        """See `FeatureDrafter.fuse`."""
        return self._call("fuse", states, embed_tokens(self.model, self.target, tokens), features)

    def read(self, x, pos, cache, mask):
        """See `FeatureDrafter.read`; positions count text vectors."""
        return self._call("read", x, self.offset + pos, cache, mask)

    def features(self, feats):
        """What it reads of a target's `Out.feats`."""
        return unit_features(feats)

    def logits(self, features):
        """The target's head."""
        return self.model.apply(self.target, features, method="logits")

    def _call(self, method: str, *args):
        return self.module.apply(self.params, *args, method=method)


@dataclasses.dataclass(frozen=True)
class FeatureDraft:
    """A sampler's method: drafts come from a feature drafter.

    Attributes:
      model: the target.
      drafter: the module.
      topology: a static tree (`BlockDrafts`), or a tree found at run time (`BeamDrafts`).
      rule: see `jaxgen.decoding.verify`.
      beam: nodes kept at each depth, for a tree found at run time.
      coupled: see `BlockDrafts`.
      name, target: of the variables.
    """

    model: nn.Module
    drafter: FeatureDrafter
    topology: Topology | RuntimeTree
    rule: Rule = Rejection()
    beam: int = 4
    coupled: bool = False
    name: str = "drafter"
    target: str = "generator"

    def __call__(self, params: Mapping[str, PyTree], prompt, max_length: int, cache: KVCache | None = None, offset: int = 0):
        """(proposer, rule); `cache` and `offset` are those of `BoundDrafter` where a picture comes first."""
        if cache is None:
            cache = self.drafter.init_cache(prompt.shape[0], self.capacity(max_length))
        bound = BoundDrafter(self.drafter, params[self.name], self.model, params[self.target], cache, offset)
        if isinstance(self.topology, RuntimeTree):
            return BeamDrafts(bound, self.topology, self.beam), self.rule
        return BlockDrafts(bound, self.topology, self.coupled), self.rule

    def capacity(self, max_length: int) -> int:
        """Vectors that the drafter's cache has to hold."""
        # Every node may end a block, and a beam may go as deep as there are drafts.
        each = self.beam if isinstance(self.topology, RuntimeTree) else self.drafter.block
        return max_length + 2 * self.drafter.block + each * self.topology.drafts + 1
