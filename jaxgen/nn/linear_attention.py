"""Attention layers whose memory of the past is a matrix of constant size.

    out, state = layer.apply(params, x, state)

reads x [b, t, d] after what `state` holds (None is the beginning) and returns the state for what comes next, so that a
sequence in pieces, down to single tokens, is the sequence at once. `layer.init_state(batch, width)` is an empty state, for loops
that carry one.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.nn.attention import l2_normalise
from jaxgen.nn.recurrent import RecurrentState, ShortConv, check_state, read_write, selective_decay
from kernels_pallas.delta import gated_delta, gated_delta_step

__all__ = ["GatedDeltaNet", "GatedLinearAttention", "LinearAttention", "Retention"]

FEATURE_MAPS = {"elu": lambda x: nn.elu(x) + 1, "relu": nn.relu, "identity": lambda x: x}
# What is added to the normaliser: with ReLU features a query may match no key at all.
EPSILON = 1e-6


def _size(width: int, factor: float, heads: int, name: str) -> int:
    """Width of a head where all heads together have `factor * width`."""
    size = round(factor * width)
    if heads < 1 or size < 1 or not math.isclose(size, factor * width) or size % heads:
        raise ValueError(f"{name}={factor} of width {width} is {factor * width}, which heads={heads} does not divide")
    return size // heads


def _heads(layer: nn.Module, size: int, name: str) -> nn.DenseGeneral:
    return nn.DenseGeneral((layer.heads, size), use_bias=False, kernel_init=layer.kernel_init, dtype=layer.dtype, name=name)


def _out(layer: nn.Module, o, width: int):
    return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, kernel_init=layer.out_init, dtype=layer.dtype, name="proj")(o)


def _gated_out(layer: nn.Module, o, x, *, use_scale: bool = True):
    """Each head is normalised, gated by silu of a projection of x, and all are projected to the width of x."""
    gate = _heads(layer, o.shape[-1], "gate")(x)
    o = nn.RMSNorm(epsilon=1e-5, use_scale=use_scale, dtype=jnp.float32, name="norm")(o)
    return _out(layer, (o * nn.silu(gate)).astype(layer.dtype), x.shape[-1])


class LinearAttention(nn.Module):
    """o_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), over the j that i may see.

    Katharopoulos et al. 2020 (arXiv:2006.16236), eq. 4 and 8, with phi = elu + 1; SANA (Xie et al. 2024, arXiv:2410.10629) with
    ReLU, SANA-Video (arXiv:2509.24695) with blocks.

    Parameters: q, k, v kernels [d, h, dk], proj kernel [h, dk, d].

    Attributes:
      heads: h.
      head_size: dk; None is d / h.
      feature_map: phi: "elu" (elu + 1), "relu" or "identity".
      normalise: divide by the sum of the weights; without it queries are scaled by dk ** -0.5. Not with "identity", whose
        weights may cancel.
      causal: False lets every token of a call see all others of it.
      block_size: with causal, tokens see their whole block; a call starts a new block.
      kernel_init: of the projections.
      out_init: of the output projection.
      dtype: of the computation; the state and the normaliser are float32.
      implementation: see `kernels_pallas.linear_attention`; a single token after a state needs none.
    """

    heads: int
    head_size: int | None = None
    feature_map: str = "elu"
    normalise: bool = True
    causal: bool = True
    block_size: int | None = None
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    def _key_size(self, width: int) -> int:
        return self.head_size or _size(width, 1, self.heads, "1")

    def init_state(self, batch: int, width: int) -> RecurrentState:
        """The state before any token."""
        shape = (batch, self.heads, self._key_size(width))
        return RecurrentState(jnp.zeros((*shape, shape[-1])), normaliser=jnp.zeros(shape) if self.normalise else None)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: RecurrentState | None = None
    ) -> tuple[Float[Array, "b t d"], RecurrentState]:
        """(output, next state)."""
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={self.feature_map!r} is not one of {tuple(FEATURE_MAPS)}")
        if self.normalise and self.feature_map == "identity":
            raise ValueError("normalise=True needs weights that cannot cancel, which feature_map='identity' lacks")
        size = self._key_size(x.shape[-1])
        phi = FEATURE_MAPS[self.feature_map]
        q, k, v = (_heads(self, size, name)(x) for name in ("q", "k", "v"))
        q, k = phi(q), phi(k)
        if not self.normalise:
            q = q * size**-0.5
        state = check_state(self, state, x)
        order = dict(causal=self.causal, block_size=self.block_size)
        out, memory = read_write(q, k, v, None, state.memory, self.implementation, **order)
        after = None
        if self.normalise:
            total, after = _weights(q, k, state.normaliser, (self.block_size or 1) if self.causal else x.shape[1])
            out = (out / (total[..., None] + EPSILON)).astype(self.dtype)
        return _out(self, out, x.shape[-1]), RecurrentState(memory, normaliser=after)


def _weights(q, k, before, size: int):
    """(phi(q).(sum of phi(k) over what a token sees) [b, t, h], sum over everything [b, h, dk]), for blocks of `size` tokens."""
    b, t, h, d = k.shape
    padded = jnp.pad(k.astype(jnp.float32), ((0, 0), (0, -t % size), (0, 0), (0, 0)))
    sums = jnp.cumsum(padded.reshape(b, -1, size, h, d).sum(axis=2), axis=1)
    if before is not None:
        sums = sums + before[:, None]
    seen = jnp.repeat(sums, size, axis=1)[:, :t]
    return jnp.sum(q.astype(jnp.float32) * seen, axis=-1), sums[:, -1]


class GatedLinearAttention(nn.Module):
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t dk^-0.5, a_t = sigmoid(x_t W1 W2 + b)^(1 / temperature).

    GLA (Yang et al. 2023, arXiv:2312.06635), section 4.4: heads are normalised and gated by silu of a projection of x.

    Parameters: q, k kernels [d, h, dk], v, gate kernels [d, h, dv], decay_in kernel [d, rank], decay_out kernel [rank, h, dk] and
    bias [h, dk], norm scale [dv], proj kernel [h, dv, d].

    Attributes:
      heads: h.
      expand_k: h dk / d.
      expand_v: h dv / d.
      rank: of the projection that gives the decay.
      temperature: the larger, the slower the decay.
      kernel_init: of the projections.
      out_init: of the output projection.
      dtype: of the computation; the state, the decay and the norm are float32.
      implementation: see `kernels_pallas.linear_attention`; a single token after a state needs none.
    """

    heads: int
    expand_k: float = 0.5
    expand_v: float = 1.0
    rank: int = 16
    temperature: float = 16.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    def _sizes(self, width: int) -> tuple[int, int]:
        return _size(width, self.expand_k, self.heads, "expand_k"), _size(width, self.expand_v, self.heads, "expand_v")

    def init_state(self, batch: int, width: int) -> RecurrentState:
        """The state before any token."""
        return RecurrentState(jnp.zeros((batch, self.heads, *self._sizes(width))))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: RecurrentState | None = None
    ) -> tuple[Float[Array, "b t d"], RecurrentState]:
        """(output, next state)."""
        dk, dv = self._sizes(x.shape[-1])
        q, k, v = (_heads(self, size, name)(x) for name, size in (("q", dk), ("k", dk), ("v", dv)))
        dense = dict(kernel_init=self.kernel_init, dtype=self.dtype)
        low = nn.Dense(self.rank, use_bias=False, **dense, name="decay_in")(x)
        decay = nn.DenseGeneral((self.heads, dk), **dense, name="decay_out")(low)
        log_decay = nn.log_sigmoid(decay.astype(jnp.float32)) / self.temperature
        state = check_state(self, state, x)
        out, memory = read_write(q * dk**-0.5, k, v, log_decay, state.memory, self.implementation)
        return _gated_out(self, out, x), RecurrentState(memory)


