"""JAX's splash attention for TPUs behind the interface of our kernels: padded, scaled, its dead rows and blocks put right.

Its forward pass is the public `make_splash_mha`. Its public gradient takes no gradient of the log-sum-exp, so that the two
functions under it are called with the statistics of ours; jax 0.10.2 to 0.12 have them with the same arguments.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from kernels_pallas.attention.problem import Problem
from kernels_pallas.attention.tpu_blocks import LANES, by_head, padded
from kernels_pallas.block_mask import EMPTY, BlockMask
from kernels_pallas.device import Device

__all__ = ["backward", "forward", "refuses"]

_BLOCK = 512
_MASKED = splash_attention_kernel.DEFAULT_MASK_VALUE
_MAX_HEAD_SIZE = 256


def refuses(problem: Problem, device: Device) -> str | None:
    """Why splash attention cannot compute `problem` on `device`, or None."""
    if device.platform != "tpu":
        return "a kernel for TPUs"
    if problem.head_size > _MAX_HEAD_SIZE:
        return f"head size {problem.head_size} is more than {_MAX_HEAD_SIZE}"
    if not (problem.mask.planned(_blocks(problem.mask, _BLOCK)) != EMPTY).any():
        return "no query sees a key, and splash attention has no empty grid"
    return None


class _Lazy(splash_attention_mask.Mask):
    """A `BlockMask` padded to whole blocks, evaluated where it is looked at."""

    def __init__(self, mask: BlockMask, block: tuple[int, int]):
        self.mask, self.block = mask, block

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(-(-n // size) * size for n, size in zip(self.mask.shape, self.block))

    def __getitem__(self, index) -> np.ndarray:
        q, k = (range(n)[part] for n, part in zip(self.shape, index))
        part = self.mask.pred(self.mask.q_meta[:, index[0], None], self.mask.k_meta[:, None, index[1]])
        return np.pad(np.asarray(part, bool), ((0, len(q) - part.shape[0]), (0, len(k) - part.shape[1])))

    def __eq__(self, other) -> bool:
        return isinstance(other, _Lazy) and (self.mask, self.block) == (other.mask, other.block)

    def __hash__(self) -> int:
        return hash((self.mask, self.block))


def _blocks(mask: BlockMask, size: int) -> tuple[int, int]:
    return tuple(min(size, -(-n // LANES) * LANES) for n in mask.shape)


def _kernel(mask: BlockMask, heads: int, size: int, device: Device):
    """Splash attention's callable, which also holds the plans of its backward passes."""
    block_q, block_k = block = _blocks(mask, size)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([_Lazy(mask, block)] * heads),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=device.interpret,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
    )


def _exact(dtype) -> contextlib.AbstractContextManager:
    """Its products have the precision that JAX is set to: float32 needs the highest, and bfloat16 has no other than its own."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def _live(mask: BlockMask) -> np.ndarray:
    """bool [sq]: queries that see a key."""
    return (mask.planned((1, mask.shape[1])) != EMPTY)[:, 0]


def _prepared(q, k, v, mask, scale, size):
    """q scaled, k and v, [b, h or g, s', d]; splash attention has no scale."""
    block_q, block_k = _blocks(mask, size)
    q = by_head(q)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return padded(q, block_q), padded(by_head(k), block_k), padded(by_head(v), block_k)


def forward(q, k, v, *, mask: BlockMask, scale: float, device: Device, block: int = _BLOCK):
    """As `tpu.forward`, with blocks of `block` queries and keys. q is scaled before it is multiplied, and rounded again."""
    qs, ks, vs = _prepared(q, k, v, mask, scale, block)
    sq = mask.shape[0]
    with _exact(qs.dtype):
        o, (lse,) = jax.vmap(_kernel(mask, q.shape[2], block, device))(qs, ks, vs)
    # A dead row of a live block comes back as the mean of v, one of a dead block as NaN.
    live = jnp.asarray(_live(mask))[:, None]
    o = jnp.where(live[..., None], by_head(o[:, :, :sq]), 0)
    return o.astype(q.dtype), jnp.where(live, jnp.swapaxes(lse[:, :, :sq], 1, 2), -jnp.inf)


def backward(q, k, v, lse, do, delta, *, mask: BlockMask, scale: float, device: Device, block: int = _BLOCK):
    """As `tpu.backward`, by splash attention's passes for dq and for dk and dv."""
    qs, ks, vs = _prepared(q, k, v, mask, scale, block)
    kernel = _kernel(mask, q.shape[2], block, device)
    block_q, block_k = _blocks(mask, block)
    dos = padded(by_head(do.astype(q.dtype)), block_q)
    # Masked scores are very negative there, not -inf: the weights of dead rows vanish for any lse of ordinary size.
    lse, delta = (padded(by_head(x), block_q) for x in (jnp.where(lse == -jnp.inf, 0.0, lse), delta))
    layout = splash_attention_kernel.QKVLayout.HEAD_DIM_MINOR
    how = dict(
        bq=block_q,
        bkv=block_k,
        is_mqa=False,
        mask_value=_MASKED,
        attn_logits_soft_cap=None,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
        mask_function=None,
        interpret=device.interpret,
    )
    over_rows = functools.partial(splash_attention_kernel._splash_attention_bwd_dq, mask_info=kernel.dq_mask_info, **how)
    over_columns = functools.partial(
        splash_attention_kernel._splash_attention_bwd_dkv,
        mask_info=kernel.dkv_mask_info,
        bkv_compute=block_k,
        use_fused_bwd_kernel=False,
        **how,
    )

    def one(q, k, v, lse, do, delta):
        _, dk, dv = over_columns(q, k, v, None, None, lse, do, delta)
        return over_rows(q, k, v, None, None, lse, do, delta), dk, dv

    with _exact(qs.dtype):
        dq, dk, dv = jax.vmap(one)(qs, ks, vs, lse, dos, delta)
    dq = dq.astype(jnp.float32) * scale
    return tuple(by_head(dx[:, :, : x.shape[1]]).astype(x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
