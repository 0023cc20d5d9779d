"""Linear attention with a float32 state: public functions, checks and gradients.

Implementations are modules with

    refuses(problem, device) -> str | None
    forward(q, k, v, log_decay, state, *, problem, device) -> (o, final_state)
    backward(q, k, v, log_decay, state, do, dstate, *, problem, device) -> (dq, dk, dv, dlog_decay, dstate0)

where q, k [b, t, h, dk] and v, do, o [b, t, h, dv] have `problem.dtype`; log_decay is None, float32 [b, t, h] or float32
[b, t, h, dk] with values in [FLOOR, 0] (-inf has been clamped); state, dstate (the cotangent of final_state), final_state and
dstate0 (the cotangent of state) are float32 [b, h, dk, dv] and always given. dlog_decay is float32, None where log_decay is.
Any t >= 1: implementations pad (k = v = 0 and log_decay = 0 leave the state alone). Products take operands of
`problem.dtype` and accumulate in float32; the state is carried in float32. The backward pass gets no residuals: it computes
the states that it needs again. Sizes b and h are those of the arrays, not of the problem.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.device import Device
from kernels_pallas.dispatch import Implementation, choose
from kernels_pallas.linear import xla
from kernels_pallas.linear.problem import FLOOR, Problem

__all__ = ["IMPLEMENTATIONS", "linear_attention", "linear_attention_step"]

IMPLEMENTATIONS = (
    Implementation("tpu", "kernels_pallas.linear.tpu", ("tpu",), opaque=True),
    Implementation("hopper", "kernels_pallas.linear.hopper", ("gpu",), opaque=True),
    Implementation("xla", "kernels_pallas.linear.xla"),
)
_DECAY_AXES = {"none": "_", "scalar": "bth", "channel": "bthk"}


def linear_attention(
    q: Float[Array, "b t h dk"],
    k: Float[Array, "b t h dk"],
    v: Float[Array, "b t h dv"],
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h dk"] | None = None,
    causal: bool = True,
    block_size: int | None = None,
    state: Float[Array, "b h dk dv"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """Attention without a softmax: what was written to a matrix is read from it.

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t

    There is no scale, no normaliser and no feature map: apply them to q, k and the result. Products are accumulated in float32
    and states are float32. Memory is linear in t, forward and backward.

    With `block_size`, tokens see their whole block and all blocks before it: S is read after the block is written (SANA-Video,
    Chen et al. 2025, arXiv:2509.24695). A last block may be short; a sequence that is cut for resuming is cut between blocks.
    With `causal=False` everybody sees everybody, and `state` besides. Neither has an order inside a block, so neither takes a
    decay.

    Args:
      q: [b, t, h, dk], float32, bfloat16 or float16.
      k: [b, t, h, dk].
      v: [b, t, h, dv].
      log_decay: None; [b, t, h], one decay a token (RetNet, simple GLA, Mamba-2); or [b, t, h, dk], one a channel too (GLA). At
        most 0, which is not checked; -inf forgets all that came before, and gets no gradient. Computed in float32.
      causal: whether tokens see no later ones.
      block_size: tokens of a block; None is 1.
      state: before the first token, [b, h, dk, dv]; None is zeros.
      implementation: "tpu", "hopper" or "xla"; None takes the first that can.

    Returns:
      Outputs [b, t, h, dv] of v's type, and the state after the last token, float32 [b, h, dk, dv].

    Raises:
      ValueError: arrays of other shapes or types, a block size below 1, options that exclude each other, or an implementation
        that does not exist or cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 5, 1, 2))
      >>> o, state = linear_attention(x, x, x)
      >>> o[0, :, 0, 0].tolist()
      [2.0, 4.0, 6.0, 8.0, 10.0]
      >>> linear_attention(x, x, x, state=state)[0][0, 0, 0].tolist()
      [12.0, 12.0]
    """
    problem = _problem(q, k, v, log_decay, causal, block_size, state)
    picked, device = choose("linear_attention", IMPLEMENTATIONS, problem, implementation)
    log_decay, state = _float32(q, v, log_decay, state)
    return _attend(_Call(problem, device, picked), q, k, v, log_decay, state)


def linear_attention_step(
    q: Float[Array, "b h dk"],
    k: Float[Array, "b h dk"],
    v: Float[Array, "b h dv"],
    log_decay: Float[Array, "b h"] | Float[Array, "b h dk"] | None = None,
    state: Float[Array, "b h dk dv"] | None = None,
) -> tuple[Float[Array, "b h dv"], Float[Array, "b h dk dv"]]:
    """`linear_attention` of one token, for decoding: XLA fuses it into one pass over the state.

    Args:
      q: [b, h, dk].
      k: [b, h, dk].
      v: [b, h, dv].
      log_decay: None, [b, h] or [b, h, dk].
      state: [b, h, dk, dv]; None is zeros.

    Returns:
      Outputs [b, h, dv] and the next state.

    Raises:
      ValueError: arrays of other shapes or types.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3:
            raise ValueError(f"{name} {x.shape} must be [b, h, d], one token")
    q1, k1, v1, log_decay1 = (None if x is None else x[:, None] for x in (q, k, v, log_decay))
    _problem(q1, k1, v1, log_decay1, True, None, state)
    log_decay, state = _float32(q1, v1, log_decay, state)
    return xla.step(q, k, v, log_decay, state)