class Retention(nn.Module):
    """o_n = sum over m <= n of g^(n - m) (q_n e^{in theta}).(k_m e^{im theta}) v_m, with g = 1 - 2^(-5 - head) for each head.

    Multi-scale retention of RetNet (Sun et al. 2023, arXiv:2307.08621), eq. 5 to 8: heads are normalised, gated by silu of a
    projection of x. As in the authors' code the norm is RMS without parameters and theta_i = 10000^(-i / (dk / 2 - 1)).

    Parameters: q, k kernels [d, h, dk], v, gate kernels [d, h, dv], proj kernel [h, dv, d].

    Attributes:
      heads: h.
      expand_v: h dv / d; h dk is d, and dk must be even.
      kernel_init: of the projections.
      out_init: of the output projection.
      dtype: of the computation; the state, the rotation and the norm are float32.
      implementation: see `kernels_pallas.linear_attention`; a single token after a state needs none.
    """

    heads: int
    expand_v: float = 2.0
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    def _sizes(self, width: int) -> tuple[int, int]:
        sizes = _size(width, 1, self.heads, "1"), _size(width, self.expand_v, self.heads, "expand_v")
        if sizes[0] % 2:
            raise ValueError(f"heads={self.heads} of width {width} have size {sizes[0]}; rotation needs an even one")
        return sizes

    def init_state(self, batch: int, width: int) -> RecurrentState:
        """The state before any token."""
        memory = jnp.zeros((batch, self.heads, *self._sizes(width)))
        return RecurrentState(memory, position=jnp.zeros(batch, jnp.int32))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: RecurrentState | None = None
    ) -> tuple[Float[Array, "b t d"], RecurrentState]:
        """(output, next state)."""
        b, t, width = x.shape
        dk, dv = self._sizes(width)
        q, k, v = (_heads(self, size, name)(x) for name, size in (("q", dk), ("k", dk), ("v", dv)))
        state = check_state(self, state, x)
        position = jnp.zeros(b, jnp.int32) if state.position is None else state.position
        places = position[:, None] + jnp.arange(t)
        q, k = _rotate(q * dk**-0.5, places), _rotate(k, places)
        log_decay = jnp.broadcast_to(jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.heads)))), (b, t, self.heads))
        out, memory = read_write(q, k, v, log_decay, state.memory, self.implementation)
        return _gated_out(self, out, x, use_scale=False), RecurrentState(memory, position=position + t)


