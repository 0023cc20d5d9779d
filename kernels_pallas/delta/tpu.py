"""The gated delta rule as Pallas TPU kernels: a grid over heads and chunks, the state in VMEM from one chunk to the next."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.delta import chunk
from kernels_pallas.delta.problem import Problem
from kernels_pallas.device import Device
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "backward", "forward", "refuses", "static_choice"]

Array = jax.Array
_LARGEST = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      chunk: tokens a chunk, a power of two of at least 16.
      rows: heads a grid step, or their greatest common divisor with h. They are independent, so that one's matrix products
        hide the latency of another's.
    """

    chunk: int
    rows: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """From the tuning table, or else from compiled schedules."""
    # More rows of the largest heads than this don't fit into a v5e's vector memory in the backward pass.
    rows = max(1, min(4, 4 * 128 * 128 // (problem.key_size * problem.value_size)))
    default = Blocks(chunk=64, rows=rows)
    return tuned(default, "gated_delta", device, dtype=problem.dtype, head_size=problem.key_size, length=problem.length)


def refuses(problem: Problem, device: Device) -> str | None:
    """Why these kernels cannot compute `problem` on `device`, or None."""
    if device.platform != "tpu":
        return "it is for tpu"
    for name, size in (("key", problem.key_size), ("value", problem.value_size)):
        if size % 8 or size > _LARGEST:
            return f"{name} size {size} is not a multiple of 8 up to {_LARGEST}"
    return None


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv]; arguments as in `xla.forward`."""
    call = _Call(q, v, problem, device)
    q_, k_, v_ = (call.tokens(x) for x in (q, k, v))
    o, last = call(
        _forward_kernel,
        (q_, k_, v_, call.gates(log_decay, beta), call.states(state)),
        out=(call.token_type(v_.shape[-1], v_.dtype), call.state_type),
    )
    return call.from_tokens(o).astype(v.dtype), last.reshape(state.shape)


def backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    beta: Array,
    state: Array,
    o_bar: Array,
    state_bar: Array,
    *,
    problem: Problem,
    device: Device,
) -> tuple[Array, ...]:
    """Cotangents of q, k, v, log_decay, beta and state; arguments as in `xla.backward`.

    A first pass stores the state before every chunk and the inverses, the second runs through the chunks in reverse.
    """
    call = _Call(q, v, problem, device)
    q_, k_, v_, o_bar = (call.tokens(x) for x in (q, k, v, o_bar))
    gates = call.gates(log_decay, beta)
    states, inverses = call(_write_kernel, (k_, v_, gates, call.states(state)), out=(call.history_type, call.inverse_type))
    types = [call.token_type(x.shape[-1], x.dtype) for x in (q_, k_, v_)]
    q_bar, k_bar, v_bar, gates_bar, state_bar = call(
        _backward_kernel,
        (q_, k_, v_, gates, states, inverses, o_bar, call.states(state_bar)),
        out=(*types, call.gate_type, call.state_type),
        reverse=True,
    )
    tokens = [call.from_tokens(x).astype(y.dtype) for x, y in zip((q_bar, k_bar, v_bar), (q, k, v))]
    return *tokens, *call.from_gates(gates_bar), state_bar.reshape(state.shape)


def _inverse(a: Array) -> Array:
    """(I + a)^-1 of strictly lower triangular a [c, c]: diagonal blocks of doubling size, [[x, 0], [-y a_21 x, y]].

    As whole matrices, which the matrix unit takes as they are: with T the inverse of the blocks of one size and a' what
    couples the two halves of each block of the next, T - T a' T. (Not the Neumann series: see `xla.chunk_inverse`.)
    """
    c = a.shape[0]
    i = lax.broadcasted_iota(jnp.int32, (c, c), 0)
    j = lax.broadcasted_iota(jnp.int32, (c, c), 1)
    inverse = jnp.where(i == j, 1.0, 0.0)
    for level in range(c.bit_length() - 1):
        joins = ((i >> level) != (j >> level)) & ((i >> (level + 1)) == (j >> (level + 1)))
        part = jnp.where(joins, a, 0.0)
        # The blocks of size 1 are 1.
        inverse -= part if level == 0 else chunk.product(inverse, chunk.product(part, inverse))
    return inverse


def _prepared(k: Array, gates: Array) -> tuple[chunk.Gates, Array]:
    """Gates and inverse of one head's chunk; gates [2, c] are log-decays and betas."""
    g = chunk.gates(gates[0:1], gates[1:2])
    return g, _inverse(chunk.couplings(k, g))


def _forward_chunk(q, k, v, gates, state):
    return chunk.forward(q, k, v, *_prepared(k, gates), state)


def _write_chunk(k, v, gates, state):
    g, inverse = _prepared(k, gates)
    return chunk.write(k, v, g, inverse, state)[1], inverse


def _backward_chunk(q, k, v, gates, *rest):
    return chunk.backward(q, k, v, chunk.gates(gates[0:1], gates[1:2]), *rest)


# `vmap` over the heads of a grid step rather than a loop: their matrix products then alternate in the program, and the
# compiler, which moves instructions only so far, overlaps them (a third fewer bundles on v5e with 4 heads).


def _start(carry, ref):
    """The carried state takes its first value at the first chunk visited."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        carry[...] = ref[:, 0]


def _finish(carry, ref, steps: int):
    # Not `pl.num_programs`: jax 0.11.2 keeps the trace of a kernel for other grids with the same blocks, that number included.
    @pl.when(pl.program_id(1) == steps - 1)
    def _():
        ref[:, 0] = carry[...]


def _forward_kernel(q_ref, k_ref, v_ref, gates_ref, state_ref, o_ref, last_ref, carry, *, steps):
    _start(carry, state_ref)
    o, carry[...] = jax.vmap(_forward_chunk)(q_ref[...], k_ref[...], v_ref[...], gates_ref[:, 0], carry[...])
    o_ref[...] = o.astype(o_ref.dtype)
    _finish(carry, last_ref, steps)


def _write_kernel(k_ref, v_ref, gates_ref, state_ref, states_ref, inverses_ref, carry, *, steps):
    del steps
    _start(carry, state_ref)
    states_ref[:, 0] = carry[...]
    carry[...], inverses_ref[:, 0] = jax.vmap(_write_chunk)(k_ref[...], v_ref[...], gates_ref[:, 0], carry[...])


def _backward_kernel(
    q_ref, k_ref, v_ref, gates_ref, states_ref, inverses_ref, o_bar_ref, last_bar_ref,
    q_bar_ref, k_bar_ref, v_bar_ref, gates_bar_ref, state_bar_ref, carry, *, steps,
):  # fmt: skip
    _start(carry, last_bar_ref)
    tokens = q_ref[...], k_ref[...], v_ref[...], gates_ref[:, 0]
    bar = jax.vmap(_backward_chunk)(*tokens, inverses_ref[:, 0], states_ref[:, 0], o_bar_ref[...], carry[...])
    q_bar_ref[...] = bar.q.astype(q_bar_ref.dtype)
    k_bar_ref[...] = bar.k.astype(k_bar_ref.dtype)
    v_bar_ref[...] = bar.v.astype(v_bar_ref.dtype)
    gates_bar_ref[:, 0, 0:1] = bar.log_decay
    gates_bar_ref[:, 0, 1:2] = bar.beta
    carry[...] = bar.state
    _finish(carry, state_bar_ref, steps)


class _Call:
    """Layouts of one problem: what kernels see of its arrays, and how they walk over them.

    Heads come before tokens, [b h, n c, d]; log-decays and betas together, [b h, n, 2, c]; what there is one of a sequence has
    an axis of 1 in place of n.
    """

    def __init__(self, q: Array, v: Array, problem: Problem, device: Device):
        b, t, h, dk = q.shape
        blocks = static_choice(problem, device)
        self.shape, self.device, self.chunk = q.shape, device, blocks.chunk
        self.rows = math.gcd(blocks.rows, h)
        self.n = -(-t // blocks.chunk)
        heads, c = b * h, blocks.chunk
        f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        self.token_type = lambda d, dtype: jax.ShapeDtypeStruct((heads, self.n * c, d), dtype)
        self.gate_type = f32((heads, self.n, 2, c))
        self.inverse_type = f32((heads, self.n, c, c))
        self.history_type = f32((heads, self.n, dk, v.shape[-1]))
        self.state_type = f32((heads, 1, dk, v.shape[-1]))

    def tokens(self, x: Array) -> Array:
        """[b, t, h, d] -> [b h, n c, d], padded by zeros: tokens that change nothing."""
        b, t, h, d = x.shape
        if x.dtype == jnp.float16:
            x = x.astype(jnp.float32)  # no TPU multiplies float16
        x = x.transpose(0, 2, 1, 3).reshape(b * h, t, d)
        return jnp.pad(x, ((0, 0), (0, self.n * self.chunk - t), (0, 0)))

    def from_tokens(self, x: Array) -> Array:
        """`tokens` undone."""
        b, t, h, _ = self.shape
        return x[:, :t].reshape(b, h, t, -1).transpose(0, 2, 1, 3)

    def gates(self, log_decay: Array, beta: Array) -> Array:
        """Twice [b, t, h] -> [b h, n, 2, c]."""
        x = self.tokens(jnp.stack([log_decay, beta], -1))
        return x.reshape(-1, self.n, self.chunk, 2).swapaxes(2, 3)

    def from_gates(self, x: Array) -> tuple[Array, Array]:
        """`gates` undone."""
        x = self.from_tokens(x.swapaxes(2, 3).reshape(x.shape[0], -1, 2))
        return x[..., 0], x[..., 1]

    def states(self, x: Array) -> Array:
        """[b, h, dk, dv] -> [b h, 1, dk, dv]."""
        return x.reshape(self.state_type.shape)

    def __call__(self, kernel, inputs, *, out, reverse: bool = False):
        """Runs a kernel over (heads, chunks), from the last chunk to the first where `reverse`."""
        rows, last = self.rows, self.n - 1
        at = (lambda i: last - i) if reverse else (lambda i: i)

        def spec(x):
            if x.ndim == 3:
                return pl.BlockSpec((rows, self.chunk, x.shape[2]), lambda r, i: (r, at(i), 0))
            each = x.shape[1] > 1
            return pl.BlockSpec((rows, 1, *x.shape[2:]), lambda r, i: (r, at(i) if each else 0, 0, 0))

        return pl.pallas_call(
            functools.partial(kernel, steps=self.n),
            grid=(self.state_type.shape[0] // rows, self.n),
            in_specs=[spec(x) for x in inputs],
            out_specs=[spec(x) for x in out],
            out_shape=list(out),
            scratch_shapes=[pltpu.VMEM((rows, *self.state_type.shape[2:]), jnp.float32)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=self.device.interpret,
            name="gated_delta" + kernel.__name__.removesuffix("_kernel"),
        )(*inputs)
