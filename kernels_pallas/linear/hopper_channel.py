"""Linear attention with a decay a channel (GLA) on Hopper: recurrences in kernels, all that is parallel over chunks in XLA.

With the decays of a chunk worked into its operands (`channel`, Yang et al. 2023, arXiv:2312.06635, section 4),

    o = A v + R S,    S' = diag(total) S + W^T v,

where A are the decayed scores between tokens of the chunk, R = q exp(b), W = k exp(b_c - b), total = exp(b_c), and no exponent is
above 0. XLA computes A, R, W and total of all chunks at once, elementwise and as batched products: for the scores of a chunk
log2(64) + 1 = 7 of them. Kernels do what has an order: the outputs and states of the forward pass, and for gradients the states
before all chunks and, in reverse, their cotangents. From these XLA has the gradients of all chunks at once.

What XLA hands to kernels crosses memory: a token and head 2 (2 dk + 64) bytes forward; for gradients states are written out, and
their cotangents, 4 dk dv bytes a chunk and head. Operands of XLA's products are temporary arrays several times as large as the
inputs, so that of long inputs it takes AT_ONCE chunks at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.device import Device
from kernels_pallas.linear import channel
from kernels_pallas.linear import hopper_chunks as chunks
from kernels_pallas.linear.hopper_chunks import CHUNK
from kernels_pallas.linear.problem import Problem

__all__ = ["backward", "forward"]

Array = jax.Array
# Chunks and heads that XLA works on at a time: many for each of 132 multiprocessors, yet about 1 GB of operands at dk = 128.
AT_ONCE = 2048


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv]; arguments as in `xla.forward`, log_decay [b, t, h, dk].

    XLA: scores and decayed queries and keys. Kernel: the state, and outputs from all of them.
    """
    t, stages = q.shape[1], chunks.static_choice(problem, device).stages
    q, k, log_decay = (_cut(x) for x in (q, k, log_decay))
    reading, writing, scores, total = _each(_operands, (1, 1, 1), (1, 1, 1, 0))(q, k, log_decay)
    (v,) = tiles.pad_length(v)
    out = chunks.launch(
        "linear_channel_forward",
        lambda refs: _outputs_block(refs, stages=stages, interpret=device.interpret),
        device,
        inputs={
            "x": _rows(writing),
            "y": v,
            "reading": _rows(reading),
            "scores": _rows(scores),
            "total": total,
            "state": state,
        },
        outputs={"o": (v.shape, v.dtype), "last": (state.shape, jnp.float32)},
        scratch={"rounded": chunks.tile(state.shape[2], CHUNK, v.dtype)},
        grid=_grid(state),
    )
    return out["o"][:, :t], out["last"]


def backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array,
    state: Array,
    do: Array,
    dstate: Array,
    *,
    problem: Problem,
    device: Device,
) -> tuple[Array, Array, Array, Array, Array]:
    """Cotangents of q, k, v, log_decay and state; arguments as in `xla.backward`, log_decay [b, t, h, dk].

    XLA: decayed queries and keys, and `channel.backward` of all chunks. Kernels: states before chunks, in the type of q as its
    products take them, and their cotangents.
    """
    t = q.shape[1]
    states = functools.partial(_states, stages=chunks.static_choice(problem, device).stages, device=device)
    q, k, v, log_decay, do = (_cut(x) for x in (q, k, v, log_decay, do))
    reading, writing, total = _each(_decayed, (1, 1, 1), (1, 1, 0))(q, k, log_decay)
    before, _ = states(writing, v, total, state, reverse=False)
    after, dstate = states(reading, do, total, dstate, reverse=True)
    bars = _each(_gradients, (1, 1, 1, 1, 1, 0, 0), (1, 1, 1, 1))(q, k, v, log_decay, do, before, after)
    return *(_rows(x)[:, :t] for x in bars), dstate


