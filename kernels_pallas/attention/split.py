"""Block-sparse attention as a few dense products: queries that see the same keys go together, and need no mask.

Next-scale models see a prefix of keys or their own scale, block diffusion sees its own noisy block and a clean prefix: such
masks are runs of queries that all see the same one or two intervals of keys. Two intervals are merged by their log-sum-exps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from kernels_pallas.attention import xla
from kernels_pallas.attention.merge import merge_parts
from kernels_pallas.attention.problem import Problem
from kernels_pallas.block_mask import BlockMask
from kernels_pallas.device import Device

__all__ = ["Piece", "Run", "backward", "composed_backward", "composed_forward", "forward", "pieces", "refuses", "runs"]

# More runs than this make programs that take long to compile, and products too small to fill a device.
MAX_RUNS = 64
MAX_SPANS = 2
# Consecutive runs of fewer queries than _SHORT share one masked product of up to _PAIRS pairs: it costs less than their calls.
_SHORT, _PAIRS = 64, 1 << 15
# What a pair of a masked piece costs, in pairs of others and of `xla`: on two CPU cores, [noisy, clean] of length 1024 in blocks
# of 16 takes 1.8 times as long as there with 1.1 times as many pairs, almost all masked; in blocks of 32 it is slower with 0.8.
_MASKED = 2
# Pairs for which the mask is evaluated at once on the host, and scores that are in memory at once: what a CPU's cache holds
# (2 MiB; fastest of 2^14 to 2^20 a head, at 2 and at 16 heads), and half a GiB elsewhere.
_HOST_PAIRS, _CPU_SCORES, _SCORES = 1 << 24, 1 << 19, 1 << 27


class Run(NamedTuple):
    """Consecutive queries `start:stop` that see the same keys: those of `spans`, in order; none, if they are dead."""

    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]


class Piece(NamedTuple):
    """Queries `start:stop` to be computed together; `masked` where not all see all of `spans`."""

    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]
    masked: bool


def refuses(problem: Problem, device: Device) -> str | None:
    """Masks that are not few runs of few intervals, and those whose short runs make it do more than `xla` does.

    A masked piece spans all keys between the first and the last that any of its queries sees: where these are a block of 16 and
    a far prefix, most of it is for nothing.
    """
    found = pieces(problem.mask)
    if isinstance(found, str):
        return found
    blocks = xla.static_choice(problem, device)
    plan = problem.mask.planned((blocks.q, blocks.k))
    here, loops = _work(found), np.count_nonzero(plan) * blocks.q * blocks.k
    # Of a mask of one block `xla` computes all pairs, with the mask, too.
    if plan.size > 1 and here > loops:
        return f"pieces of {problem.mask} are the work of {here} pairs of queries and keys, live blocks of xla of {loops}"
    return None


def forward(q, k, v, *, mask: BlockMask, scale: float, device: Device):
    """o [b, sq, h, d] in the dtype of q and lse float32 [b, sq, h]; dead rows give 0 and -inf."""
    return composed_forward(_Dense(scale, device), q, k, v, mask)


def backward(q, k, v, lse, do, delta, *, mask: BlockMask, scale: float, device: Device):
    """dq, dk, dv in the input dtypes."""
    return composed_backward(_Dense(scale, device), q, k, v, lse, do, delta, mask)


def composed_forward(dense, q, k, v, mask: BlockMask):
    """Attention from `dense.forward(q, k, v, allowed) -> (o, lse)` on the slices of every piece."""
    b, _, h, d = q.shape
    outputs = []
    for start, stop, spans, masked in _covering(pieces(mask), q.shape[1]):
        rows = slice(start, stop)
        parts = [dense.forward(q[:, rows], k[:, s], v[:, s], _allowed(mask, masked, rows, s)) for s in _slices(spans)]
        if not parts:
            parts = [(jnp.zeros_like(q[:, rows]), jnp.full_like(q[:, rows, :, 0], -jnp.inf, jnp.float32))]
        o, lse = merge_parts(parts) if len(parts) > 1 else parts[0]
        outputs.append((o.astype(q.dtype), lse))
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*outputs))


def composed_backward(dense, q, k, v, lse, do, delta, mask: BlockMask):
    """Gradients from `dense.backward(q, k, v, lse, do, delta, allowed) -> (dq, dk, dv)` on the slices of every piece.

    `lse` and `delta` belong to the whole row, so that the parts of a row add up with no merge.
    """
    dqs, dk, dv = [], jnp.zeros_like(k, dtype=jnp.float32), jnp.zeros_like(v, dtype=jnp.float32)
    for start, stop, spans, masked in _covering(pieces(mask), q.shape[1]):
        rows = slice(start, stop)
        dq = jnp.zeros_like(q[:, rows], dtype=jnp.float32)
        for s in _slices(spans):
            grads = dense.backward(
                q[:, rows], k[:, s], v[:, s], lse[:, rows], do[:, rows], delta[:, rows], _allowed(mask, masked, rows, s)
            )
            dq += grads[0]
            dk, dv = _add(dk, s.start, grads[1]), _add(dv, s.start, grads[2])
        dqs.append(dq.astype(q.dtype))
    return jnp.concatenate(dqs, axis=1), dk.astype(k.dtype), dv.astype(v.dtype)


@functools.lru_cache(maxsize=256)
def pieces(mask: BlockMask) -> tuple[Piece, ...] | str:
    """What to compute, in order of the queries and without dead ones; or why the mask does not split."""
    found = runs(mask)
    if isinstance(found, str):
        return found
    result: list[Piece] = []
    for run in found:
        last = result[-1] if result else None
        if last and last.stop == run.start and _short(run) and (last.masked or _short(last)):
            spans = ((min(last.spans[0][0], run.spans[0][0]), max(last.spans[-1][1], run.spans[-1][1])),)
            if (run.stop - last.start) * (spans[0][1] - spans[0][0]) <= _PAIRS:
                result[-1] = Piece(last.start, run.stop, spans, True)
                continue
        if run.spans:
            result.append(Piece(*run, masked=False))
    return tuple(result)


def runs(mask: BlockMask) -> tuple[Run, ...] | str:
    """The mask as runs of queries that see the same keys, or why it is not one of few runs of few intervals.

    The predicate is evaluated for one query of every stretch with equal metadata, not for all.
    """
    sq, sk = mask.shape
    changes = np.any(mask.q_meta[:, 1:] != mask.q_meta[:, :-1], axis=0)
    firsts = np.concatenate([[0], 1 + np.flatnonzero(changes)])
    found, last = [], None
    step = max(1, _HOST_PAIRS // sk)
    for begin in range(0, len(firsts), step):
        some = firsts[begin : begin + step]
        rows = np.asarray(mask.pred(mask.q_meta[:, some, None], mask.k_meta[:, None, :]), bool)
        differs = np.any(rows[1:] != rows[:-1], axis=1)
        new = np.concatenate([[last is None or bool(np.any(rows[0] != last))], differs])
        if len(found) + new.sum() > MAX_RUNS:
            return f"{mask} has more than {MAX_RUNS} runs of queries that see the same keys"
        found += [(int(some[i]), _spans(rows[i])) for i in np.flatnonzero(new)]
        last = rows[-1]
    if (most := max(len(spans) for _, spans in found)) > MAX_SPANS:
        return f"{mask} has queries that see {most} separate intervals of keys, more than {MAX_SPANS}"
    stops = [start for start, _ in found[1:]] + [sq]
    return tuple(Run(start, stop, spans) for (start, spans), stop in zip(found, stops))


class _Dense(NamedTuple):
    """Dense attention in XLA, a bounded number of queries at a time."""

    scale: float
    device: Device

    def forward(self, q, k, v, allowed):
        size = self._size(q, k, allowed)
        if size is None:
            return xla.dense_forward(q, k, v, allowed, self.scale)
        o, lse = jax.lax.map(lambda qi: xla.dense_forward(qi, k, v, None, self.scale), _chunks(q, size))
        return _join(o, q.shape[1]), _join(lse, q.shape[1])

    def backward(self, q, k, v, lse, do, delta, allowed):
        size = self._size(q, k, allowed)
        if size is None:
            return xla.dense_backward(q, k, v, lse, do, delta, allowed, self.scale)

        def step(sums, rows):
            dq, *more = xla.dense_backward(rows[0], k, v, *rows[1:], None, self.scale)
            return tuple(x + y for x, y in zip(sums, more)), dq

        zeros = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (k, v))
        # Zeros that fill the last chunk add nothing, because their do and delta are 0.
        sums, dq = jax.lax.scan(step, zeros, tuple(_chunks(x, size) for x in (q, lse, do, delta)))
        return _join(dq, q.shape[1]), *sums

    def _size(self, q, k, allowed) -> int | None:
        """Queries at a time; None for all. Masked pieces are small."""
        most = _CPU_SCORES if self.device.platform == "cpu" else _SCORES
        size = max(1, most // (q.shape[0] * q.shape[2] * k.shape[1]))
        return None if allowed is not None or q.shape[1] <= size else size


def _work(found: tuple[Piece, ...]) -> int:
    """Pairs of queries and keys that are computed; masked ones count `_MASKED` times."""
    return sum((p.stop - p.start) * (stop - start) * (_MASKED if p.masked else 1) for p in found for start, stop in p.spans)


def _short(piece: Run | Piece) -> bool:
    return bool(piece.spans) and piece.stop - piece.start < _SHORT


def _spans(row: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The intervals of True."""
    edges = np.diff(np.pad(row, 1).astype(np.int8))
    return tuple((int(a), int(b)) for a, b in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)))


def _covering(found: tuple[Piece, ...], length: int) -> Iterator[Piece]:
    """The pieces, and between them the dead queries as pieces without spans."""
    stop = 0
    for piece in (*found, Piece(length, length, (), False)):
        if piece.start > stop:
            yield Piece(stop, piece.start, (), False)
        if piece.spans:
            yield piece
        stop = piece.stop


def _slices(spans) -> list[slice]:
    return [slice(start, stop) for start, stop in spans]


def _allowed(mask: BlockMask, masked: bool, rows: slice, keys: slice) -> Bool | None:
    return mask[rows, keys].traced() if masked else None


def _add(total, start: int, x):
    """`total[:, start:start + n] += x`, in place inside a program."""
    old = jax.lax.slice_in_dim(total, start, start + x.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, old + x, start, axis=1)


def _chunks(x, size: int):
    """[b, n, ...] as [chunks, b, size, ...], the last filled with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)


def _join(chunks, length: int):
    """The inverse of `_chunks`."""
    x = chunks.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
