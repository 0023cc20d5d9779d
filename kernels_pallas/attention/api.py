"""Block-sparse attention: checks its arguments, picks a backend, and gives it a gradient."""

from __future__ import annotations

import functools
import math
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.attention.problem import Problem
from kernels_pallas.block_mask import BlockMask
from kernels_pallas.device import Device
from kernels_pallas.dispatch import Implementation, choose

__all__ = ["IMPLEMENTATIONS", "block_sparse_attention"]

OP = "block_sparse_attention"
_HERE = "kernels_pallas.attention"
IMPLEMENTATIONS = (
    Implementation("hopper", f"{_HERE}.hopper", ("gpu",), opaque=True),
    Implementation("tpu", f"{_HERE}.tpu", ("tpu",), opaque=True),
    Implementation("splash", f"{_HERE}.splash", ("tpu",), opaque=True),
    Implementation("cudnn", f"{_HERE}.cudnn", ("gpu",), opaque=True),
    Implementation("split", f"{_HERE}.split"),
    Implementation("xla", f"{_HERE}.xla"),
)
_DTYPES = ("float32", "bfloat16", "float16")


def block_sparse_attention(
    q: Float[Array, "b q h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: BlockMask,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b q h d"] | tuple[Float[Array, "b q h d"], Float[Array, "b q h"]]:
    """softmax(scale q k^T) v over the keys that `mask` allows, without work on blocks in which it allows none.

    The softmax and all sums are float32. A query that may see no key gives 0. Differentiable in q, k and v (reverse mode),
    also through the log-sum-exp; runs under `jit`, `vmap`, `scan`, `remat` and `shard_map`.

    Args:
      q: queries; float32, bfloat16 or float16.
      k: keys of the same dtype; g divides h, and query head i reads key head i // (h // g).
      v: values.
      mask: who may attend to whom, of shape (q, s); static.
      scale: of the products; None is d ** -0.5; static.
      return_lse: return also the natural logarithm of every query's sum of exponentials (see `merge`).
      implementation: "hopper" (Mosaic kernel for sm_90), "tpu" (Mosaic kernel) or "splash" (JAX's), "cudnn" (GPUs),
        "split" (dense products a run of equal rows) or "xla" (loops over live blocks; always works). None picks the
        first that can; `kernels_pallas.explain` says which and why.

    Returns:
      o in the dtype of q; with `return_lse` (o, lse), lse float32, -inf for queries that see no key.

    Raises:
      ValueError: shapes, dtypes, a mask or a scale that do not fit, an unknown implementation, or one that cannot run here.

    Example:
      >>> causal = lambda q, k: q[0] >= k[0]
      >>> mask = BlockMask.build(causal, [range(4)], [range(4)])
      >>> x = jnp.ones((1, 4, 2, 8))
      >>> block_sparse_attention(x, x, x, mask).shape
      (1, 4, 2, 8)
    """
    scale = _check(q, k, v, mask, scale)
    problem = Problem.of(q, k, mask, scale)
    chosen, device = choose(OP, IMPLEMENTATIONS, problem, implementation)
    o, lse = _attention(q, k, v, mask, scale, chosen, device)
    return (o, lse) if return_lse else o


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attention(q, k, v, mask: BlockMask, scale: float, chosen: Implementation, device: Device):
    return chosen.function("forward", "bshd btgd btgd -> bshd bsh", device, mask=mask, scale=scale)(q, k, v)


def _forward(q, k, v, mask, scale, chosen, device):
    o, lse = _attention(q, k, v, mask, scale, chosen, device)
    return (o, lse), (q, k, v, o, lse)


def _backward(mask, scale, chosen, device, residuals, cotangents):
    q, k, v, o, lse = residuals
    do, dlse = cotangents
    # With p = softmax(s): ds = p (do v^T - do . o) from the output and p dlse from the log-sum-exp. A query without keys has
    # no gradient, whatever a caller's arithmetic with -inf made of dlse.
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    axes = "bshd btgd btgd bsh bshd bsh -> bshd btgd btgd"
    return chosen.function("backward", axes, device, mask=mask, scale=scale)(q, k, v, lse, do, delta)


_attention.defvjp(_forward, _backward)


def _check(q, k, v, mask, scale) -> float:
    """The scale as a number, if everything fits."""
    for name, x, dims in (("q", q, "b, sq, h, d"), ("k", k, "b, sk, g, d"), ("v", v, "b, sk, g, d")):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be [{dims}] with no empty axis, not {x.shape}")
        if str(x.dtype) not in _DTYPES:
            raise ValueError(f"{name} must be {', '.join(_DTYPES)}, not {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"k {k.shape} and v {v.shape} must have one shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in batch and head size")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q {q.shape} has {q.shape[2]} heads, which the {k.shape[2]} heads of k {k.shape} do not divide")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} must have one dtype")
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask must be a BlockMask, not {type(mask).__name__}")
    if mask.shape != (q.shape[1], k.shape[1]):
        raise ValueError(f"mask {mask} does not fit q {q.shape} and k {k.shape}")
    if scale is None:
        return q.shape[3] ** -0.5
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, known when the function is traced; not {scale!r}")
    return float(scale)
