"""Gradients of causal linear attention on Hopper: two passes over chunks for states, then all chunks at once.

The state before every chunk and the cotangent of the state after it are recurrences over columns of values, like the forward
pass; they are written out in bfloat16. With both at hand the gradients of a chunk's tokens are products of its tiles alone, and
one thread block a chunk computes them, however few heads there are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper_tiles as tiles
from kernels_pallas import mosaic_gpu
from kernels_pallas.device import Device
from kernels_pallas.linear import hopper_chunks as chunks
from kernels_pallas.linear.chunk import positions
from kernels_pallas.linear.hopper_chunks import CHUNK
from kernels_pallas.linear.problem import Problem

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
    """Cotangents of q, k, v, log_decay and state; arguments as in `xla.backward`."""
    t, stages = q.shape[1], chunks.static_choice(problem, device).stages
    q, k, v, do = tiles.pad_length(q, k, v, do)
    decay = None if log_decay is None else chunks.decay_rows(log_decay)
    before, _ = _states(k, v, decay, state, reverse=False, stages=stages, device=device)
    after, dstate = _states(q, do, decay, dstate, reverse=True, stages=stages, device=device)
    out = _tokens(q, k, v, do, decay, before, after, device)
    dlog_decay = None
    if log_decay is not None:
        dlog_decay = _log_decay_bar(**{name: out[name] for name in ("paired", "read", "keys", "written", "carried")})
        dlog_decay = dlog_decay.transpose(0, 2, 1)[:, :t]
    return out["dq"][:, :t], out["dk"][:, :t], out["dv"][:, :t], dlog_decay, dstate


def _states(x, y, decay, state, *, reverse: bool, stages: int, device: Device) -> tuple[Array, Array]:
    """States before every chunk [b, h, n, dk, dv], in x's dtype, and the last one, float32.

    Args:
      x: [b, t, h, dk].
      y: [b, t, h, dv].
      decay: as `chunks.decay_rows`, or None.
      state: the first, [b, h, dk, dv].
      reverse: from the last chunk to the first: x are queries, y gradients of outputs, and states cotangents of states.
      stages: of `chunks.Blocks`.
      device: that the kernel is built for.
    """
    b, t, h, dk = x.shape
    n = pl.cdiv(t, CHUNK)
    out = chunks.launch(
        "linear_states_reversed" if reverse else "linear_states",
        lambda refs: _states_block(refs, reverse=reverse, stages=stages),
        device,
        inputs={"x": x, "y": y, "decay": decay, "state": state},
        outputs={"states": ((b, h, n, *state.shape[2:]), x.dtype), "last": (state.shape, jnp.float32)},
        scratch={"rounded": chunks.tile(dk, CHUNK, x.dtype), "scaled": chunks.tile(CHUNK, CHUNK, x.dtype)}
        | chunks.stage(x.dtype, device),
        grid={"b": b, "h": h, "j": y.shape[3] // CHUNK},
    )
    return out["states"], out["last"]


def _states_block(refs: dict, *, reverse: bool, stages: int):
    """One thread block: all chunks of one head, for 64 columns of its state."""
    b, h, j = (lax.axis_index(name) for name in ("b", "h", "j"))
    columns, dk = pl.ds(j * CHUNK, CHUNK), refs["x"].shape[3]
    n = pl.cdiv(refs["x"].shape[1], CHUNK)
    decay = [] if refs["decay"] is None else [refs["decay"].at[b, h]]

    def at(i):
        return n - 1 - i if reverse else i

    def step(ids, x_s, y_s, *rest):
        *decay_s, state = rest
        chunks.store(state, refs["rounded"], refs["states"].at[b, h, at(ids[0]), :, columns])
        kind = chunks.START if reverse else chunks.END
        return chunks.advance(state, x_s, y_s, decay_s[0] if decay_s else None, kind, refs["scaled"], refs.get("stage"))

    last = plgpu.emit_pipeline(
        step,
        grid=(n,),
        in_specs=[chunks.spec(dk, lambda i: (at(i), 0)), chunks.spec(CHUNK, lambda i: (at(i), j))]
        + chunks.decay_specs(refs["decay"], at),
        max_concurrent_steps=stages,
        init_carry=mosaic_gpu.load(refs["state"].at[b, h, :, columns]),
    )(refs["x"].at[b, :, h], refs["y"].at[b, :, h], *decay)
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies
    refs["last"][b, h, :, columns] = last


def _tokens(q, k, v, do, decay, before, after, device: Device) -> dict[str, Array]:
    """dq, dk, dv, and with decay the float32 arguments of `_log_decay_bar`."""
    b, t, h, dk = q.shape
    dv, n = v.shape[3], before.shape[2]
    outputs = {"dq": (q.shape, q.dtype), "dk": (k.shape, k.dtype), "dv": (v.shape, v.dtype)}
    if decay is not None:
        a_token = (b, h, n, CHUNK), jnp.float32
        outputs |= dict.fromkeys(("paired", "read", "keys", "written"), a_token)
        outputs["carried"] = (b, h, n, dk), jnp.float32
    shapes = {"q": (CHUNK, dk), "k": (CHUNK, dk), "v": (CHUNK, dv), "do": (CHUNK, dv)}
    shapes |= {"rows_before": (CHUNK, dv), "rows_after": (CHUNK, dv), "columns_after": (dk, CHUNK)}
    return chunks.launch(
        "linear_gradients",
        _tokens_block,
        device,
        inputs={"q": q, "k": k, "v": v, "do": do, "decay": decay, "before": before, "after": after},
        outputs=outputs,
        scratch={f"{name}_s": chunks.tile(*shape, q.dtype) for name, shape in shapes.items()}
        | {"tokens": plgpu.Barrier(num_arrivals=4, num_barriers=1), "states": plgpu.Barrier(num_barriers=1)}
        | chunks.stage(q.dtype, device),
        grid={"b": b, "h": h, "i": n},
    )


class _Block:
    """One thread block: one chunk of one head. Its three parts follow each other, so that each has all registers."""

    def __init__(self, refs: dict):
        self.refs, self.stage = refs, refs.get("stage")
        self.at = tuple(lax.axis_index(name) for name in ("b", "h", "i"))
        self.decay = None if refs["decay"] is None else refs["decay"].at[*self.at]
        self.q, self.k, self.v, self.do = (refs[f"{name}_s"] for name in ("q", "k", "v", "do"))
        b, h, n = self.at
        self.tokens = b, pl.ds(n * CHUNK, CHUNK), h

    def load_tokens(self):
        """q, k, v and the gradient of o."""
        for name in ("q", "k", "v", "do"):
            plgpu.copy_gmem_to_smem(self.refs[name].at[*self.tokens], self.refs[f"{name}_s"], self.refs["tokens"])
        plgpu.barrier_wait(self.refs["tokens"])

    def load_state(self, name: str, index: tuple, destination: str):
        """Part of a state, into shared memory whose last use is over."""
        ref = self.refs[f"{destination}_s"]
        plgpu.copy_gmem_to_smem(self.refs[name].at[*self.at, *index], ref, self.refs["states"])
        plgpu.barrier_wait(self.refs["states"])
        return ref

    def decayed(self, x, kind):
        """x times exp(b) or exp(b_c - b) of its token."""
        return x if self.decay is None else x * chunks.along(self.decay, kind, 0)

    def finish(self, x, a, b, name, columns):
        """Writes x + a b out as `columns` of a gradient; a in registers."""
        (x,) = tiles.accumulate((x,), lambda add: add(0, a, b), self.stage)
        # What this tile held has been read, if it held anything.
        chunks.store(x, self.refs["columns_after_s"].at[pl.ds(0, CHUNK)], self.refs[name].at[*self.tokens, columns])

    def weighted(self, transposed: bool):
        """Scores and their cotangents by queries and keys, or by keys and queries."""
        w = chunks.weights(self.decay, transposed=transposed)
        pair = (self.k, self.q.T, self.v, self.do.T) if transposed else (self.q, self.k.T, self.do, self.v.T)
        scores, products = chunks.two_products(*pair, lambda x: x * w)
        return scores, products * w, scores * products

    def queries(self):
        """dq = dp k + exp(b) do S^T, with dp the cotangent of the scores."""
        _, bars, paired = self.weighted(transposed=False)
        if self.decay is not None:
            self.refs["paired"][*self.at] = _below_diagonal(paired, 0).sum(axis=1)
        bars, read = bars.astype(self.q.dtype), jnp.zeros((CHUNK,), jnp.float32)
        for start in range(0, self.q.shape[1], CHUNK):
            columns = pl.ds(start, CHUNK)
            state = self.load_state("before", (columns,), "rows_before")
            dq = self.decayed(tiles.product(self.do, state.T), chunks.START)
            if self.decay is not None:
                read = read + (dq * self.q[:, columns].astype(jnp.float32)).sum(axis=1)
                bar = self.load_state("after", (columns,), "rows_after")
                self.refs["carried"][*self.at, columns] = _row_products(state, bar) * self.decay[chunks.START, CHUNK - 1]
            self.finish(dq, bars, self.k.at[:, columns], "dq", columns)
        if self.decay is not None:
            self.refs["read"][*self.at] = read

    def keys_and_values(self):
        """dk = dp^T q + exp(b_c - b) v D^T and dv = p^T do + exp(b_c - b) k D, with D the cotangent of the state behind."""
        scores, bars, paired = self.weighted(transposed=True)
        if self.decay is not None:
            self.refs["keys"][*self.at] = _below_diagonal(paired, 1).sum(axis=1)
        scores, bars, written = scores.astype(self.q.dtype), bars.astype(self.q.dtype), jnp.zeros((CHUNK,), jnp.float32)
        for start in range(0, self.q.shape[1], CHUNK):
            columns = pl.ds(start, CHUNK)
            bar = self.load_state("after", (columns,), "rows_after")
            dk = self.decayed(tiles.product(self.v, bar.T), chunks.END)
            if self.decay is not None:
                written = written + (dk * self.k[:, columns].astype(jnp.float32)).sum(axis=1)
            self.finish(dk, bars, self.q.at[:, columns], "dk", columns)
        if self.decay is not None:
            self.refs["written"][*self.at] = written
        for start in range(0, self.v.shape[1], CHUNK):
            columns = pl.ds(start, CHUNK)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last gradient has left this tile
            bar = self.load_state("after", (slice(None), columns), "columns_after")
            dv = self.decayed(tiles.product(self.k, bar), chunks.END)
            self.finish(dv, scores, self.do.at[:, columns], "dv", columns)


def _tokens_block(refs: dict):
    block = _Block(refs)
    block.load_tokens()
    block.queries()
    block.keys_and_values()
    plgpu.wait_smem_to_gmem(0)  # shared memory must outlive the copies


def _below_diagonal(x, q_axis: int):
    i, j = (plgpu.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (q_axis, 1 - q_axis))
    return jnp.where(i > j, x, 0.0)


def _row_products(x_s, y_s):
    """Sums along the rows of x y, float32."""
    total = jnp.zeros((CHUNK,), jnp.float32)
    for start in range(0, x_s.shape[1], CHUNK):
        x, y = (ref[:, pl.ds(start, CHUNK)].astype(jnp.float32) for ref in (x_s, y_s))
        total = total + (x * y).sum(axis=1)
    return total


def _log_decay_bar(paired: Array, read: Array, keys: Array, written: Array, carried: Array) -> Array:
    """[b, h, t] float32 from sums of each token, [b, h, n, c].

    log_decay_t scales the pairs i >= t > j of a chunk, what is read at i >= t, what is written at j < t, and the state.
    Pairs of a token with itself, which no decay scales, are left out of both sums that are subtracted here: where decay is
    strong they are all there is, and nothing large cancels.

    Args:
      paired: terms of a query's pairs with earlier keys.
      read: the term of its reading the state.
      keys: terms of a key's pairs with later queries.
      written: the term of its being written to the state.
      carried: [b, h, n, dk], terms of the state.
    """
    i, t = positions(CHUNK)
    later = jnp.where(i >= t, 1.0, 0.0)

    def add(x, kept):
        return jnp.matmul(x, kept, precision=lax.Precision.HIGHEST)

    bar = add(paired - keys + read, later) + add(written, 1.0 - later) + carried.sum(-1, keepdims=True)
    return bar.reshape(*bar.shape[:2], -1)
