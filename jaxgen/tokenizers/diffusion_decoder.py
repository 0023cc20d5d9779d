"""A transformer of noisy pixels that is told what to make of them by a few vectors (D-AR, Gao and Shou 2025, section 3.2)."""

from __future__ import annotations

from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.nn.adaln import Modulation, layer_norm
from jaxgen.nn.attention import SelfAttention
from jaxgen.nn.cross_attention import Context, CrossAttention
from jaxgen.nn.mlp import MLP
from jaxgen.nn.timestep import TimestepEmbedding

__all__ = ["DiffusionDecoder", "TokenSteeredBlock"]


class TokenSteeredBlock(nn.Module):
    """A block whose modulation each patch asks for: of the time, and of what it reads in the vectors.

    Attributes:
      those of `DiffusionDecoder`.
      told: whether a scan is to keep what the block leaves.
    """

    heads: int
    mlp_ratio: float = 4.0
    told: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], vectors: Float[Array, "b n d"], t: Float[Array, "b"], coords):
        """(x, None or x), the form that a scan wants."""
        width = x.shape[-1]
        init = nn.initializers.xavier_uniform()
        dense = dict(kernel_init=init, dtype=self.dtype)
        read = nn.Dense(width, **dense, name="vectors_fc1")(vectors.astype(self.dtype))
        read = layer_norm(nn.Dense(width, **dense, name="vectors_fc2")(nn.silu(read))).astype(self.dtype)
        context = Context(read, jnp.ones(read.shape[:2], bool))
        asked = CrossAttention(self.heads, kernel_init=init, out_init=init, dtype=self.dtype, name="cross")
        asked = asked(layer_norm(x).astype(self.dtype), context, coords)
        cond = TimestepEmbedding(width, frequencies=width, name="time")(1000 * t)[:, None] + asked
        # All zeros at first: a block begins as the identity.
        ada = Modulation(width, gate_init=0.0, rest_init=0.0, dtype=self.dtype, name="ada")(cond)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.moveaxis(ada, -2, 0)
        h = (layer_norm(x) * (1 + scale1) + shift1).astype(self.dtype)
        h = SelfAttention(self.heads, kernel_init=init, out_init=init, dtype=self.dtype, name="attention")(h, coords=coords)[0]
        x = x + (gate1 * h).astype(x.dtype)
        h = (layer_norm(x) * (1 + scale2) + shift2).astype(self.dtype)
        h = MLP(round(self.mlp_ratio * width), kernel_init=init, out_init=init, dtype=self.dtype, name="mlp")(h)
        x = x + (gate2 * h).astype(x.dtype)
        return x, x if self.told else None


class DiffusionDecoder(nn.Module):
    """Noisy pixels, a time and vectors -> velocity; 0 before training.

    Attributes:
      patch: side of a patch, in pixels.
      width: d.
      heads: h.
      depth: number of blocks.
      mlp_ratio: hidden width of the MLPs over d.
      scan_layers: parameters of all blocks are stacked, and the blocks run in a `lax.scan`.
      remat: recompute block activations in the backward pass.
      dtype: of the computation.
    """

    patch: int
    width: int
    heads: int
    depth: int
    mlp_ratio: float = 4.0
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b H W C"], t: Float[Array, "b"], vectors: Float[Array, "b n c"], after: int = 0
    ) -> Float[Array, "b H W C"] | tuple[Float[Array, "b H W C"], Float[Array, "b h w d"]]:
        """The velocity; with `after`, also what the patches are after so many blocks.

        Args:
          x: noisy pixels.
          t: in [0, 1], how far the picture has come; 1 is done.
          vectors: what is to be made of them.
          after: 1 to `depth`, or 0.

        Raises:
          ValueError: more blocks than there are.
        """
        if not 0 <= after <= self.depth:
            raise ValueError(f"after={after}: the decoder has {self.depth} blocks")
        rows, columns, channels = x.shape[1] // self.patch, x.shape[2] // self.patch, x.shape[3]
        init = nn.initializers.xavier_uniform()
        h = einops.rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
        h = nn.Dense(self.width, dtype=self.dtype, name="patches")(h.astype(self.dtype))
        vectors = layer_norm(nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="vectors")(vectors.astype(self.dtype)))
        coords = np.indices((rows, columns)).reshape(2, -1).T
        block = nn.remat(TokenSteeredBlock, prevent_cse=not self.scan_layers) if self.remat else TokenSteeredBlock
        fields = dict(heads=self.heads, mlp_ratio=self.mlp_ratio, told=bool(after), dtype=self.dtype)
        if self.scan_layers:
            stack = nn.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(nn.broadcast,) * 3, length=self.depth
            )
            h, hidden = stack(**fields, name="blocks")(h, vectors, t, coords)
        else:
            hidden = []
            for i in range(self.depth):
                h, left = block(**fields, name=f"blocks_{i}")(h, vectors, t, coords)
                hidden.append(left)
        out = nn.Dense(self.patch**2 * channels, kernel_init=nn.initializers.zeros, name="out")(layer_norm(h))
        sides = dict(h=rows, w=columns, p=self.patch, q=self.patch)
        velocity = einops.rearrange(out, "b (h w) (p q c) -> b (h p) (w q) c", **sides)
        return (velocity, hidden[after - 1].reshape(len(x), rows, columns, -1)) if after else velocity
