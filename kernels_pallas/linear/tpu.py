"""Causal linear attention for TPU, forward: the state stays in VMEM while chunks of tokens pass.

Arrays keep the layout of a projection, [b, t, h * d], so that nothing is transposed in HBM; a grid step takes one chunk of
several heads. States are transposed, [b, h, dv, dk], as `chunk` has them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.device import Device
from kernels_pallas.linear import channel, chunk
from kernels_pallas.linear.problem import Problem
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "Plan", "backward", "forward", "refuses", "static_choice"]

Array = jax.Array
# Bytes of VMEM for buffers and states: below the 16 MB that every generation grants a kernel, with room for values.
BUDGET = 12 << 20


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a call is cut up.

    Attributes:
      chunk: tokens of a chunk; a power of two, and a multiple of 128 where log_decay is [b, t, h].
      heads: at most so many heads in a grid step.
      segment: at most so many chunks in a grid step of the backward pass, whose states are held in VMEM.
    """

    chunk: int
    heads: int
    segment: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """Sizes for a problem, measured ones where there are any."""
    default = Blocks(chunk=64, heads=4, segment=4) if problem.decay == "channel" else Blocks(chunk=128, heads=8, segment=4)
    return tuned(default, "linear", device, dtype=problem.dtype, head_size=problem.key_size, length=problem.length)


def refuses(problem: Problem, device: Device) -> str | None:
    """Why it cannot compute `problem` on `device`, or None."""
    if device.platform != "tpu":
        return "it is for TPUs"
    if not problem.causal:
        return f"block_size={problem.block_size}: blocks that see themselves are bound by bytes, and XLA does them in one pass"
    if problem.dtype == "float16":
        return "TPUs have no float16"
    for name, size in (("dk", problem.key_size), ("dv", problem.value_size)):
        if size not in (64, 128, 256):
            return f"{name}={size} is not 64, 128 or 256"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes of a kernel's blocks.

    Attributes:
      decay: "none", "scalar" or "channel".
      chunk: tokens of a chunk.
      heads: of a grid step.
      all_heads: a multiple of `heads`; those beyond h are padding.
      segment: chunks of a grid step.
      segments: grid steps along time.
      dk: of queries and keys.
      dv: of values.
    """

    decay: str
    chunk: int
    heads: int
    all_heads: int
    segment: int
    segments: int
    dk: int
    dv: int

    @classmethod
    def of(cls, q: Array, v: Array, problem: Problem, blocks: Blocks, *, bytes_a_token: int, segment: int = 1) -> Plan:
        """For arrays q [b, t, h, dk] and v [b, t, h, dv].

        Args:
          q: queries.
          v: values.
          problem: static facts.
          blocks: limits.
          bytes_a_token: of a head's inputs and outputs; states come on top.
          segment: at most so many chunks in a grid step.
        """
        _, t, h, dk = q.shape
        dv = v.shape[3]
        chunks = -(-t // blocks.chunk)
        segments = -(-chunks // segment)
        # As few padded chunks as that number of segments allows.
        segment = -(-chunks // segments)
        tokens = segment * blocks.chunk
        # Two buffers of everything that moves: at most three arrays of states, and one of a segment's.
        a_head = 2 * tokens * bytes_a_token + 4 * dk * dv * (6 + segment)
        most = max(1, min(blocks.heads, BUDGET // a_head))
        # A block's last axis is a multiple of 128 lanes or the whole array's.
        aligned = [n for n in range(1, most + 1) if n * dk % 128 == 0 and n * dv % 128 == 0]
        dividing = [n for n in (*aligned, h) if h % n == 0 and n <= most]
        heads = max(dividing or aligned or [2])
        return cls(problem.decay, blocks.chunk, heads, -(-h // heads) * heads, segment, segments, dk, dv)

    @property
    def tokens(self) -> int:
        """Of a grid step."""
        return self.segment * self.chunk

    @property
    def groups(self) -> int:
        """Grid steps along heads."""
        return self.all_heads // self.heads

    @property
    def math(self):
        """The functions of a chunk."""
        return channel if self.decay == "channel" else chunk

    def flat(self, x: Array) -> Array:
        """[b, t, h, d] to [b, t', h' * d], padded with zeros."""
        b, t, h, d = x.shape
        x = jnp.pad(x, ((0, 0), (0, self.segments * self.tokens - t), (0, self.all_heads - h), (0, 0)))
        return x.reshape(b, -1, self.all_heads * d)

    def unflat(self, x: Array, like: Array) -> Array:
        """The inverse of `flat`, in the shape of `like`."""
        b, t, h, d = like.shape
        return x.reshape(b, x.shape[1], self.all_heads, d)[:, :t, :h]

    def rows(self, log_decay: Array) -> Array:
        """[b, t, h] to the sums of chunks, [b, groups, 4 * heads, t']: each kind of `chunk.Sums` for all heads of a grid step."""
        b, t, h = log_decay.shape
        x = jnp.pad(log_decay, ((0, 0), (0, self.segments * self.tokens - t), (0, self.all_heads - h)))
        sums = chunk.sums(x.mT.reshape(-1, self.chunk))
        x = jnp.stack([x.reshape(b, self.groups, self.heads, -1) for x in sums], axis=2)
        return x.reshape(b, self.groups, 4 * self.heads, -1)

    def unrows(self, x: Array, like: Array) -> Array:
        """[b, groups, heads, t'] to the shape of `like`, [b, t, h]."""
        b, t, h = like.shape
        return x.reshape(b, self.all_heads, -1).mT[:, :t, :h]

    def transposed(self, state: Array) -> Array:
        """[b, h, dk, dv] to [b, h', dv, dk]."""
        return jnp.pad(state.mT, ((0, 0), (0, self.all_heads - state.shape[1]), (0, 0), (0, 0)))

    def decay_inputs(self, log_decay: Array | None) -> list[Array]:
        """What kernels take for the decay: nothing, `rows`, or [b, t', h' * dk]."""
        if self.decay == "none":
            return []
        return [self.rows(log_decay) if self.decay == "scalar" else self.flat(log_decay)]

    def time(self, size: int, order) -> pl.BlockSpec:
        """Of [b, t', h' * size]; `order` says which segment a grid step takes."""
        return pl.BlockSpec((1, self.tokens, self.heads * size), lambda b, h, n: (b, order(n), h))

    def row(self, order, kinds: int = 1) -> pl.BlockSpec:
        """Of [b, groups, kinds * heads, t']."""
        return pl.BlockSpec((1, 1, kinds * self.heads, self.tokens), lambda b, h, n: (b, h, 0, order(n)))

    def decay_specs(self, order) -> list[pl.BlockSpec]:
        """Of `decay_inputs`."""
        if self.decay == "none":
            return []
        return [self.row(order, kinds=4) if self.decay == "scalar" else self.time(self.dk, order)]

    @property
    def state(self) -> pl.BlockSpec:
        """Of [b, h', dv, dk]."""
        return pl.BlockSpec((1, self.heads, self.dv, self.dk), lambda b, h, n: (b, h, 0, 0))

    def at(self, head: int, size: int) -> slice:
        """Columns of a head."""
        return slice(head * size, (head + 1) * size)

    def factors(self, decay: Sequence, start) -> list:
        """The factors of every head, in a kernel.

        Args:
          decay: references of `decay_inputs`.
          start: of the chunk, in tokens of the segment.
        """
        if self.decay == "none":
            return [chunk.plain(self.chunk)] * self.heads
        if self.decay == "channel":
            g = decay[0][0, pl.ds(start, self.chunk)]
            return [channel.decaying(g[:, self.at(head, self.dk)]) for head in range(self.heads)]
        rows = decay[0][0, 0, :, pl.ds(start, self.chunk)]
        columns = rows.T

        def of(head):
            places = [slice(n, n + 1) for n in range(head, 4 * self.heads, self.heads)]
            return chunk.decaying(chunk.Sums(*(rows[n] for n in places)), chunk.Sums(*(columns[:, n] for n in places)))

        return [of(head) for head in range(self.heads)]


def call(plan: Plan, kernel, batch: int, device: Device, *, in_specs, out_specs, out_shape, scratch=()):
    """A `pallas_call` over batch, groups of heads, and segments in order."""
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(batch, plan.groups, plan.segments),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=device.interpret,
        name=kernel.__name__.strip("_"),
    )