def _problem(q, k, v, log_decay, causal, block_size, state) -> Problem:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4) or q.shape != k.shape or q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k must be [b, t, h, dk] and v [b, t, h, dv] with the same b, t, h; got {shapes}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"no axis may be empty; got {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} must be of one type: float32, bfloat16 or float16")
    b, t, h, dk = q.shape
    decay = "none"
    if log_decay is not None:
        if log_decay.shape not in ((b, t, h), (b, t, h, dk)):
            raise ValueError(f"log_decay {log_decay.shape} must be [b, t, h] = {(b, t, h)} or [b, t, h, dk] = {(b, t, h, dk)}")
        if not jnp.issubdtype(log_decay.dtype, jnp.floating):
            raise ValueError(f"log_decay must be of a floating type, not {log_decay.dtype}")
        decay = "scalar" if log_decay.ndim == 3 else "channel"
    if state is not None and (state.shape != (b, h, dk, v.shape[3]) or not jnp.issubdtype(state.dtype, jnp.floating)):
        raise ValueError(f"state {state.dtype} {state.shape} must be floating [b, h, dk, dv] = {(b, h, dk, v.shape[3])}")
    if block_size is not None:
        if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
            raise ValueError(f"block_size={block_size!r} must be a positive int")
        if not causal:
            raise ValueError(f"block_size={block_size} orders blocks, which causal=False excludes")
    if decay != "none" and (not causal or (block_size or 1) > 1):
        raise ValueError(
            f"log_decay {log_decay.shape} needs an order of tokens, which causal={causal} with block_size={block_size} lacks"
        )
    block_size = min(block_size or 1, t) if causal else t
    return Problem(b, t, h, dk, v.shape[3], q.dtype.name, decay, block_size)


def _float32(q, v, log_decay, state):
    """log_decay at or above FLOOR, and a state."""
    if log_decay is not None:
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), FLOOR)
    if state is None:
        state = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
    return log_decay, state.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    problem: Problem
    device: Device
    implementation: Implementation

    @property
    def inputs(self) -> str:
        """Axes of q, k, v, log_decay and state."""
        return f"bthk bthk bthv {_DECAY_AXES[self.problem.decay]} bhkv"

    def __call__(self, name: str, axes: str, *arrays):
        """The picked implementation's function `name`."""
        return self.implementation.function(name, axes, self.device, problem=self.problem)(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, k, v, log_decay, state):
    return call("forward", f"{call.inputs} -> bthv bhkv", q, k, v, log_decay, state)


def _attend_forward(call, *inputs):
    return _attend(call, *inputs), inputs


def _attend_backward(call, inputs, cotangents):
    return call("backward", f"{call.inputs} bthv bhkv -> {call.inputs}", *inputs, *cotangents)


_attend.defvjp(_attend_forward, _attend_backward)
