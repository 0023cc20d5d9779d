"""The gated delta rule on Hopper (sm_90a): what couples chunks in order, as kernels; what does not, in XLA.

The inverses T of all chunks, the scores and the gates know nothing of the state, and XLA computes them in float32 at once. A
thread block then goes through the chunks of one head with 64 columns of its state in float32 registers: columns of the state go
with columns of the values and know nothing of each other, so a head is spread over dv / 64 blocks.

Gradients take two such passes, which write out the state before every chunk and, from the last chunk to the first, the cotangent
of the state after it. With both at hand `chunk.backward` of many chunks at once is batched products in XLA again.

Tensor cores take 16 bits, so an operand of a product is two bfloat16 numbers, up to 2^-17 of its value; q, k and gradients of o
are one, and exact. Rounded to one are only the scores that outputs are computed from, and what is returned in 16 bits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.delta import chunk, xla
from kernels_pallas.delta import hopper_kernels as kernels
from kernels_pallas.delta.problem import Problem
from kernels_pallas.device import Device
from kernels_pallas.linear.hopper_chunks import CHUNK
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "backward", "forward", "refuses", "static_choice"]

Array = jax.Array
_SIZES = (64, 128)
# Chunks whose gradients are computed at once: enough to fill a GPU, while what lies between takes little memory.
_GROUP = 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the kernels.

    Attributes:
      stages: chunks in shared memory at a time. More than 2 don't fit at dk = 128.
    """

    stages: int


def static_choice(problem: Problem, device: Device) -> Blocks:
    """A measured choice, or else one from the size of shared memory."""
    default = Blocks(stages=2)
    return tuned(default, "gated_delta", device, dtype=problem.dtype, head_size=problem.key_size, length=problem.length)


def refuses(problem: Problem, device: Device) -> str | None:
    """Why these kernels cannot compute `problem` on `device`, or None."""
    if (reason := mosaic_gpu.refuses(device)) is not None:
        return reason
    if problem.dtype != "bfloat16":
        return f"dtype {problem.dtype} is not bfloat16, whose products are fast and whose range is the state's"
    for name, size in (("dk", problem.key_size), ("dv", problem.value_size)):
        if size not in _SIZES:
            return f"{name}={size} is not 64 or 128"
    if max(problem.batch, problem.heads) > 65535:
        return f"the grid holds a batch and heads of at most 65535, not {problem.batch} and {problem.heads}"
    return None


