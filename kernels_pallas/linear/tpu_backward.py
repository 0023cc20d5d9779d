"""Causal linear attention for TPU, backward: states at the starts of segments first, then segments in reverse order.

A segment's inputs are in VMEM at once. Its states are computed again from the one at its start and stay there, so that of n
chunks only n / segment states cross HBM.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas.device import Device
from kernels_pallas.linear import tpu
from kernels_pallas.linear.problem import Problem
from kernels_pallas.linear.tpu import Plan, call

__all__ = ["backward"]

Array = jax.Array


def backward(
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    state: Array,
    do: Array,
    dstate: Array,
    *,
    problem: Problem,
    device: Device,
) -> tuple[Array, Array, Array, Array | None, Array]:
    """Cotangents of q, k, v, log_decay and state.

    Args:
      q: as `tpu.forward`.
      k: as `tpu.forward`.
      v: as `tpu.forward`.
      log_decay: as `tpu.forward`.
      state: as `tpu.forward`.
      do: cotangent of the outputs, [b, t, h, dv].
      dstate: of the last state, [b, h, dk, dv] float32.
      problem: static facts.
      device: that the kernels are built for.
    """
    b, _, h, dk = q.shape
    dv = v.shape[3]
    blocks = tpu.static_choice(problem, device)
    bytes_a_token = (4 * dk + 3 * dv) * q.dtype.itemsize + (8 * dk if problem.decay == "channel" else 0)
    plan = Plan.of(q, v, problem, blocks, bytes_a_token=bytes_a_token, segment=blocks.segment)
    q_, k_, v_, do_ = (plan.flat(x) for x in (q, k, v, do))
    decay = plan.decay_inputs(log_decay)
    starts = _starts(plan, k_, v_, decay, plan.transposed(state), device)

    def order(n):
        return plan.segments - 1 - n

    specs = [plan.time(d, order) for d in (dk, dk, dv)]
    like, bar_specs = [q_, k_, v_], list(specs)
    if problem.decay == "scalar":
        like.append(jax.ShapeDtypeStruct((b, plan.groups, plan.heads, q_.shape[1]), jnp.float32))
        bar_specs.append(plan.row(order))
    if problem.decay == "channel":
        like.append(decay[0])
        bar_specs.append(plan.time(dk, order))
    m_bar = plan.transposed(dstate)
    *bars, m_bar = call(
        plan,
        _linear_attention_backward,
        b,
        device,
        in_specs=[*specs, *plan.decay_specs(order), _start_spec(plan, order), plan.time(dv, order), plan.state],
        out_specs=[*bar_specs, plan.state],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*like, m_bar)],
        scratch=[(plan.segment, plan.heads, dv, dk)],
    )(q_, k_, v_, *decay, starts, do_, m_bar)
    out = [plan.unflat(x, y) for x, y in zip(bars, (q, k, v))]
    if log_decay is None:
        out.append(None)
    else:
        out.append((plan.unrows if problem.decay == "scalar" else plan.unflat)(bars[3], log_decay))
    return *out, m_bar[:, :h].mT


def _start_spec(plan: Plan, order) -> pl.BlockSpec:
    """Of [b, segments, h', dv, dk]."""
    return pl.BlockSpec((1, 1, plan.heads, plan.dv, plan.dk), lambda b, h, n: (b, order(n), h, 0, 0))


def _starts(plan: Plan, k: Array, v: Array, decay: list[Array], m: Array, device: Device) -> Array:
    """Transposed states at the starts of segments, [b, segments, h', dv, dk]."""

    def order(n):
        return n

    shape = (m.shape[0], plan.segments, *m.shape[1:])
    (starts,) = call(
        plan,
        _linear_attention_states,
        m.shape[0],
        device,
        in_specs=[plan.time(plan.dk, order), plan.time(plan.dv, order), *plan.decay_specs(order), plan.state],
        out_specs=[_start_spec(plan, order)],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        scratch=[(plan.heads, plan.dv, plan.dk)],
    )(k, v, *decay, m)
    return starts


def _chunks(plan: Plan, refs, n):
    """Chunk n of a segment, of arrays [1, tokens, heads * size]: a list over heads of tuples."""
    start = pl.multiple_of(n * plan.chunk, plan.chunk)
    sizes = [ref.shape[2] // plan.heads for ref in refs]
    return start, [
        tuple(ref[0, pl.ds(start, plan.chunk), plan.at(head, size)] for ref, size in zip(refs, sizes))
        for head in range(plan.heads)
    ]


def _linear_attention_states(plan: Plan, k_ref, v_ref, *refs):
    *decay, first_ref, start_ref, m_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        m_ref[...] = first_ref[0]

    start_ref[0, 0] = m_ref[...]

    def advance(n, _):
        start, chunks = _chunks(plan, (k_ref, v_ref), n)
        for head, ((k, v), factors) in enumerate(zip(chunks, plan.factors(decay, start))):
            m_ref[head] = plan.math.advance(k, v, factors, m_ref[head])
        return 0

    lax.fori_loop(0, plan.segment, advance, 0)


def _linear_attention_backward(plan: Plan, q_ref, k_ref, v_ref, *refs):
    inputs = 1 if plan.decay == "none" else 2
    *decay, start_ref = refs[:inputs]
    do_ref, last_bar_ref, dq_ref, dk_ref, dv_ref, *dg_ref, m_bar_ref, m_ref = refs[inputs:]

    # As in the forward pass, the output block of the first state's cotangent holds the current one.
    @pl.when(pl.program_id(2) == 0)
    def _():
        m_bar_ref[...] = last_bar_ref[...]

    m_ref[0] = start_ref[0, 0]

    def advance(n, _):
        start, chunks = _chunks(plan, (k_ref, v_ref), n)
        for head, ((k, v), factors) in enumerate(zip(chunks, plan.factors(decay, start))):
            m_ref[n + 1, head] = plan.math.advance(k, v, factors, m_ref[n, head])
        return 0

    lax.fori_loop(0, plan.segment - 1, advance, 0)

    def retreat(i, _):
        n = plan.segment - 1 - i
        start, chunks = _chunks(plan, (q_ref, k_ref, v_ref, do_ref), n)
        for head, ((q, k, v, do), factors) in enumerate(zip(chunks, plan.factors(decay, start))):
            bars = plan.math.backward(q, k, v, factors, m_ref[n, head], do, m_bar_ref[0, head])
            keys, values, rows = plan.at(head, plan.dk), plan.at(head, plan.dv), pl.ds(start, plan.chunk)
            dq_ref[0, rows, keys] = bars.q.astype(dq_ref.dtype)
            dk_ref[0, rows, keys] = bars.k.astype(dk_ref.dtype)
            dv_ref[0, rows, values] = bars.v.astype(dv_ref.dtype)
            if plan.decay == "scalar":
                dg_ref[0][0, 0, head : head + 1, rows] = bars.log_decay
            if plan.decay == "channel":
                dg_ref[0][0, rows, keys] = bars.log_decay
            m_bar_ref[0, head] = bars.m
        return 0

    lax.fori_loop(0, plan.segment, retreat, 0)
