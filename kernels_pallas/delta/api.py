"""The gated delta rule: linear attention whose state is corrected, not only added to."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.delta.problem import Problem
from kernels_pallas.device import Device
from kernels_pallas.dispatch import Implementation, choose
from kernels_pallas.linear.problem import FLOOR

__all__ = ["gated_delta", "gated_delta_step"]

IMPLEMENTATIONS = (
    Implementation("tpu", "kernels_pallas.delta.tpu", ("tpu",), opaque=True),
    Implementation("hopper", "kernels_pallas.delta.hopper", ("gpu",), opaque=True),
    Implementation("xla", "kernels_pallas.delta.xla"),
)
_DTYPES = ("float32", "bfloat16", "float16")


def gated_delta(
    q: Float[Array, "b t h dk"],
    k: Float[Array, "b t h dk"],
    v: Float[Array, "b t h dv"],
    log_decay: Float[Array, "b t h"] | None,
    beta: Float[Array, "b t h"],
    state: Float[Array, "b h dk dv"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """Gated delta rule over a sequence.

        S_t = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
        o_t = S_t^T q_t

    The state is a memory from keys to values. A token first lets it decay, then moves what is stored at its key towards its
    value by the fraction beta. Nothing is scaled or normalised here: multiply q by dk^-0.5 and bring keys to unit length
    where the model says so. With |k| = 1 and beta <= 2 (beta > 1 lets eigenvalues be negative) the state stays bounded;
    with beta |k|^2 > 2 it grows without limit.

    Differentiable once, in every array, in reverse mode. What is kept for it are the inputs: states are computed again.
    TPUs have kernels. Hopper GPUs have some for what couples chunks in order (bfloat16, dk and dv of 64 or 128), and compute
    the rest as batched products in XLA; other devices compute the same chunks as a scan of such products.

    Args:
      q: queries; q, k and v have one dtype: float32, bfloat16 or float16.
      k: keys.
      v: values.
      log_decay: at most 0 (not checked); None lets nothing decay (DeltaNet).
      beta: write strengths in [0, 1], or up to 2.
      state: before the first token, float32; None is zeros.
      implementation: "tpu", "hopper", "xla" or None for the first that can.

    Returns:
      Outputs in the dtype of v, and the state after the last token. Calling again with it continues the sequence.

    Raises:
      ValueError: shapes that don't fit, a dtype that is not taken, or an implementation that cannot compute this.

    Example:
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
      >>> k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
      >>> o, state = gated_delta(q, k, v, jnp.full((1, 100, 2), -0.1), jnp.full((1, 100, 2), 0.5))
      >>> o.shape, state.shape
      ((1, 100, 2, 16), (1, 2, 16, 16))

    Reference: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, arXiv:2412.06464, equation 10.
    """
    b, t, h, dk, dv = _check(q, k, v, log_decay, beta, state, rank=4)
    problem = Problem(b, t, h, dk, dv, jnp.dtype(q.dtype).name)
    chosen, device = choose("gated_delta", IMPLEMENTATIONS, problem, implementation)
    if log_decay is None:
        log_decay = jnp.zeros((b, t, h), jnp.float32)
    if state is None:
        state = jnp.zeros((b, h, dk, dv), jnp.float32)
    log_decay = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
    return _gated_delta(_Call(problem, device, chosen), q, k, v, log_decay, beta.astype(jnp.float32), state)


def gated_delta_step(
    q: Float[Array, "b h dk"],
    k: Float[Array, "b h dk"],
    v: Float[Array, "b h dv"],
    log_decay: Float[Array, "b h"] | None,
    beta: Float[Array, "b h"],
    state: Float[Array, "b h dk dv"],
) -> tuple[Float[Array, "b h dv"], Float[Array, "b h dk dv"]]:
    """One token of `gated_delta`: for decoding, where a call costs one pass over the state.

    Args:
      q: as `gated_delta`, without the axis t.
      k: likewise.
      v: likewise.
      log_decay: likewise.
      beta: likewise.
      state: float32.

    Returns:
      Output in the dtype of v, and the next state.

    Raises:
      ValueError: shapes that don't fit or a dtype that is not taken.
    """
    _check(q, k, v, log_decay, beta, state, rank=3)
    qs, ks, vs, beta = (x.astype(jnp.float32) for x in (q, k, v, beta))
    if log_decay is not None:
        state = state * jnp.exp(log_decay.astype(jnp.float32))[..., None, None]
    # Sums of products rather than matrix products: a matrix unit would round the state, and bytes bound this anyway.
    read = jnp.sum(state * ks[..., None], axis=-2)
    state = state + ks[..., None] * (beta[..., None] * (vs - read))[..., None, :]
    return jnp.sum(state * qs[..., None], axis=-2).astype(v.dtype), state


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    problem: Problem
    device: Device
    implementation: Implementation

    def __call__(self, name: str, axes: str, *arrays):
        """The implementation's function `name`, lifted where XLA does not see through it."""
        return self.implementation.function(name, axes, self.device, problem=self.problem)(*arrays)


_INPUTS, _OUTPUTS = "bthk bthk bthv bth bth bhkv", "bthv bhkv"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_delta(call: _Call, *inputs):
    return call("forward", f"{_INPUTS} -> {_OUTPUTS}", *inputs)


def _forward(call, *inputs):
    return _gated_delta(call, *inputs), inputs


def _backward(call, inputs, cotangents):
    return call("backward", f"{_INPUTS} {_OUTPUTS} -> {_INPUTS}", *inputs, *cotangents)


_gated_delta.defvjp(_forward, _backward)


def _check(q, k, v, log_decay, beta, state, rank: int) -> tuple[int, ...]:
    """The sizes b, (t,) h, dk, dv, where all shapes and dtypes fit."""
    letters = "b, t, h, dk" if rank == 4 else "b, h, dk"
    for name, x in (("q", q), ("v", v)):
        if x.ndim != rank:
            raise ValueError(f"{name} has shape {x.shape}; expected [{letters if name == 'q' else letters[:-1] + 'v'}]")
    leading = q.shape[:-1]
    want = {"k": (k, q.shape), "v": (v, (*leading, v.shape[-1])), "beta": (beta, leading)}
    if log_decay is not None:
        want["log_decay"] = (log_decay, leading)
    if state is not None:
        want["state"] = (state, (q.shape[0], q.shape[-2], q.shape[-1], v.shape[-1]))
    for name, (x, shape) in want.items():
        if x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; with q {q.shape} and v {v.shape} it must be {shape}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q {q.shape} and v {v.shape} have an empty axis")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype or jnp.dtype(x.dtype).name not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}; q, k and v must share one of {', '.join(_DTYPES)}, and q has {q.dtype}"
            )
    if state is not None and state.dtype != jnp.float32:
        raise ValueError(f"state has dtype {state.dtype}; it must be float32")
    return *q.shape, v.shape[-1]
