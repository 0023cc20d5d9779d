"""Next-X prediction (S048 xAR): a flow for each entity, given the earlier ones.

Ren et al. 2025, *Beyond next-token: next-X prediction for autoregressive visual generation* (arXiv:2502.20388). The released
model (OliverRensu/xAR) predicts cells of 8 x 8 tokens; the same network takes the other entities of the paper.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen import masks
from jaxgen.decoding.step import Out, View
from jaxgen.generators.bases import FlowModel
from jaxgen.heads.flow import flow_time
from jaxgen.nn.timestep import TimestepEmbedding
from jaxgen.orders import Order
from jaxgen.paths_flow import LinearFlow, logit_normal_times
from jaxgen.units import Units

__all__ = ["CONTEXTS", "NextXTransformer"]

CONTEXTS = ("noisy", "clean")


class NextXTransformer(FlowModel):
    """Class label and earlier entities -> the velocity of an entity's tokens on their way from noise.

    An entity is a step of `Units`. In training all entities of an image are noisy, each at a level of its own, and each sees the
    noisy earlier ones: noisy-context learning (figure 3). In sampling earlier entities are finished and count as level 0.

    Attributes:
      unit, unit_size: what an entity is, see `Units`.
      context: "noisy", or "clean" for teacher forcing: in training entities see the earlier ones as they are in the data, which
        run beside the noisy ones as a second half of the sequence.
      channels, grid, num_classes, width, ...: see `FlowModel`.

    Example:
      >>> model = NextXTransformer(channels=16, grid=16, num_classes=1000, width=768, depth=8, heads=12)
      >>> loss = model.apply(params, labels, tokens, key)       # labels [b], tokens [b, 256, 16]
    """

    unit: str = "cell"
    unit_size: int = 8
    context: str = "noisy"

    @property
    def units(self) -> Units:
        """The entities."""
        return Units(self.unit, self.grid, self.unit_size)

    @property
    def order(self) -> Order:
        """A step an entity."""
        return self.units.order

    def setup(self):
        xavier = nn.initializers.xavier_uniform()
        self.class_embed = nn.Embed(self.num_classes + 1, self.width, embedding_init=nn.initializers.normal(0.02))
        self.time = TimestepEmbedding(self.width)
        self.token_embed = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype)
        self.stacks = self.build_stacks()
        self.outputs = nn.Dense(self.channels, kernel_init=xavier)

    def _condition(self, labels, t) -> Float[Array, "b *g d"]:
        classes = self.class_embed(labels)
        return jnp.expand_dims(classes, tuple(range(1, jnp.ndim(t)))) + self.time(flow_time(t))

    def velocity(
        self,
        labels: Int[Array, "b"],
        x: Float[Array, "b L c"],
        t: Float[Array, "b K"],
        clean: Float[Array, "b L c"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b L c"]:
        """The expected velocities of all entities at once.

        Args:
          labels: classes.
          x: noisy entities.
          t: the level of each.
          clean: what they see of the earlier ones; None is `x` itself.
          train: drops; needs the rng stream "dropout".
        """
        order = self.order
        pos, groups, mask = np.arange(order.length), order.step_of, masks.block_causal
        if clean is not None:
            x, t = jnp.concatenate([x, clean], axis=1), jnp.concatenate([t, jnp.zeros_like(t)], axis=1)
            pos, groups, mask = np.tile(pos, 2), np.concatenate([groups, groups + order.steps]), masks.block_diffusion
        h, _ = self.stacks(
            self.token_embed(x),
            self._condition(labels, t),
            jnp.asarray(pos),
            jnp.asarray(self.units.coords),
            groups=jnp.asarray(groups),
            mask=mask(order),
            train=train,
        )
        return self.outputs(h[:, : order.length].astype(jnp.float32))

    def __call__(
        self, labels: Int[Array, "b"], tokens: Float[Array, "b l c"], key: Key[Array, ""], *, train: bool = False
    ) -> Float[Array, ""]:
        """Squared error of the velocity at one level for each entity, drawn from the logit-normal law."""
        if self.context not in CONTEXTS:
            raise ValueError(f"context={self.context!r}: expected one of {', '.join(CONTEXTS)}")
        order, path = self.order, LinearFlow()
        x0 = self.units.split(tokens)
        key_t, key_noise = jax.random.split(key)
        t = logit_normal_times(key_t, (x0.shape[0], order.steps))
        noise = jax.random.normal(key_noise, x0.shape)
        x = path.interpolate(x0, noise, t[:, order.step_of])
        velocity = self.velocity(labels, x, t, x0 if self.context == "clean" else None, train=train)
        return jnp.square(velocity - path.velocity(x0, noise)).mean()

    def step(self, cache, view: View, labels: Int[Array, "b"]) -> tuple[Out, Any]:
        """Velocities [b, q, c] of the tokens of one entity in the light of the cached, finished ones.

        Args:
          cache: see `init_cache`.
          view: noisy tokens [b, q, c] at their positions; `view.time` is their level.
          labels: [b].
        """
        cond = self._condition(labels, jnp.broadcast_to(view.time, labels.shape))
        h, cache = self.stacks(self.token_embed(view.tokens), cond, view.pos, jnp.asarray(self.units.coords), cache)
        return Out(self.outputs(h.astype(jnp.float32)), h), cache
