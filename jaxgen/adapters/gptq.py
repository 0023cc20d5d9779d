"""GPTQ: rounding a layer's weights one input at a time, the rest making up for each error (Frantar et al. 2022, 2210.17323)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.int4 import group_scales

__all__ = ["gptq"]

_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnames=("group", "clip", "scale_dtype"))
def gptq(
    w: Float[Array, "*l k n"],
    hessian: Float[Array, "*l k k"],
    group: int = 128,
    *,
    damp: float = 0.01,
    clip: str = "mse",
    scale_dtype=jnp.bfloat16,
) -> tuple[Int[Array, "*l k n"], Float[Array, "*l c n"]]:
    """Integers and scales that keep x w, for the x that the Hessian was collected from, rather than w.

    Row i of w (input i) is rounded to q_i; the rows j > i, still free, move by

        w_j -= U_ij (w_i - q_i) / U_ii,    U^T U = H^-1 with U upper triangular

    which is the least-squares answer to that error (their eq. 2 in the Cholesky form of section 3.3). Scales of a group are
    chosen when its first row is reached. An input that was never seen has weight 0.

    Args:
      w: [k, n], or a stack of layers with a Hessian each.
      hessian: x^T x over calibration data; any factor.
      group: rows that share a scale.
      damp: share of the Hessian's mean diagonal that is added to it.
      clip: see `pack_int4`.
      scale_dtype: of the scales.

    Returns:
      (q int8 [k, n], scales [k / group, n]), for `pack_values`.

    Raises:
      ValueError: shapes that do not fit.
    """
    if w.ndim < 2 or hessian.shape != (*w.shape[:-1], w.shape[-2]):
        raise ValueError(f"w {w.shape} and hessian {hessian.shape} must be [..., k, n] and [..., k, k]")
    if group < 1 or w.shape[-2] % group:
        raise ValueError(f"group={group} does not divide the {w.shape[-2]} rows of w {w.shape}")
    one = functools.partial(_layer, group=group, damp=damp, clip=clip, scale_dtype=scale_dtype)
    for _ in range(w.ndim - 2):
        one = jax.vmap(one)
    return one(w, hessian)


def _layer(w, hessian, *, group, damp, clip, scale_dtype):
    k, n = w.shape
    w, hessian = w.astype(jnp.float32), hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    unseen = diagonal == 0
    w = jnp.where(unseen[:, None], 0.0, w)
    hessian = hessian + jnp.diag(jnp.where(unseen, 1.0, damp * diagonal.mean()))
    factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
    upper = jnp.linalg.cholesky(jax.scipy.linalg.cho_solve(factor, jnp.eye(k))).T
    columns = jnp.arange(k)

    def one_group(w, start):
        """Rounds the rows of a group; only then are the rows after it moved, all at once (their section 3.3, step 2)."""
        rows = lax.dynamic_slice(w, (start, 0), (group, n))
        above = lax.dynamic_slice(upper, (start, 0), (group, k))
        inside = lax.dynamic_slice(above, (0, start), (group, group))
        scales = group_scales(rows, group, clip=clip, dtype=scale_dtype)
        wide = scales[0].astype(jnp.float32)

        def one_row(rows, i):
            row = rows[i]
            q = jnp.clip(jnp.round(row / wide), -8, 7)
            error = (row - q * wide) / inside[i, i]
            later = jnp.where(jnp.arange(group) > i, inside[i], 0.0)
            return rows - later[:, None] * error, (q.astype(jnp.int8), error)

        _, (q, errors) = lax.scan(one_row, rows, jnp.arange(group))
        later = jnp.where(columns >= start + group, above, 0.0)
        return w - _dot(later.T, errors), (q, scales[0])

    _, (q, scales) = lax.scan(one_group, w, jnp.arange(0, k, group))
    return q.reshape(k, n), scales
