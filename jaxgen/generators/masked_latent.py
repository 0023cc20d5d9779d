"""Masked autoregression over continuous tokens: an encoder of what is known, a decoder of all positions, a diffusion head.

Li et al. 2024, *Autoregressive image generation without vector quantization* (MAR, arXiv:2406.11838), sections 4.2 and 5.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.step import Out, View
from jaxgen.heads.diffusion import DiffusionHead
from jaxgen.nn.vit import ViT
from jaxgen.orders import Order
from jaxgen.paths_vp import VPPath

__all__ = ["MaskedLatentTransformer", "cosine_steps", "known_at", "random_known"]


class MaskedLatentTransformer(nn.Module):
    """Class label and the tokens that are known -> the law of each other token, given those alone.

    The encoder reads the known tokens behind `buffer` copies of the class; the decoder sees its outputs there and a learned
    vector elsewhere. As lengths are static here, unknown tokens stay in the encoder and nobody looks at them, instead of
    being left out.

    Attributes:
      channels: c, numbers a token.
      length: l, tokens of a sample.
      num_classes: classes; the label `num_classes` means unconditional.
      width, depth, heads: of the encoder.
      decoder_width, decoder_depth, decoder_heads: of the decoder; 0 is the encoder's.
      buffer: tokens that hold the class.
      mlp_ratio, dropout, scan_layers: see `ViT`.
      head_width, head_depth, prediction, path: see `DiffusionHead`.
      dtype: of the computation; the head's output is float32.
    """

    channels: int
    length: int
    num_classes: int
    width: int
    depth: int
    heads: int
    decoder_width: int = 0
    decoder_depth: int = 0
    decoder_heads: int = 0
    buffer: int = 64
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    head_width: int = 1024
    head_depth: int = 3
    prediction: str = "noise"
    path: VPPath = VPPath()
    scan_layers: bool = False
    dtype: Any = jnp.float32

    def setup(self):
        init, xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()
        fields = dict(mlp_ratio=self.mlp_ratio, dropout=self.dropout, scan_layers=self.scan_layers, dtype=self.dtype)
        width, places = self.decoder_width or self.width, self.buffer + self.length
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.token_embed = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype)
        self.token_norm = nn.LayerNorm(epsilon=1e-6)
        self.encoder_position = self.param("encoder_position", init, (places, self.width))
        self.encoder = ViT(self.depth, self.heads, **fields)
        self.decoder_embed = nn.Dense(width, kernel_init=xavier, dtype=self.dtype)
        self.mask_token = self.param("mask_token", init, (width,))
        self.decoder_position = self.param("decoder_position", init, (places, width))
        self.decoder = ViT(self.decoder_depth or self.depth, self.decoder_heads or self.heads, **fields)
        self.head_position = self.param("head_position", init, (self.length, width))
        self.head = DiffusionHead(self.channels, self.head_width, self.head_depth, self.path, self.prediction, self.dtype)

    def features(
        self, labels: Int[Array, "b"], tokens: Float[Array, "b l c"], known: Bool[Array, "b l"], *, train: bool = False
    ) -> Float[Array, "b l d"]:
        """What the head is told of each position; `tokens` count where they are known only."""
        b = tokens.shape[0]
        classes = jnp.broadcast_to(self.class_embed(labels)[:, None], (b, self.buffer, self.width))
        x = jnp.concatenate([classes, self.token_embed(jnp.where(known[..., None], tokens, 0))], axis=1)
        x = self.token_norm(x + self.encoder_position)
        seen = jnp.concatenate([jnp.ones((b, self.buffer), bool), known], axis=1)
        x = self.decoder_embed(self.encoder(x, seen[:, None], train=train))
        x = jnp.where(seen[..., None], x, self.mask_token) + self.decoder_position
        return self.decoder(x, train=train)[:, self.buffer :] + self.head_position

    def __call__(
        self,
        labels: Int[Array, "b"],
        tokens: Float[Array, "b l c"],
        known: Bool[Array, "b l"],
        key: Key[Array, ""],
        *,
        repeats: int = 1,
        train: bool = False,
    ) -> Float[Array, ""]:
        """The head's loss, averaged over the unknown tokens and `repeats` noise levels of each."""
        z = self.features(labels, tokens, known, train=train)
        loss = self.head.loss(z[:, None], jnp.repeat(tokens[:, None], repeats, axis=1), key).mean(1)
        return jnp.where(known, 0, loss).sum() / jnp.maximum((~known).sum(), 1)

    def step(self, cache: None, view: View, labels: Int[Array, "b"]) -> tuple[Out, None]:
        """The seam of `jaxgen.decoding.speculate_latents`: `view.mask` says which tokens are known; nothing is cached."""
        known = jnp.broadcast_to(view.mask, (*view.tokens.shape[:2], self.length))[:, 0]
        z = self.features(labels, view.tokens, known)
        return Out(z, z), cache

    def predict(self, z: Float[Array, "*b d"], x: Float[Array, "*b c"], times: Int[Array, "*b"]):
        """See `DiffusionHead.__call__`."""
        return self.head(z, x, times)

    def losses(self, z: Float[Array, "*b d"], x0: Float[Array, "*b c"], i: Int[Array, "*b"], noise: Float[Array, "*b c"]):
        """See `DiffusionHead.losses`."""
        return self.head.losses(z, x0, i, noise)


def cosine_steps(length: int, steps: int) -> Order:
    """How many tokens each step of generation adds: few at first (Chang et al. 2022, arXiv:2202.04200, section 3.2).

    After step k floor(length cos(pi/2 (k + 1) / steps)) tokens are unknown, but at least one is added at each step.

    Raises:
      ValueError: more steps than tokens.

    Example:
      >>> cosine_steps(16, 6).sizes
      (1, 2, 3, 3, 3, 4)
    """
    if not 1 <= steps <= length:
        raise ValueError(f"steps={steps}: expected 1 to length={length}, as each step adds a token")
    sizes, left = [], length
    for k in range(steps):
        # A step leaves at least one token to each that follows.
        after = max(steps - k - 1, min(left - 1, math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps))))
        sizes.append(left - after)
        left = after
    return Order(tuple((size,) for size in sizes))


def random_known(key: Key[Array, ""], batch: int, length: int, least: float = 0.7) -> Bool[Array, "b l"]:
    """Which tokens are known in training: a random set a row, of ceil(r l) unknown.

    r is drawn from a normal law of mean 1 and standard deviation 1/4 that is cut off at `least` and 1 (Li et al. 2024,
    section 4.2), for each row alone.
    """
    key_rate, key_order = jax.random.split(key)
    rate = 1 + 0.25 * jax.random.truncated_normal(key_rate, (least - 1) / 0.25, 0.0, (batch, 1))
    return known_at(key_order, rate, length)


def known_at(key: Key[Array, ""], rate: Float[Array, "b 1"], length: int) -> Bool[Array, "b l"]:
    """A random set a row of known tokens, of which ceil(rate l) are unknown."""
    rank = jnp.argsort(jax.random.uniform(key, (len(rate), length)), axis=1)
    return rank >= jnp.ceil(length * rate)