def forward(
    q: Array, k: Array, v: Array, log_decay: Array | None, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv].

    Args:
      q: [b, t, h, dk].
      k: [b, t, h, dk].
      v: [b, t, h, dv].
      log_decay: None, [b, t, h] or [b, t, h, dk], float32.
      state: before the first token, [b, h, dk, dv] float32.
      problem: static facts.
      device: that the kernel is built for.
    """
    b, _, h, dk = q.shape
    dv = v.shape[3]
    bytes_a_token = 2 * (dk + dv) * q.dtype.itemsize + (4 * dk if problem.decay == "channel" else 0)
    plan = Plan.of(q, v, problem, static_choice(problem, device), bytes_a_token=bytes_a_token)

    def order(n):
        return n

    flat = [plan.flat(x) for x in (q, k, v)]
    m = plan.transposed(state)
    o, m = call(
        plan,
        _linear_attention,
        b,
        device,
        in_specs=[*(plan.time(d, order) for d in (dk, dk, dv)), *plan.decay_specs(order), plan.state],
        out_specs=[plan.time(dv, order), plan.state],
        out_shape=[jax.ShapeDtypeStruct(flat[2].shape, v.dtype), jax.ShapeDtypeStruct(m.shape, jnp.float32)],
    )(*flat, *plan.decay_inputs(log_decay), m)
    return plan.unflat(o, v), m[:, :h].mT


def _linear_attention(plan: Plan, q_ref, k_ref, v_ref, *refs):
    # The last state's block is the same for all segments: it stays in VMEM and holds the state meanwhile.
    *decay, first_ref, o_ref, m_ref = refs

    @pl.when(pl.program_id(2) == 0)
    def _():
        m_ref[...] = first_ref[...]

    for head, factors in enumerate(plan.factors(decay, 0)):
        keys, values = plan.at(head, plan.dk), plan.at(head, plan.dv)
        o, m = plan.math.forward(q_ref[0, :, keys], k_ref[0, :, keys], v_ref[0, :, values], factors, m_ref[0, head])
        o_ref[0, :, values] = o.astype(o_ref.dtype)
        m_ref[0, head] = m


def backward(*arrays: Array, problem: Problem, device: Device) -> tuple[Array, Array, Array, Array | None, Array]:
    """As `tpu_backward.backward`."""
    from kernels_pallas.linear import tpu_backward

    return tpu_backward.backward(*arrays, problem=problem, device=device)
