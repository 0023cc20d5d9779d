"""Next-scale prediction of continuous tokens, each scale drawn by a flow: FlowAR (S010; Ren et al. 2024, arXiv:2412.15205)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen import masks
from jaxgen.config import fields_of
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import FlowModel
from jaxgen.heads.flow import FlowHead
from jaxgen.orders import Order, scales
from jaxgen.resample import resize
from jaxgen.units import check_scales, doubling, pyramid, scale_coords

__all__ = ["FlowScaleTransformer"]


class FlowScaleTransformer(FlowModel):
    """Class label and coarser scales of a latent -> a feature for every token of a scale; a flow draws the tokens from those.

    Scales are the latent itself at several sizes, each twice the last, so that any autoencoder will do. The first scale starts
    from the class; each other reads the one before it, enlarged. Attention is causal across scales.

    Attributes:
      head_width, head_depth, head_heads: of the `FlowHead`.
      scales: sizes along a side, increasing, the last of them `grid`; () doubles up to it.
      channels, grid, num_classes, width, ...: see `FlowModel`.

    Example:
      >>> model = FlowScaleTransformer(channels=16, grid=16, num_classes=1000, width=768, depth=6, heads=12)
      >>> loss = model.apply(params, labels, tokens, key)       # labels [b], tokens [b, 256, 16]
    """

    head_width: int = 1024
    head_depth: int = 2
    head_heads: int = 0
    scales: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens along a side of each scale."""
        return check_scales(self.scales or doubling(self.grid), self.grid)

    @property
    def order(self) -> Order:
        """The scales."""
        return scales(self.sizes)

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=init)
        self.token_embed = nn.Dense(self.width, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        self.start = self.param("start", init, (self.order.sizes[0] - 1, self.width)) if self.order.sizes[0] > 1 else None
        self.stacks = self.build_stacks()
        self.head_position = self.param("head_position", init, (self.order.length, self.width))
        sizes = dict(width=self.head_width, depth=self.head_depth, heads=self.head_heads)
        self.head = FlowHead(**fields_of(self, FlowHead) | sizes)

    def features(self, labels: Int[Array, "b"], latents: Float[Array, "b L c"], *, train: bool = False) -> Float[Array, "b L d"]:
        """What the head is told of every token, given the `latents` of all scales (see `pyramid`)."""
        order, cond = self.order, self.class_embed(labels)
        x = [self._first(cond)]
        for scale, latent in enumerate(order.split(latents)[:-1]):
            x.append(self.token_embed(self.enlarge(latent, scale)))
        pos = jnp.arange(order.length)
        coords = jnp.asarray(scale_coords(order, self.grid))
        mask = masks.block_causal(order)
        z, _ = self.stacks(jnp.concatenate(x, axis=1), cond, pos, coords, mask=mask, train=train)
        return z + self.head_position

    def _first(self, cond) -> Float[Array, "b q d"]:
        """Inputs of the first scale."""
        return cond[:, None] if self.start is None else jnp.concatenate([cond[:, None], cond[:, None] + self.start], axis=1)

    def enlarge(self, latent: Float[Array, "b q c"], scale: int) -> Float[Array, "b r c"]:
        """A scale at the size of the next: bicubic to the whole grid, then the mean over the area, as released."""
        (h, w), b, following = self.order.shapes[scale], latent.shape[0], self.sizes[scale + 1]
        x = resize(latent.reshape(b, h, w, self.channels), (self.grid, self.grid), "bicubic")
        return resize(x, (following, following), "area").reshape(b, following**2, self.channels)

    def begin(self, enlarged: Float[Array, "b q c"], noise: Float[Array, "b q c"], scale: int) -> Float[Array, "b q c"]:
        """What the flow of a scale starts from: noise alone."""
        return noise

    def __call__(
        self, labels: Int[Array, "b"], tokens: Float[Array, "b l c"], key: Key[Array, ""], *, train: bool = False
    ) -> Float[Array, ""]:
        """The loss of a latent's tokens: errors of the velocity in all scales, summed over tokens and divided by the grid's."""
        latents, order = pyramid(tokens, self.sizes), self.order
        z = self.features(labels, latents, train=train)
        places = dict(coords=jnp.asarray(scale_coords(order, self.grid)), mask=masks.block_diagonal(order))
        errors = self.head.loss(z, latents, key, groups=order.step_of, **places)
        return errors.sum(1).mean() / self.grid**2

    def step(self, cache, view: View, labels: Int[Array, "b"]) -> tuple[Out, Any]:
        """The features of one scale, `view.time`, in the light of the cached ones.

        Args:
          cache: see `init_cache`.
          view: the enlarged scale before [b, q, c] at the positions of this one (at scale 0 it is not read).
          labels: [b].
        """
        cond = self.class_embed(labels)
        x = self._first(cond) if view.time == 0 else self.token_embed(view.tokens)
        coords = jnp.asarray(scale_coords(self.order, self.grid))
        z, cache = self.stacks(x, cond, view.pos, coords, cache)
        z = z + self.head_position[view.pos]
        return Out(z, z), cache

    def velocity(
        self, z: Float[Array, "b q d"], x: Float[Array, "b q c"], t: Float[Array, ""], scale: int
    ) -> Float[Array, "b q c"]:
        """The flow of one scale's tokens at level t, given their features."""
        coords = jnp.asarray(scale_coords(self.order, self.grid)[slice(*self.order.span(scale))])
        return self.head(z, x, jnp.broadcast_to(t, x.shape[:1]), coords=coords)
