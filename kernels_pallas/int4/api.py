"""Products with 4-bit weights: checks, the choice of an implementation, and the gradient.

Implementations are modules with

    refuses(problem, device) -> str | None
    forward(x, words, scales, *, problem, device) -> y

where x [m, k] has `problem.dtype`, words and scales are those of `PackedInt4`, and y [m, n'] has n' columns of the words'
layout. Sizes m and n' are those of the arrays, not of the problem: a shard has fewer.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from jaxtyping import Array, Float

from kernels_pallas.device import Device
from kernels_pallas.dispatch import Implementation, choose
from kernels_pallas.int4 import xla
from kernels_pallas.int4.pack import PackedInt4
from kernels_pallas.int4.problem import Problem

__all__ = ["IMPLEMENTATIONS", "int4_matmul"]

IMPLEMENTATIONS = (
    Implementation("tpu", "kernels_pallas.int4.tpu", ("tpu",), opaque=True),
    Implementation("hopper", "kernels_pallas.int4.hopper", ("gpu",), opaque=True),
    Implementation("xla", "kernels_pallas.int4.xla"),
)
_AXES = {"kn": "bk wn cn -> bn", "nk": "bk nw cn -> bn"}


def int4_matmul(x: Float[Array, "*m k"], w: PackedInt4, implementation: str | None = None) -> Float[Array, "*m n"]:
    """x w with 4-bit weights, which are never written out in full: few rows cost what reading a quarter of the bytes costs.

    Sums are float32. Differentiable in x, by XLA on every device; the weights are frozen, the gradient stops there, and with
    respect to the scales it is zero. Under `vmap` a batch of x is more rows of one product.

    Args:
      x: float32, bfloat16 or float16.
      w: of `pack_int4`.
      implementation: "tpu", "hopper" or "xla"; None takes the first that can. Kernels take the words in their own layout
        only: see `pack_int4`.

    Returns:
      y of x's type.

    Raises:
      ValueError: an x of another type or width, weights with leading axes (`vmap` or `scan` over those), or an implementation
        that does not exist or cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from kernels_pallas.int4 import pack_int4
      >>> w = pack_int4(jnp.full((16, 3), 0.5), group=8)
      >>> int4_matmul(jnp.ones((2, 16)), w).shape
      (2, 3)
    """
    problem = _problem(x, w)
    picked, device = choose("int4_matmul", IMPLEMENTATIONS, problem, implementation)
    y = _multiply(_Call(problem, device, picked), x.reshape(problem.m, problem.k), w.words, w.scales)
    return y[:, : w.n].reshape(*x.shape[:-1], w.n)


def _problem(x, w) -> Problem:
    if not isinstance(w, PackedInt4):
        raise ValueError(f"w must be a PackedInt4 (see pack_int4), not {type(w).__name__}")
    if w.words.ndim != 2 or w.scales.ndim != 2:
        raise ValueError(f"w has leading axes, words {w.words.shape}: use vmap or scan over them")
    if x.ndim < 1 or 0 in x.shape or x.shape[-1] != w.k:
        raise ValueError(f"x {x.shape} must be [..., k] with the k={w.k} of w [{w.k}, {w.n}]")
    if x.dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"x must be float32, bfloat16 or float16, not {x.dtype}")
    m = math.prod(x.shape[:-1])
    return Problem(m, w.k, w.n, w.group, w.tile, w.layout, x.dtype.name, w.scales.dtype.name)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    problem: Problem
    device: Device
    implementation: Implementation

    def forward(self, x, words, scales):
        """The picked implementation's, lifted where XLA does not see through it."""
        fn = self.implementation.function("forward", _AXES[self.problem.layout], self.device, problem=self.problem)
        return fn(x, words, scales)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(call: _Call, x, words, scales):
    return call.forward(x, words, scales)


def _multiply_forward(call, x, words, scales):
    return call.forward(x, words, scales), (words, scales)


def _multiply_backward(call, residuals, dy):
    return xla.backward(dy, *residuals, problem=call.problem), None, None


_multiply.defvjp(_multiply_forward, _multiply_backward)
