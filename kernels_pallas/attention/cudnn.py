"""Block-sparse attention through cuDNN's fused kernels, for NVIDIA GPUs in half precision.

A mask that splits (see `split`) runs without any mask, a call an interval; a plain causal one uses cuDNN's own causal kernel;
others pass a dense mask, which skips nothing, where the mask is dense enough for that to pay.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention import xla
from kernels_pallas.attention.problem import Problem
from kernels_pallas.attention.split import composed_backward, composed_forward, pieces
from kernels_pallas.block_mask import EMPTY, BlockMask
from kernels_pallas.device import Device

__all__ = ["backward", "forward", "refuses"]

_DTYPES = ("bfloat16", "float16")
# cuDNN's backward pass wants 64 queries and keys; shorter pieces cost nothing as plain products.
_SHORTEST = 64
# Without a split, all blocks are computed: worth it while XLA's loops, whose scores pass through memory, would do at least this
# share of them. From byte counts, not from a measurement.
_LEAST_LIVE = 0.125
# Pairs of a dense mask: 512 MiB as the half-precision bias that cuDNN reads.
_MOST_PAIRS = 1 << 28


def refuses(problem: Problem, device: Device) -> str | None:
    """Anything but half precision on an NVIDIA GPU from Ampere on, and masks that cuDNN would waste its work on."""
    if device.platform != "gpu":
        return "cuDNN is for NVIDIA GPUs"
    if device.interpret:
        return "cuDNN has no interpreter"
    if device.capability and float(device.capability) < 8:
        return f"cuDNN's fused attention needs compute capability 8.0, not {device.capability}"
    if problem.dtype not in _DTYPES:
        return f"cuDNN takes {' and '.join(_DTYPES)}, not {problem.dtype}"
    largest = 256 if device.hopper else 128
    if problem.head_size % 8 or problem.head_size > largest:
        return f"cuDNN takes head sizes that 8 divides up to {largest}, not {problem.head_size}"
    reason = _pattern(problem.mask)
    return None if reason in ("split", "causal", "dense") else reason


def forward(q, k, v, *, mask: BlockMask, scale: float, device: Device):
    """o [b, sq, h, d] in the dtype of q and lse float32 [b, sq, h]; dead rows give 0 and -inf."""
    pattern = _pattern(mask)
    if pattern == "split":
        return composed_forward(_Fused(scale), q, k, v, mask)
    o, lse = _forward_call(q, k, v, _bias(mask, q.dtype) if pattern == "dense" else None, scale, pattern == "causal")
    dead = _dead(mask)
    if dead.any():
        o = jnp.where(dead[:, None, None], 0, o)
        lse = jnp.where(dead[:, None], -jnp.inf, lse)
    return o, lse


def backward(q, k, v, lse, do, delta, *, mask: BlockMask, scale: float, device: Device):
    """dq, dk, dv in the input dtypes."""
    pattern = _pattern(mask)
    if pattern == "split":
        return composed_backward(_Fused(scale), q, k, v, lse, do, delta, mask)
    do, o = _output_with(do, delta)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    bias = _bias(mask, q.dtype) if pattern == "dense" else None
    return _backward_call(q, k, v, lse, o, do, bias, scale, pattern == "causal")


class _Fused(NamedTuple):
    """What `composed_forward` and `composed_backward` run on every piece."""

    scale: float

    def forward(self, q, k, v, allowed):
        if not self._takes(q, k, allowed):
            return xla.dense_forward(q, k, v, allowed, self.scale)
        return _forward_call(q, k, v, None, self.scale, False)

    def backward(self, q, k, v, lse, do, delta, allowed):
        if not self._takes(q, k, allowed):
            return xla.dense_backward(q, k, v, lse, do, delta, allowed, self.scale)
        do, o = _output_with(do, delta)
        return _backward_call(q, k, v, lse, o, do, None, self.scale, False)

    def _takes(self, q, k, allowed) -> bool:
        return allowed is None and min(q.shape[1], k.shape[1]) >= _SHORTEST


@functools.lru_cache(maxsize=256)
def _pattern(mask: BlockMask) -> str:
    """ "split", "causal" or "dense"; or why it is none of them."""
    split = pieces(mask)
    if not isinstance(split, str):
        return "split"
    if _is_causal(mask):
        return "causal"
    (sq, sk), live = mask.shape, float((mask.planned((512, 512)) != EMPTY).mean())
    if sq % 2 or sk % 2:
        return f"{split}, and cuDNN takes a dense mask for even lengths only"
    if live < _LEAST_LIVE:
        return f"{split}, and only {live:.2f} of its blocks are live: a dense mask would compute them all"
    if sq * sk > _MOST_PAIRS:
        return f"{split}, and a dense mask of {sq} x {sk} is too large"
    return "dense"


def _is_causal(mask: BlockMask) -> bool:
    """Whether query i sees keys 0 to i: row by row, a stripe at a time."""
    sq, sk = mask.shape
    if sq != sk:
        return False
    keys = np.arange(sk)
    step = max(1, (1 << 24) // sk)
    for start in range(0, sq, step):
        rows = slice(start, min(start + step, sq))
        if not np.array_equal(mask[rows, :].dense(), keys <= np.arange(rows.start, rows.stop)[:, None]):
            return False
    return True


def _dead(mask: BlockMask) -> np.ndarray:
    """bool [sq]: queries that see no key."""
    return mask.planned((1, mask.shape[1]))[:, 0] == EMPTY


def _bias(mask: BlockMask, dtype):
    """0 or a number that survives no softmax; cuDNN subtracts such numbers, so they are finite (as in `jax.nn`)."""
    return jnp.where(mask.traced(), 0, -(2.0**41 if dtype == jnp.bfloat16 else 2.0**15)).astype(dtype)[None, None]


def _output_with(do, delta):
    """(do, o) such that do . o = delta, for a kernel that computes delta from them.

    cuDNN's backward pass takes the output, only to form do . o. Along do, o = delta do / |do|^2 is the shortest that serves, so
    its rounding weighs no more than the true output's, and it brings in the gradient of the log-sum-exp, which cuDNN ignores.
    Where do is too small for such a quotient to be a number of this dtype, its first element is raised: by less than
    2^-60 |delta| in bfloat16, 2^-14 |delta| in float16.
    """
    bound = 2.0**60 if do.dtype == jnp.bfloat16 else 2.0**14
    small = jnp.max(jnp.abs(do.astype(jnp.float32)), axis=-1) * bound < jnp.abs(delta)
    first = jnp.where(small, (jnp.abs(delta) / bound).astype(do.dtype), do[..., 0])
    do = do.at[..., 0].set(first)
    wide = do.astype(jnp.float32)
    top = jnp.max(jnp.abs(wide), axis=-1)
    top = jnp.where(top == 0, 1.0, top)
    unit = wide / top[..., None]
    o = unit * (delta / top / jnp.maximum(jnp.sum(unit * unit, axis=-1), 0.5))[..., None]
    return do, o.astype(do.dtype)


# `jax.nn.dot_product_attention` rounds the log-sum-exp to half precision and drops its gradient, so the calls below it are
# used: those that its own gradient is made of.


def _forward_call(q, k, v, bias, scale: float, causal: bool):
    """o in the dtype of q, lse float32 [b, sq, h]."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    arrays, params = _operands(cudnn, q, k, v, bias, scale, causal)
    o, lse = cudnn._dot_product_attention_fwd_p_wrapper.bind(*arrays, **params, is_training=True)
    return o, lse.transpose(0, 2, 1)


def _backward_call(q, k, v, lse, o, do, bias, scale: float, causal: bool):
    """dq, dk, dv in the dtype of q."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    arrays, params = _operands(cudnn, q, k, v, bias, scale, causal)
    return tuple(cudnn._dot_product_attention_bwd_p_wrapper.bind(*arrays, lse.transpose(0, 2, 1), o, do, **params))


def _operands(cudnn, q, k, v, bias, scale: float, causal: bool):
    unused = jnp.zeros(0, q.dtype)
    params = {
        "scale": scale,
        "seed": 42,
        "dropout_rate": 0.0,
        "variadic_args": (bias is not None, False),
        "mask_type": cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    if "score_mod" in inspect.signature(cudnn.dot_product_attention).parameters:  # jax 0.12
        params["score_mod"] = None
    return (q, k, v, unused if bias is None else bias, *[unused] * 6), params