def _cut(x: Array) -> Array:
    """[b, t, h, d] to [b, n, c, h, d], with zeros after t."""
    b, t, h, d = x.shape
    return jnp.pad(x, ((0, 0), (0, -t % CHUNK), (0, 0), (0, 0))).reshape(b, -1, CHUNK, h, d)


def _rows(x: Array) -> Array:
    """[b, n, c, h, d] to [b, n c, h, d]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _each(fn: Callable, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Callable:
    """A function of one chunk of one head, over arrays with leading axes b and n.

    Args:
      fn: of matrices to a tuple.
      inputs: the place of the axis h behind b and n, an argument.
      outputs: the same, a result.
    """

    def over_heads(*arrays):
        # Moved by hand: XLA for CPUs, where kernels are interpreted, has no 16-bit products whose batch axes do not come first.
        out = jax.vmap(fn)(*(jnp.moveaxis(x, axis, 0) for x, axis in zip(arrays, inputs)))
        return tuple(jnp.moveaxis(x, 0, axis) for x, axis in zip(out, outputs))

    def run(*arrays):
        b, n = arrays[0].shape[:2]
        h, flat = arrays[0].shape[2 + inputs[0]], [x.reshape(b * n, *x.shape[2:]) for x in arrays]
        places = max(1, AT_ONCE // h)
        if b * n <= places:
            out = jax.vmap(over_heads)(*flat)
        else:
            out = lax.map(lambda xs: over_heads(*xs), tuple(flat), batch_size=places)
        return tuple(x.reshape(b, n, *x.shape[1:]) for x in out)

    return run


def _decayed(q: Array, k: Array, log_decay: Array) -> tuple[Array, Array, Array]:
    """R and W [c, dk] in the type of q, and total [dk] float32."""
    f = channel.decaying(log_decay)
    return (q * f.start).astype(q.dtype), (k * f.end).astype(k.dtype), f.start[-1]


def _operands(q: Array, k: Array, log_decay: Array) -> tuple[Array, Array, Array, Array]:
    """R and W [c, dk] and A [c, c], in the type of q, and total [dk] float32."""
    f = channel.decaying(log_decay)
    z = [channel.times(x, e, q.dtype) for x, e in zip(channel.tokens(q, k, f), f.levels)]
    reading, writing, total = _decayed(q, k, log_decay)
    return reading, writing, channel.scores(q, k, z), total


def _gradients(q, k, v, log_decay, do, before, after) -> tuple[Array, Array, Array, Array]:
    """dq, dk, dv and dlog_decay of a chunk, from the state before it and the cotangent of the state after it, [dk, dv]."""
    # The sum of their products, a part of dlog_decay, is float32; matrix products round them back to what they were.
    m, m_bar = (x.astype(jnp.float32).mT for x in (before, after))
    bars = channel.backward(q, k, v, channel.decaying(log_decay), m, do, m_bar)
    return *(x.astype(q.dtype) for x in (bars.q, bars.k, bars.v)), bars.log_decay


def _grid(state: Array) -> dict[str, int]:
    b, h, _, dv = state.shape
    return {"b": b, "h": h, "j": dv // CHUNK}


def _outputs_block(refs: dict, *, stages: int, interpret: bool):
    """One thread block: all chunks of one head, for 64 columns of its values, outputs and state."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    rounded_s, columns = refs["rounded"], pl.ds(j * CHUNK, CHUNK)

    def step(i, state, y_s, reading_s, scores_s):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last outputs have left this tile
        rounded_s[...] = state.astype(rounded_s.dtype)
        plgpu.commit_smem()

        def run(o):
            plgpu.wgmma(o, reading_s, rounded_s)
            plgpu.wgmma(o, scores_s, y_s)
            return o[...]

        o = pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
        # The copy of the state has been read. A tile less is what lets two thread blocks share a multiprocessor at dk = 128.
        chunks.store(o, rounded_s.at[pl.ds(0, CHUNK)], refs["o"].at[b, pl.ds(i * CHUNK, CHUNK), h, columns])

    inputs = [refs[name].at[b, :, h] for name in ("reading", "scores")]
    _recur(refs, step, inputs, at=lambda i: i, stages=stages, interpret=interpret)


