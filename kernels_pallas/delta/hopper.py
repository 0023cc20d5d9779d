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
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic_gpu
from kernels_pallas.attention import hopper_tiles as tiles
from kernels_pallas.delta import chunk, xla
from kernels_pallas.delta.problem import Problem
from kernels_pallas.device import Device
from kernels_pallas.linear import hopper_chunks as chunks
from kernels_pallas.linear.hopper_chunks import CHUNK
from kernels_pallas.tuning import tuned

__all__ = ["Blocks", "backward", "forward", "refuses", "static_choice"]

Array = jax.Array
_SIZES = (64, 128)
# Chunks whose gradients are computed at once: enough to fill a GPU, while what lies between takes little memory.
_GROUP = 1024
# Rows of a chunk's gates.
_START, _END, _BETA = range(3)


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
    t, dtype = q.shape[1], q.dtype
    gates, inverse = _prepare(k, log_decay, beta)
    q, k, v = tiles.pad_length(q, k, v)
    inputs = {"q": q, "k": k, "v": v, "scores": _stack(_scores(q, k, gates)).astype(dtype)}
    out = _launch(
        "gated_delta_forward",
        lambda refs, stages: _forward_block(refs, stages, outputs=True),
        inputs | _pair("inverse", _stack(inverse), dtype) | {"rows": _rows(gates), "state": state},
        outputs={"o": (v.shape, dtype), "last": (state.shape, jnp.float32)},
        scratch=("written_high", "written_low", "out"),
        problem=problem,
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
    o_bar, dv = o_bar.astype(q.dtype), v.shape[3]
    gates, inverse = _prepare(k, log_decay, beta)
    q, k, v, o_bar = tiles.pad_length(q, k, v, o_bar)
    n = pl.cdiv(t, CHUNK)
    history = dict.fromkeys(("high", "low"), ((b, h, n, dk, dv), q.dtype)) | {"last": (state.shape, jnp.float32)}
    shared = {"rows": _rows(gates)} | _pair("inverse", _stack(inverse), q.dtype)
    before = _launch(
        "gated_delta_states",
        lambda refs, stages: _forward_block(refs, stages, outputs=False),
        {"k": k, "v": v, "state": state} | shared,
        outputs=history,
        scratch=(),
        problem=problem,
        device=device,
    )
    after = _launch(
        "gated_delta_states_reversed",
        _reversed_block,
        {"q": q, "k": k, "o_bar": o_bar, "state": state_bar} | _pair("scores", _stack(_scores(q, k, gates)), q.dtype) | shared,
        outputs=history,
        scratch=("read_high", "read_low"),
        problem=problem,
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


def _split(x: Array) -> tuple[Array, Array]:
    """x = high + low in bfloat16, up to 2^-17; high is x rounded to nearest."""
    # By bits: compilers may take a conversion to 16 bits and back for nothing and would leave low = 0.
    bits = (lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(1 << 15)) & jnp.int32(-65536)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


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
    """What scales rows of tiles, [b, h, n, 3, c]."""
    return jnp.concatenate([gates.start, gates.end, gates.beta], axis=-1).swapaxes(-1, -2)


def _stack(x: Array) -> Array:
    """[b, h, n, c, c] -> [b, h, n c, c]."""
    return x.reshape(*x.shape[:2], -1, CHUNK)


def _pair(name: str, x: Array, dtype) -> dict[str, Array]:
    """The two halves of x, as inputs of a kernel."""
    return dict(zip((f"{name}_high", f"{name}_low"), (half.astype(dtype) for half in _split(x))))


def _launch(
    name: str,
    block: Callable,
    inputs: dict,
    outputs: dict,
    scratch: tuple[str, ...],
    problem: Problem,
    device: Device,
) -> dict[str, Array]:
    """Runs `block(refs, stages)` for every head and 64 columns of its state; `scratch` names further [c, c] tiles."""
    dtype, stages = inputs["k"].dtype, static_choice(problem, device).stages
    names = ("change_high", "change_low", *scratch)
    return chunks.launch(
        name,
        lambda refs: block(refs, stages),
        device,
        inputs=inputs,
        outputs=outputs,
        scratch={part: chunks.tile(problem.key_size, CHUNK, dtype) for part in ("state_high", "state_low")}
        | {part: chunks.tile(CHUNK, CHUNK, dtype) for part in names}
        | chunks.stage(dtype, device),
        # Not the problem's batch and heads: `vmap` folds axes into the one, a mesh splits both.
        grid={"b": inputs["k"].shape[0], "h": inputs["k"].shape[2], "j": problem.value_size // CHUNK},
    )


def _forward_block(refs: dict, stages: int, *, outputs: bool):
    """All chunks of one head in order, for 64 columns of its values and its state: outputs, or states before every chunk."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    columns = pl.ds(j * CHUNK, CHUNK)

    def step(i, x, state):
        k, states = x["k"], _put_state(state, refs, None if outputs else (b, h, i, slice(None), columns))
        read = _sum_products(*((k, half) for half in states))
        error = x["v"][...].astype(jnp.float32) - _along(x, _START) * read
        change = _put(_along(x, _BETA) * error, refs, "change")
        plgpu.commit_smem()
        written = _solved(x, change, transposed=False)
        if outputs:
            own = _put(written, refs, "written")
        change = _put(_along(x, _END) * written, refs, "change")
        plgpu.commit_smem()
        if outputs:
            o = _along(x, _START) * _sum_products(*((x["q"], half) for half in states))
            o = _accumulate(o, refs, *((x["scores"], half) for half in own))
            chunks.store(o, refs["out"], refs["o"].at[b, pl.ds(i * CHUNK, CHUNK), h, columns])
        state = state * x["rows"][_START, CHUNK - 1]
        state = _accumulate(state, refs, *((k.T, half) for half in change))
        plgpu.commit_smem()  # all warps are done with the chunk's tiles: the pipeline may fill them again
        return state

    names = ("q", "k", "v", "inverse_high", "inverse_low", "scores", "rows")
    _through_chunks(refs, names, step, stages, reverse=False)


def _reversed_block(refs: dict, stages: int):
    """All chunks of one head from the last, for 64 columns of the cotangent of the state: what it is after every chunk.

    With D that of the state after a chunk and g that of its outputs, and u of `chunk`:

        u_bar = scores^T g + exp(b_c - b) k D        r_bar = T^T u_bar
        D' = exp(b_c) D + q^T exp(b) g - k^T exp(b) beta r_bar
    """
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    columns = pl.ds(j * CHUNK, CHUNK)

    def step(i, x, state):
        states = _put_state(state, refs, (b, h, i, slice(None), columns))
        k, o_bar = x["k"], x["o_bar"]
        bar = _along(x, _END) * _sum_products(*((k, half) for half in states))
        bar = _accumulate(bar, refs, (x["scores_high"].T, o_bar), (x["scores_low"].T, o_bar))
        change = _put(bar, refs, "change")
        read = _put(_along(x, _START) * o_bar[...].astype(jnp.float32), refs, "read")
        plgpu.commit_smem()
        bar = _solved(x, change, transposed=True)
        change = _put(-_along(x, _START) * _along(x, _BETA) * bar, refs, "change")
        plgpu.commit_smem()
        state = state * x["rows"][_START, CHUNK - 1]
        pairs = [(x["q"].T, half) for half in read] + [(k.T, half) for half in change]
        state = _accumulate(state, refs, *pairs)
        plgpu.commit_smem()  # as in `_forward_block`
        return state

    names = ("q", "k", "o_bar", "inverse_high", "inverse_low", "scores_high", "scores_low", "rows")
    _through_chunks(refs, names, step, stages, reverse=True)


def _through_chunks(refs: dict, names: tuple[str, ...], step: Callable, stages: int, *, reverse: bool):
    """Carries the state of a thread block through `step(i, tiles by name, state)` and writes out the last one."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    names = [name for name in names if name in refs]
    n = refs["rows"].shape[2]

    def at(i):
        return n - 1 - i if reverse else i

    def spec(name):
        if name == "rows":
            return plgpu.BlockSpec((None, *refs[name].shape[3:]), lambda i: (at(i), 0, 0))
        if name in ("v", "o_bar"):
            return chunks.spec(CHUNK, lambda i: (at(i), j))
        return chunks.spec(refs[name].shape[3], lambda i: (at(i), 0))

    def source(name):
        return refs[name].at[b, :, h] if name in ("q", "k", "v", "o_bar") else refs[name].at[b, h]

    def body(ids, *rest):
        *arrived, state = rest
        return step(at(ids[0]), dict(zip(names, arrived)), state)

    last = plgpu.emit_pipeline(
        body,
        grid=(n,),
        in_specs=[spec(name) for name in names],
        max_concurrent_steps=stages,
        init_carry=mosaic_gpu.load(refs["state"].at[b, h, :, pl.ds(j * CHUNK, CHUNK)]),
    )(*(source(name) for name in names))
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies
    refs["last"][b, h, :, pl.ds(j * CHUNK, CHUNK)] = last


def _along(x: dict, row: int) -> Array:
    """A row of a chunk's gates, [c, c] with its entries along the first axis."""
    return lax.broadcast_in_dim(mosaic_gpu.load(x["rows"].at[row]), (CHUNK, CHUNK), [0])


def _put(x: Array, refs: dict, name: str) -> tuple:
    """The two halves of x in shared memory; to be committed."""
    halves = refs[f"{name}_high"], refs[f"{name}_low"]
    for ref, half in zip(halves, _split(x)):
        ref[...] = half
    return halves


def _put_state(state: Array, refs: dict, destination: tuple | None) -> tuple:
    """The two halves of the state in shared memory, committed, and from there, if wanted, in the outputs "high" and "low"."""
    if destination is not None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    halves = _put(state, refs, "state")
    plgpu.commit_smem()
    if destination is not None:
        for name, half in zip(("high", "low"), halves):
            plgpu.copy_smem_to_gmem(half, refs[name].at[*destination])
    return halves


def _sum_products(*pairs: tuple) -> Array:
    """The sum of a @ b, of tiles in shared memory."""

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((pairs[0][0].shape[0], pairs[0][1].shape[1]), jnp.float32))


def _accumulate(x: Array, refs: dict, *pairs: tuple) -> Array:
    """x, in registers, plus the sum of a @ b."""
    if "stage" in refs:  # the interpreter has no accumulators that start from registers
        return x + _sum_products(*pairs)

    def add_all(add):
        for a, b in pairs:
            add(0, a, b)

    return tiles.accumulate((x,), add_all)[0]


def _solved(x: dict, halves: tuple, *, transposed: bool) -> Array:
    """T y or T^T y, without the product of the two low halves."""
    inverse = [x[name].T if transposed else x[name] for name in ("inverse_high", "inverse_low")]
    out = _sum_products((inverse[0], halves[0]), (inverse[0], halves[1]), (inverse[1], halves[0]))
    plgpu.commit_smem()  # all warps are done with y, not only this one: it may be overwritten
    return out
