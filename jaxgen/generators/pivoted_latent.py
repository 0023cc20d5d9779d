"""Masked autoregression in two phases: a few low-resolution tokens, the pivots, then the dense grid (Hi-MAR, S014).

Zheng et al. 2025, *Hierarchical masked autoregressive models with low-resolution token pivots* (arXiv:2505.20288); what the paper
leaves open is as in their released model (HiDream-ai/himar).
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding.step import Out, View
from jaxgen.generators.masked_latent import known_at
from jaxgen.heads.diffusion import DiffusionHead
from jaxgen.heads.diffusion_transformer import DiffusionTransformerHead
from jaxgen.nn.vit import ViT
from jaxgen.paths_vp import VPPath

__all__ = ["PivotedLatentTransformer", "cosine_known"]

PIVOTS, DENSE = 0, 1  # the tasks of the transformer
# The released training's factors on the two losses, which it then weighs by the tokens that each is about.
PIVOT_LOSS, DENSE_LOSS = 2.0, 0.75


class PivotedLatentTransformer(nn.Module):
    """Class label and known pivots -> the law of the other pivots; these and known dense tokens -> the law of all dense tokens.

    Both phases run the same encoder and decoder (see `MaskedLatentTransformer`), which know by scales and gates for each task
    what they are about. The dense phase reads the pivots' features, not the pivots: in sampling, those from which they were
    drawn; so it does not rely on pivots without error, which only training has. In training pivots that were given to the first
    phase, and all pivots of some rows, are hidden by a learned vector. A pivot's law is an MLP's (`DiffusionHead`), that of the
    dense tokens a transformer's, together (`DiffusionTransformerHead`).

    The released first phase has the mask tokens of the dense grid in its decoder, where they hold nothing; here they are left
    out.

    Attributes:
      channels: c, numbers a token or pivot.
      grid, pivot_grid: dense tokens and pivots along a side.
      num_classes: classes; the label `num_classes` means unconditional.
      width, depth, heads: of the encoder.
      decoder_width, decoder_depth, decoder_heads: of the decoder; 0 is the encoder's.
      buffer: tokens that hold the class.
      mlp_ratio, dropout, scan_layers: see `ViT`.
      head_width, head_depth: of the pivots' head.
      dense_width, dense_depth, dense_heads: of the dense tokens' head.
      prediction, path: of both heads.
      dtype: of the computation; the heads' output is float32.
    """

    channels: int
    grid: int
    pivot_grid: int
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
    head_depth: int = 6
    dense_width: int = 512
    dense_depth: int = 6
    dense_heads: int = 8
    prediction: str = "noise"
    path: VPPath = VPPath()
    scan_layers: bool = False
    dtype: Any = jnp.float32

    @property
    def length(self) -> int:
        """l, dense tokens."""
        return self.grid**2

    @property
    def pivots(self) -> int:
        """p."""
        return self.pivot_grid**2

    def setup(self):
        init, xavier = nn.initializers.normal(0.02), nn.initializers.xavier_uniform()
        fields = dict(mlp_ratio=self.mlp_ratio, dropout=self.dropout, scan_layers=self.scan_layers, dtype=self.dtype)
        width, p, l = self.decoder_width or self.width, self.pivots, self.length
        dense = dict(kernel_init=xavier, dtype=self.dtype)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.pivot_embed, self.token_embed = nn.Dense(self.width, **dense), nn.Dense(self.width, **dense)
        self.feature_embed = nn.Dense(self.width, **dense)
        self.hidden_pivot = self.param("hidden_pivot", init, (p, self.channels))
        self.token_norm = nn.LayerNorm(epsilon=1e-6)
        self.encoder, self.decoder_embed = ViT(self.depth, self.heads, tasks=2, **fields), nn.Dense(width, **dense)
        depth, heads = self.decoder_depth or self.depth, self.decoder_heads or self.heads
        self.decoder = ViT(depth, heads, tasks=2, **fields)
        # What tells positions apart is of each phase alone.
        places = {"pivots": self.buffer + p, "dense": self.buffer + p + l}
        self.encoder_position = [self.param(f"encoder_position_{name}", init, (n, self.width)) for name, n in places.items()]
        self.decoder_position = [self.param(f"decoder_position_{name}", init, (n, width)) for name, n in places.items()]
        self.mask_token = [self.param(f"mask_token_{name}", init, (n - self.buffer, width)) for name, n in places.items()]
        self.head_position = self.param("head_position", init, (p + l, width))
        law = dict(path=self.path, prediction=self.prediction, dtype=self.dtype)
        self.head = DiffusionHead(self.channels, self.head_width, self.head_depth, **law)
        sizes = self.dense_width, self.dense_depth, self.dense_heads
        self.dense_head = DiffusionTransformerHead(self.channels, self.grid, *sizes, scan_layers=self.scan_layers, **law)

    def _run(self, labels, x: Float[Array, "b q w"], known: Bool[Array, "b q"], task: int, train: bool) -> Float[Array, "b q d"]:
        classes = jnp.broadcast_to(self.class_embed(labels)[:, None], (x.shape[0], self.buffer, self.width))
        x = self.token_norm(jnp.concatenate([classes, x], axis=1) + self.encoder_position[task])
        seen = jnp.concatenate([jnp.ones((x.shape[0], self.buffer), bool), known], axis=1)
        x = self.decoder_embed(self.encoder(x, seen[:, None], task=task, train=train))
        x = jnp.where(seen[..., None], x, jnp.pad(self.mask_token[task], ((self.buffer, 0), (0, 0))))
        return self.decoder(x + self.decoder_position[task], task=task, train=train)[:, self.buffer :]

    def pivot_features(
        self, labels: Int[Array, "b"], pivots: Float[Array, "b p c"], known: Bool[Array, "b p"], *, train: bool = False
    ) -> Float[Array, "b p d"]:
        """What the first head is told of each pivot; `pivots` count where they are known only."""
        x = self.pivot_embed(jnp.where(known[..., None], pivots, 0))
        return self._run(labels, x, known, PIVOTS, train) + self.head_position[: self.pivots]

    def dense_features(
        self,
        labels: Int[Array, "b"],
        tokens: Float[Array, "b l c"],
        known: Bool[Array, "b l"],
        z: Float[Array, "b p d"],
        shown: Bool[Array, "b p"],
        *,
        train: bool = False,
    ) -> Float[Array, "b l d"]:
        """What the second head is told of each dense token, given the pivots' features `z` where they are shown."""
        pivots = jnp.where(shown[..., None], self.feature_embed(z), self.pivot_embed(self.hidden_pivot))
        x = jnp.concatenate([pivots, self.token_embed(jnp.where(known[..., None], tokens, 0))], axis=1)
        known = jnp.concatenate([jnp.ones_like(shown), known], axis=1)
        return (self._run(labels, x, known, DENSE, train) + self.head_position)[:, self.pivots :]

    def __call__(
        self,
        labels: Int[Array, "b"],
        tokens: Float[Array, "b l c"],
        pivots: Float[Array, "b p c"],
        known: Bool[Array, "b l"],
        known_pivots: Bool[Array, "b p"],
        shown: Bool[Array, "b"],
        key: Key[Array, ""],
        *,
        repeats: int = 1,
        train: bool = False,
    ) -> Float[Array, ""]:
        """The losses of both phases, weighed; each the mean over `repeats` noise levels.

        The first is that of unknown pivots, the second that of all dense tokens, known or not.

        Args:
          labels: classes.
          tokens: dense.
          pivots: of the same images.
          known: dense tokens that the second phase is given.
          known_pivots: that the first phase is given.
          shown: rows whose second phase is shown the features of the other pivots.
          key: of the noise.
          repeats: noise levels.
          train: drops; needs the rng stream "dropout".
        """
        key_pivots, key_dense = jax.random.split(key)
        z = self.pivot_features(labels, pivots, known_pivots, train=train)
        errors = self.head.loss(z[:, None], jnp.repeat(pivots[:, None], repeats, axis=1), key_pivots).mean(1)
        first = jnp.where(known_pivots, 0, errors).sum() / jnp.maximum((~known_pivots).sum(), 1)
        z = self.dense_features(labels, tokens, known, jax.lax.stop_gradient(z), shown[:, None] & ~known_pivots, train=train)
        second = self.dense_head.loss(jnp.repeat(z, repeats, axis=0), jnp.repeat(tokens, repeats, axis=0), key_dense).mean()
        p, l = self.pivots, self.length
        return (PIVOT_LOSS * p * first + DENSE_LOSS * l * second) / (p + l)

    def step(self, cache: None, view: View, labels: Int[Array, "b"]) -> tuple[Out, None]:
        """The first phase as `jaxgen.decoding.masked_latents` asks it: `view.mask` says which pivots are known."""
        z = self.pivot_features(labels, view.tokens, view.mask[:, 0])
        return Out(z, z), cache

    def predict(self, z: Float[Array, "*b d"], x: Float[Array, "*b c"], times: Int[Array, "*b"]):
        """The pivots' head, see `DiffusionHead.__call__`."""
        return self.head(z, x, times)

    def predict_dense(self, z: Float[Array, "b l d"], x: Float[Array, "b l c"], times: Int[Array, "*b"]) -> Float[Array, "b l c"]:
        """The dense tokens' head, see `DiffusionTransformerHead.__call__`."""
        return self.dense_head(z, x, times)


def cosine_known(key: Key[Array, ""], batch: int, length: int) -> Bool[Array, "b l"]:
    """Which dense tokens are known in training: a random set a row, of ceil(l cos(pi u / 2)) unknown for uniform u, so that
    all stages of sampling occur (Chang et al. 2022, section 3.1)."""
    key_rate, key_order = jax.random.split(key)
    rate = jnp.cos(math.pi / 2 * jax.random.uniform(key_rate, (batch, 1)))
    return known_at(key_order, rate, length)
