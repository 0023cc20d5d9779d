"""The Hopper kernels of the gated delta rule: a head's chunks, for 64 columns of its state, first to last or last to first.

Operands of products are two bfloat16 numbers where one would lose what the state must keep; see `hopper`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.device import Device
from kernels_pallas.linear import hopper_chunks as chunks
from kernels_pallas.linear.hopper_chunks import CHUNK

__all__ = ["BETA", "END", "START", "forward_block", "launch", "reversed_block", "split"]

Array = jax.Array
# Rows of a chunk's gates.
START, END, BETA = range(3)


def split(x: Array) -> tuple[Array, Array]:
    """x = high + low in bfloat16, up to 2^-17; high is x rounded to nearest."""
    # By bits: compilers may take a conversion to 16 bits and back for nothing and would leave low = 0.
    bits = (lax.bitcast_convert_type(x, jnp.int32) + jnp.int32(1 << 15)) & jnp.int32(-65536)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def launch(
    name: str,
    block: Callable,
    inputs: dict,
    outputs: dict,
    scratch: tuple[str, ...],
    device: Device,
) -> dict[str, Array]:
    """Runs `block(refs)` for every head and 64 columns of its state.

    Args:
      name: of the kernel.
      block: the kernel.
      inputs: arrays.
      outputs: (shape, dtype) each.
      scratch: names of further [c, c] tiles.
      device: that it is built for.
    """
    dtype, key_size = inputs["k"].dtype, inputs["k"].shape[3]
    names = ("change_high", "change_low", *scratch)
    return chunks.launch(
        name,
        block,
        device,
        inputs=inputs,
        outputs=outputs,
        scratch={part: chunks.tile(key_size, CHUNK, dtype) for part in ("state_high", "state_low")}
        | {part: chunks.tile(CHUNK, CHUNK, dtype) for part in names}
        | chunks.stage(dtype, device),
        # Not the problem's batch and heads: `vmap` folds axes into the one, a mesh splits both.
        grid={"b": inputs["k"].shape[0], "h": inputs["k"].shape[2], "j": inputs["state"].shape[3] // CHUNK},
    )


def forward_block(refs: dict, *, stages: int, outputs: bool):
    """All chunks of one head in order, for 64 columns of its values and its state: outputs, or states before every chunk."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    columns = pl.ds(j * CHUNK, CHUNK)

    def step(i, x, state):
        k, states = x["k"], _put_state(state, refs, None if outputs else (b, h, i, slice(None), columns))
        read = _sum_products(*((k, half) for half in states))
        error = x["v"][...].astype(jnp.float32) - _along(x, START) * read
        change = _put(_along(x, BETA) * error, refs, "change")
        plgpu.commit_smem()
        written = _solved(x, change, transposed=False)
        if outputs:
            own = _put(written, refs, "written")
        change = _put(_along(x, END) * written, refs, "change")
        plgpu.commit_smem()
        if outputs:
            o = _along(x, START) * _sum_products(*((x["q"], half) for half in states))
            o = _accumulate(o, refs, *((x["scores"], half) for half in own))
            chunks.store(o, refs["out"], refs["o"].at[b, pl.ds(i * CHUNK, CHUNK), h, columns])
        state = state * x["rows"][START, CHUNK - 1]
        state = _accumulate(state, refs, *((k.T, half) for half in change))
        plgpu.commit_smem()  # all warps are done with the chunk's tiles: the pipeline may fill them again
        return state

    names = ("q", "k", "v", "inverse_high", "inverse_low", "scores", "rows")
    _through_chunks(refs, names, step, stages, reverse=False)


def reversed_block(refs: dict, *, stages: int):
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
        bar = _along(x, END) * _sum_products(*((k, half) for half in states))
        bar = _accumulate(bar, refs, (x["scores_high"].T, o_bar), (x["scores_low"].T, o_bar))
        change = _put(bar, refs, "change")
        read = _put(_along(x, START) * o_bar[...].astype(jnp.float32), refs, "read")
        plgpu.commit_smem()
        bar = _solved(x, change, transposed=True)
        change = _put(-_along(x, START) * _along(x, BETA) * bar, refs, "change")
        plgpu.commit_smem()
        state = state * x["rows"][START, CHUNK - 1]
        pairs = [(x["q"].T, half) for half in read] + [(k.T, half) for half in change]
        state = _accumulate(state, refs, *pairs)
        plgpu.commit_smem()  # as in `forward_block`
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
    for ref, half in zip(halves, split(x)):
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
