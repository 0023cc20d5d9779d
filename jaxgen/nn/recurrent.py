"""What layers with a state of constant size share: the state itself, the short convolution, the input-dependent decay."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.nn.tree_scan import tree_windows
from kernels_pallas.linear import linear_attention, linear_attention_step

__all__ = ["RecurrentState", "ShortConv", "check_state", "read_write", "selective_decay"]


class RecurrentState(NamedTuple):
    """All that a layer remembers of the tokens before; every leaf has the batch first, None is what a layer does not use.

    Attributes:
      memory: S, float32, written with keys and values and read with queries.
      conv: the last inputs of the short convolution.
      normaliser: sum of the keys so far, float32.
      position: tokens so far.
    """

    memory: Float[Array, "b h dk dv"] | None = None
    conv: Float[Array, "b w-1 c"] | None = None
    normaliser: Float[Array, "b h dk"] | None = None
    position: Int[Array, "b"] | None = None


def check_state(layer: nn.Module, state: RecurrentState | None, x: Float[Array, "b t d"]) -> RecurrentState:
    """`state`, or one of Nones where there is none.

    Raises:
      ValueError: a state that differs from `layer.init_state` in what it holds or in shapes.
    """
    want = jax.eval_shape(lambda: layer.init_state(x.shape[0], x.shape[-1]))
    if state is None:
        return RecurrentState()
    got, wanted = ({k: v.shape for k, v in s._asdict().items() if v is not None} for s in (state, want))
    if got != wanted:
        raise ValueError(f"state {got} does not fit {type(layer).__name__} and x {x.shape}, which need {wanted}")
    return state


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last `size` tokens, y_t = b + sum_j w_j x_{t - size + 1 + j}.

    Parameters: kernel [size, c], bias [c].

    Attributes:
      size: w, tokens that are read, at least 1.
      use_bias: whether b is there.
      dtype: of the computation.
    """

    size: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], tail: Float[Array, "b w-1 c"] | None = None, mask: Bool[Array, "*b t t"] | None = None
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b w-1 c"]]:
        """(y, the last size - 1 tokens of x); `tail` are those before x, None is zeros.

        With `mask` x are the nodes of a tree, each of which sees its ancestors and itself, and `tail` is returned as it was.

        Raises:
          ValueError: a size below 1 or a tail of another shape.
        """
        b, t, c = x.shape
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")
        x = x.astype(self.dtype)
        if tail is None:
            tail = jnp.zeros((b, self.size - 1, c), self.dtype)
        if tail.shape != (b, self.size - 1, c):
            raise ValueError(f"tail {tail.shape} must be {(b, self.size - 1, c)} for x {x.shape}")
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.size, c)).astype(self.dtype)
        if mask is None:
            seen = jnp.concatenate([tail.astype(self.dtype), x], axis=1)
            y = sum(kernel[j] * seen[:, j : j + t] for j in range(self.size))
            tail = seen[:, t:]
        else:
            y = jnp.einsum("wc,bqwc->bqc", kernel, tree_windows(x, tail.astype(self.dtype), mask))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros_init(), (c,)).astype(self.dtype)
        return y, tail


def selective_decay(
    module: nn.Module, x: Float[Array, "b t h"], rates: tuple[float, float]
) -> tuple[Float[Array, "b t h"], Float[Array, "b t h"]]:
    """Step sizes dt = softplus(x + dt_bias) and log decays -exp(A_log) dt, float32 (Dao and Gu 2024, arXiv:2405.21060).

    Parameters: A_log [h] and dt_bias [h], so drawn that at first exp(A_log) is uniform in `rates` and dt log-uniform in
    [0.001, 0.1].

    Args:
      module: that owns the parameters.
      x: a projection of the input.
      rates: range of the initial rates, positive.
    """

    def log_rate(key, shape):
        return jnp.log(jax.random.uniform(key, shape, minval=rates[0], maxval=rates[1]))

    def inverse_softplus(key, shape):
        dt = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(0.1)))
        return dt + jnp.log(-jnp.expm1(-dt))

    shape = x.shape[-1:]
    dt = nn.softplus(x.astype(jnp.float32) + module.param("dt_bias", inverse_softplus, shape))
    return dt, -jnp.exp(module.param("A_log", log_rate, shape)) * dt


def read_write(
    q: Float[Array, "b t h dk"],
    k: Float[Array, "b t h dk"],
    v: Float[Array, "b t h dv"],
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h dk"] | None,
    memory: Float[Array, "b h dk dv"] | None,
    implementation: str | None,
    **order,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """`linear_attention` with the options `order`; a single token that continues a sequence takes one pass over the memory."""
    if q.shape[1] > 1 or memory is None:
        return linear_attention(q, k, v, log_decay, state=memory, implementation=implementation, **order)
    decay = None if log_decay is None else log_decay[:, 0]
    out, memory = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], decay, memory)
    return out[:, None], memory