def _rotate(x: Float[Array, "b t h d"], places: Int[Array, "b t"]) -> Float[Array, "b t h d"]:
    """Neighbouring pairs of channels turned by place times theta."""
    theta = 10000.0 ** -jnp.linspace(0.0, 1.0, x.shape[-1] // 2)
    angle = (places[..., None] * theta)[:, :, None]
    real, imaginary = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = (real * jnp.cos(angle) - imaginary * jnp.sin(angle), real * jnp.sin(angle) + imaginary * jnp.cos(angle))
    return jnp.stack(turned, axis=-1).reshape(x.shape).astype(x.dtype)


class GatedDeltaNet(nn.Module):
    """S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t dk^-0.5, with keys of unit length.

    Yang et al. 2024 (arXiv:2412.06464), eq. 10 and fig. 1: q, k and v pass a short convolution and silu, q and k are normalised,
    beta = sigmoid, a as in Mamba-2, and heads are normalised and gated by silu of a projection of x.

    Parameters: qkv kernel [d, h (2 dk + dv)], conv kernel [w, h (2 dk + dv)], beta, dt kernels [d, h], A_log [h], dt_bias [h],
    gate kernel [d, h, dv], norm scale [dv], proj kernel [h, dv, d].

    Attributes:
      heads: h.
      head_size: dk; None is d / h.
      expand_v: dv / dk.
      conv_size: w, tokens that the convolution reads; None is no convolution.
      negative_eigenvalues: beta up to 2 instead of 1.
      kernel_init: of the projections.
      out_init: of the output projection.
      dtype: of the computation; the state, the decay and the norms are float32.
      implementation: see `kernels_pallas.gated_delta`; a single token after a state needs none.
    """

    heads: int
    head_size: int | None = None
    expand_v: float = 2.0
    conv_size: int | None = 4
    negative_eigenvalues: bool = False
    kernel_init: Any = nn.initializers.xavier_uniform()
    out_init: Any = nn.initializers.xavier_uniform()
    dtype: Any = jnp.float32
    implementation: str | None = None

    def _sizes(self, width: int) -> tuple[int, int]:
        if self.conv_size is not None and self.conv_size < 1:
            raise ValueError(f"conv_size={self.conv_size} must be at least 1, or None")
        dk = self.head_size or _size(width, 1, self.heads, "1")
        return dk, _size(dk, self.expand_v, 1, "expand_v")

    def init_state(self, batch: int, width: int) -> RecurrentState:
        """The state before any token."""
        dk, dv = self._sizes(width)
        conv = None
        if self.conv_size is not None:
            conv = jnp.zeros((batch, self.conv_size - 1, self.heads * (2 * dk + dv)), self.dtype)
        return RecurrentState(jnp.zeros((batch, self.heads, dk, dv)), conv)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], state: RecurrentState | None = None
    ) -> tuple[Float[Array, "b t d"], RecurrentState]:
        """(output, next state)."""
        b, t, width = x.shape
        dk, dv = self._sizes(width)
        h = self.heads
        dense = dict(use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype)
        qkv = nn.Dense(h * (2 * dk + dv), **dense, name="qkv")(x)
        memory, tail, *_ = check_state(self, state, x)
        if self.conv_size is not None:
            qkv, tail = ShortConv(self.conv_size, use_bias=False, dtype=self.dtype, name="conv")(qkv, tail)
        q, k, v = jnp.split(nn.silu(qkv), (h * dk, 2 * h * dk), axis=-1)
        q, k = (l2_normalise(x.reshape(b, t, h, dk)) for x in (q, k))
        q, k, v = (q * dk**-0.5).astype(self.dtype), k.astype(self.dtype), v.reshape(b, t, h, dv)
        beta = nn.sigmoid(nn.Dense(h, **dense, name="beta")(x).astype(jnp.float32))
        if self.negative_eigenvalues:
            beta = 2 * beta
        _, log_decay = selective_decay(self, nn.Dense(h, **dense, name="dt")(x), rates=(1.0, 16.0))
        if t > 1 or memory is None:
            out, memory = gated_delta(q, k, v, log_decay, beta, state=memory, implementation=self.implementation)
        else:
            out, memory = gated_delta_step(*(x[:, 0] for x in (q, k, v, log_decay, beta)), memory)
            out = out[:, None]
        return _gated_out(self, out, x), RecurrentState(memory, tail)
