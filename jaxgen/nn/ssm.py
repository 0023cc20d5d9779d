"""State-space layers: Mamba-2, as linear attention with an input-dependent decay."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxgen.decoding.recurrent_cache import Nodes
from jaxgen.nn.recurrent import RecurrentState, ShortConv, check_state, read_write, selective_decay
from jaxgen.nn.tree_scan import tree_read

__all__ = ["Mamba2"]


class Mamba2(nn.Module):
    """S_t = exp(-A dt_t) S_{t-1} + dt_t B_t x_t^T, y_t = S_t^T C_t + D x_t, a layer of structured state-space duality.

    Dao and Gu 2024 (arXiv:2405.21060), section 7 and fig. 6: one projection gives z, x, B, C and dt; x, B and C pass a short
    convolution and silu; dt = softplus; y is gated by silu(z), normalised and projected. B and C are shared by the heads of a
    group, as keys and queries of grouped-query attention are.

    With e = expand * d, h = e / head_size: parameters in kernel [d, 2 e + 2 g n + h], conv kernel [w, e + 2 g n] and bias, A_log,
    dt_bias, D [h], norm scale [g, e / g], out kernel [e, d].

    Attributes:
      state_size: n.
      head_size: of x.
      expand: e / d.
      groups: g; divides the heads.
      conv_size: w, tokens that the convolution reads.
      kernel_init: of the projections.
      out_init: of the output projection.
      dtype: of the computation; the state, dt and the norm are float32.
      implementation: see `kernels_pallas.linear_attention`; a single token after a state needs none.

    Example:
      >>> layer = Mamba2(state_size=16, head_size=8)
      >>> out, state = layer.apply(params, x)                 # x [b, t, d]
      >>> more, state = layer.apply(params, token, state)     # token [b, 1, d]
    """

    state_size: int = 128
    head_size: int = 64
    expand: int = 2
    groups: int = 1
    conv_size: int = 4
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    def _sizes(self, width: int) -> tuple[int, int]:
        """(e, h)."""
        for name in ("state_size", "head_size", "expand", "groups", "conv_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        inner = self.expand * width
        heads = inner // self.head_size
        if inner % self.head_size or heads % self.groups:
            raise ValueError(
                f"expand={self.expand} of width {width} must be whole heads of head_size={self.head_size}, "
                f"in groups={self.groups} of equal size"
            )
        return inner, heads

    def init_state(self, batch: int, width: int) -> RecurrentState:
        """The state before any token."""
        inner, heads = self._sizes(width)
        conv = jnp.zeros((batch, self.conv_size - 1, inner + 2 * self.groups * self.state_size), self.dtype)
        return RecurrentState(jnp.zeros((batch, heads, self.state_size, self.head_size)), conv)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: RecurrentState | None = None, mask: Bool[Array, "*b t t"] | None = None
    ) -> tuple[Float[Array, "b t d"], RecurrentState | Nodes]:
        """(output, next state); with `mask`, (output, nodes).

        With `mask` and a state x are the nodes of a tree, each of which sees its ancestors and itself; the state stays, and the
        nodes are what it needs to take in a path of them, see `jaxgen.decoding.RecurrentCache`.
        """
        b, t, width = x.shape
        inner, heads = self._sizes(width)
        shared = self.groups * self.state_size
        memory, tail, *_ = check_state(self, state, x)
        dense = dict(use_bias=False, dtype=self.dtype)
        wide = nn.Dense(2 * inner + 2 * shared + heads, kernel_init=self.kernel_init, **dense, name="in")(x)
        z, xbc, dt = jnp.split(wide, (inner, 2 * inner + 2 * shared), axis=-1)
        convolved, tail = ShortConv(self.conv_size, dtype=self.dtype, name="conv")(xbc, tail, mask)
        v, k, q = jnp.split(nn.silu(convolved), (inner, inner + shared), axis=-1)
        v = v.reshape(b, t, heads, self.head_size)
        q, k = (jnp.repeat(y.reshape(b, t, self.groups, -1), heads // self.groups, axis=2) for y in (q, k))
        dt, log_decay = selective_decay(self, dt, rates=(1.0, 16.0))
        written = (v * dt[..., None]).astype(self.dtype)
        if mask is None:
            y, memory = read_write(q, k, written, log_decay, memory, self.implementation)
            after = RecurrentState(memory, tail)
        else:
            y = tree_read(q, k, written, log_decay, memory, mask)
            after = Nodes(k, written, log_decay, xbc.astype(self.dtype))
        y = y + self.param("D", nn.initializers.ones_init(), (heads,))[:, None] * v
        y = y.reshape(b, t, self.groups, -1) * nn.silu(z.astype(jnp.float32)).reshape(b, t, self.groups, -1)
        y = nn.RMSNorm(epsilon=1e-5, feature_axes=(-2, -1), dtype=jnp.float32, name="norm")(y)
        y = y.reshape(b, t, inner).astype(self.dtype)
        return nn.Dense(width, kernel_init=self.out_init, **dense, name="out")(y), after