def forward(
    q: Array, k: Array, v: Array, log_decay: Array, beta: Array, state: Array, *, problem: Problem, device: Device
) -> tuple[Array, Array]:
    """Outputs [b, t, h, dv] and the last state [b, h, dk, dv]; arguments as in `xla.forward`."""
    t, dtype, stages = q.shape[1], q.dtype, static_choice(problem, device).stages
    gates, inverse = _prepare(k, log_decay, beta)
    q, k, v = tiles.pad_length(q, k, v)
    inputs = {"q": q, "k": k, "v": v, "scores": _stack(_scores(q, k, gates)).astype(dtype)}
    out = kernels.launch(
        "gated_delta_forward",
        functools.partial(kernels.forward_block, stages=stages, outputs=True),
        inputs | _pair("inverse", _stack(inverse), dtype) | {"rows": _rows(gates), "state": state},
        outputs={"o": (v.shape, dtype), "last": (state.shape, jnp.float32)},
        scratch=("written_high", "written_low", "out"),
        device=device,
    )
    return out["o"][:, :t], out["last"]


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

    Kept meanwhile are the states between chunks and their cotangents, in 4 bytes an entry.
    """
    dtypes, (b, t, h, dk) = [x.dtype for x in (q, k, v, log_decay, beta)], q.shape
    o_bar, dv, stages = o_bar.astype(q.dtype), v.shape[3], static_choice(problem, device).stages
    gates, inverse = _prepare(k, log_decay, beta)
    q, k, v, o_bar = tiles.pad_length(q, k, v, o_bar)
    n = pl.cdiv(t, CHUNK)
    history = dict.fromkeys(("high", "low"), ((b, h, n, dk, dv), q.dtype)) | {"last": (state.shape, jnp.float32)}
    shared = {"rows": _rows(gates)} | _pair("inverse", _stack(inverse), q.dtype)
    before = kernels.launch(
        "gated_delta_states",
        functools.partial(kernels.forward_block, stages=stages, outputs=False),
        {"k": k, "v": v, "state": state} | shared,
        outputs=history,
        scratch=(),
        device=device,
    )
    after = kernels.launch(
        "gated_delta_states_reversed",
        functools.partial(kernels.reversed_block, stages=stages),
        {"q": q, "k": k, "o_bar": o_bar, "state": state_bar} | _pair("scores", _stack(_scores(q, k, gates)), q.dtype) | shared,
        outputs=history,
        scratch=("read_high", "read_low"),
        device=device,
    )
    tokens = [_chunks(x) for x in (q, k, v)], gates, inverse, _chunks(o_bar)
    halves = [(x["high"], x["low"]) for x in (before, after)]
    bars = lax.map(_gradients(dtypes), jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), (*tokens, *halves)), batch_size=_GROUP)
    bars = [_tokens(x.reshape(b, h, n, *x.shape[1:]), t) for x in bars]
    return *bars[:3], *(x[..., 0] for x in bars[3:]), after["last"]


def _gradients(dtypes: list) -> Callable:
    """Of one chunk: the cotangents of q, k, v [c, d] and, as columns [c, 1], of log-decays and betas."""

    def fn(xs):
        tokens, gates, inverse, o_bar, *halves = xs
        before, after = (high.astype(jnp.float32) + low.astype(jnp.float32) for high, low in halves)
        *bars, log_decay_bar, beta_bar, _ = chunk.backward(*tokens, gates, inverse, before, o_bar, after)
        return [x.astype(dtype) for x, dtype in zip((*bars, log_decay_bar.T, beta_bar.T), dtypes)]

    return fn


def _each(fn: Callable) -> Callable:
    """A function of matrices, over the axes b, h and n."""
    return jax.vmap(jax.vmap(jax.vmap(fn)))


def _chunks(x: Array) -> Array:
    """[b, t, h, d] -> [b, h, n, c, d], padded by tokens that change nothing."""
    b, t, h, d = x.shape
    return jnp.pad(x, ((0, 0), (0, -t % CHUNK), (0, 0), (0, 0))).reshape(b, -1, CHUNK, h, d).transpose(0, 3, 1, 2, 4)


def _tokens(x: Array, length: int) -> Array:
    """`_chunks` undone."""
    b, h, n, c, d = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(b, n * c, h, d)[:, :length]


def _prepare(k: Array, log_decay: Array, beta: Array) -> tuple[chunk.Gates, Array]:
    """Gates of all chunks, each with leading axes [b, h, n], and T [b, h, n, c, c]; float32."""
    gates = _each(chunk.gates)(*(_chunks(x[..., None]).swapaxes(-1, -2) for x in (log_decay, beta)))
    return gates, xla.chunk_inverse(_each(chunk.couplings)(_chunks(k), gates))


def _scores(q: Array, k: Array, gates: chunk.Gates) -> Array:
    """[b, h, n, c, c] float32: how much of what a token writes each query of its chunk reads."""
    return _each(lambda q, k, between: chunk.product(q, k, 1, 1) * between)(_chunks(q), _chunks(k), gates.between)


def _rows(gates: chunk.Gates) -> Array:
    """What scales rows of tiles, [b, h, n, 3, c]; `kernels.START`, `END` and `BETA`."""
    return jnp.concatenate([gates.start, gates.end, gates.beta], axis=-1).swapaxes(-1, -2)


def _stack(x: Array) -> Array:
    """[b, h, n, c, c] -> [b, h, n c, c]."""
    return x.reshape(*x.shape[:2], -1, CHUNK)


def _pair(name: str, x: Array, dtype) -> dict[str, Array]:
    """The two halves of x, as inputs of a kernel."""
    return dict(zip((f"{name}_high", f"{name}_low"), (half.astype(dtype) for half in kernels.split(x))))