def _states(x, y, total, state, *, reverse: bool, stages: int, device: Device) -> tuple[Array, Array]:
    """States before every chunk [b, n, h, dk, dv], in x's dtype, and the last one, float32.

    Args:
      x: W, [b, n, c, h, dk].
      y: values, [b, n, c, h, dv].
      total: [b, n, h, dk] float32.
      state: the first, [b, h, dk, dv].
      reverse: from the last chunk to the first: x is R, y gradients of outputs, and states cotangents of states.
      stages: of `chunks.Blocks`.
      device: that the kernel is built for.
    """
    out = chunks.launch(
        "linear_channel_states_reversed" if reverse else "linear_channel_states",
        lambda refs: _states_block(refs, reverse=reverse, stages=stages, interpret=device.interpret),
        device,
        inputs={"x": _rows(x), "y": _rows(y), "total": total, "state": state},
        outputs={"states": ((*total.shape, state.shape[3]), x.dtype), "last": (state.shape, jnp.float32)},
        scratch={"rounded": chunks.tile(state.shape[2], CHUNK, x.dtype)},
        grid=_grid(state),
    )
    return out["states"], out["last"]


def _states_block(refs: dict, *, reverse: bool, stages: int, interpret: bool):
    """One thread block: all chunks of one head, for 64 columns of its state."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    n = refs["total"].shape[1]

    def at(i):
        return n - 1 - i if reverse else i

    def step(i, state, y_s):
        chunks.store(state, refs["rounded"], refs["states"].at[b, i, h, :, pl.ds(j * CHUNK, CHUNK)])

    _recur(refs, step, [], at=at, stages=stages, interpret=interpret)


def _recur(refs: dict, step: Callable, inputs: list, *, at: Callable, stages: int, interpret: bool):
    """S' = diag(total) S + x^T y through all chunks of a head, with S in float32 registers.

    Args:
      refs: with x, y, total, state and last.
      step: `step(i, state, y_s, *tiles)`, called with chunk i's tiles in shared memory and the state before it.
      inputs: references [n c, d] of step's further tiles.
      at: which chunk comes at place i.
      stages: chunks in shared memory at a time.
      interpret: in Pallas's interpreter, which has no accumulators that start from registers.
    """
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    columns, (_, n, _, dk) = pl.ds(j * CHUNK, CHUNK), refs["total"].shape

    def advance(ids, x_s, y_s, *rest):
        *others, state = rest
        i = at(ids[0])
        # Straight from global memory, and early: its place in shared memory would cost the second thread block.
        total = mosaic_gpu.load(refs["total"].at[b, i, h])
        step(i, state, y_s, *others)
        state = state * lax.broadcast_in_dim(total, state.shape, [0])
        if interpret:
            state = state + tiles.product(x_s.T, y_s)
        else:
            (state,) = tiles.accumulate((state,), lambda add: add(0, x_s.T, y_s))
        plgpu.commit_smem()  # all warps are done with the chunk's tiles: a pipeline may fill them again
        return state

    def rows(width):
        return chunks.spec(width, lambda i: (at(i), 0))

    last = plgpu.emit_pipeline(
        advance,
        grid=(n,),
        in_specs=[rows(dk), chunks.spec(CHUNK, lambda i: (at(i), j)), *(rows(x.shape[1]) for x in inputs)],
        max_concurrent_steps=stages,
        init_carry=mosaic_gpu.load(refs["state"].at[b, h, :, columns]),
    )(refs["x"].at[b, :, h], refs["y"].at[b, :, h], *inputs)
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies
    refs["last"][b, h, :, columns] = last
