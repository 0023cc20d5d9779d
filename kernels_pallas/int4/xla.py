"""Products with 4-bit weights in XLA: on every device, and the gradient for all implementations.

The weights are made a slice of rows at a time, so that a copy of all of them never exists.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax

from kernels_pallas.device import Device
from kernels_pallas.int4.pack import unpack_words
from kernels_pallas.int4.problem import Problem

__all__ = ["backward", "forward", "refuses"]

# Weights of a slice: 16 MiB in float32.
_SLICE = 1 << 22


def refuses(problem: Problem, device: Device) -> str | None:
    """None: it computes everything."""
    return None


def forward(x, words, scales, *, problem: Problem, device: Device):
    """y [m, n] of x [m, k]; products of x's type, float32 sums.

    In half precision the weights are rounded to x's type, as in the paper's kernel.
    """
    count, rows = _slices(problem)

    def part(i):
        xs = x if count == 1 else lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
        return _dot(xs, _weights(words, scales, i, rows, problem), ((1,), (0,)), problem)

    if count == 1:
        return part(0).astype(x.dtype)
    zeros = jnp.zeros((x.shape[0], _columns(words, problem)), jnp.float32)
    total, _ = lax.scan(lambda total, i: (total + part(i), None), zeros, jnp.arange(count))
    return total.astype(x.dtype)


def backward(dy, words, scales, *, problem: Problem):
    """dx [m, k] of dy [m, n]."""
    count, rows = _slices(problem)

    def part(i):
        return _dot(dy, _weights(words, scales, i, rows, problem), ((1,), (1,)), problem).astype(dy.dtype)

    if count == 1:
        return part(0)
    parts = lax.map(part, jnp.arange(count))
    return jnp.moveaxis(parts, 0, 1).reshape(dy.shape[0], problem.k)


def _slices(problem: Problem) -> tuple[int, int]:
    """(slices, rows of each): as few as keep them small."""
    unit = math.lcm(problem.block, problem.group)
    units = problem.k // unit
    most = max(1, _SLICE // (unit * problem.n))
    per = next(per for per in range(min(most, units), 0, -1) if units % per == 0)
    return units // per, per * unit


def _columns(words, problem: Problem) -> int:
    return words.shape[-1] if problem.layout == "kn" else words.shape[-2]


def _weights(words, scales, i, rows: int, problem: Problem):
    """Rows i * rows .. (i + 1) * rows of w, in the type of the product."""
    cut = functools.partial(lax.dynamic_slice_in_dim, start_index=i * (rows // 8), slice_size=rows // 8)
    if rows == problem.k:
        part = words if problem.layout == "kn" else words.T
    else:
        part = cut(words, axis=0) if problem.layout == "kn" else cut(words, axis=1).T
        scales = lax.dynamic_slice_in_dim(scales, i * (rows // problem.group), rows // problem.group)
    q = unpack_words(part, problem.tile).astype(jnp.float32)
    w = q.reshape(-1, problem.group, q.shape[-1]) * scales.astype(jnp.float32)[:, None]
    return w.reshape(q.shape).astype(problem.dtype)


def _dot(a, b, contracting, problem: Problem):
    precision = lax.Precision.HIGHEST if problem.dtype == "float32" else None
    return lax.dot_general(a, b, (contracting, ((), ())), precision=precision, preferred_element_type=jnp.float32)
