"""Attention of a few rows to a cache by cuDNN, for the GPUs that have no kernel here.

The rows that share a kv head are given to it as queries of one head, so that the cache is read once.
"""

from __future__ import annotations

import jax.numpy as jnp

# `jax.nn.dot_product_attention` rounds the log-sum-exp to the dtype of q, which merging and gradients cannot do with.
from jax._src.cudnn import fused_attention_stablehlo as fused

from kernels_pallas.decode.problem import Problem
from kernels_pallas.device import Device

__all__ = ["forward", "refuses"]


def refuses(problem: Problem, device: Device) -> str | None:
    """Why cuDNN cannot compute `problem` on `device`, or None."""
    if device.interpret:
        return "cuDNN cannot be interpreted"
    if problem.dtype not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {problem.dtype}"
    # Ampere is the first with fused attention; of a `target` without a capability nothing is known.
    major = int(device.capability.partition(".")[0] or 8)
    if major < 8:
        return f"cuDNN's fused attention needs compute capability 8.0, this is {device.capability}"
    most = 256 if major >= 9 else 128
    if problem.head_size % 8 or problem.head_size > most:
        return f"head size {problem.head_size} is not a multiple of 8 up to {most}"
    try:
        fused.check_cudnn_version()
    except RuntimeError as error:
        return f"JAX has no cuDNN here: {error}"
    return None


def forward(q, k_cache, v_cache, lengths, *, problem: Problem, device: Device):
    """Attention of rows to the first `lengths` positions.

    Args:
      q: [b, g, n, d].
      k_cache: [b, s, g, d]; finite, also past the lengths.
      v_cache: [b, s, g, d]; finite, also past the lengths.
      lengths: int32 [b] in 0..s.
      problem: static facts; `batch` is not used.
      device: not used.

    Returns:
      (o float32 [b, g, n, d], lse float32 [b, g, n]).
    """
    o, lse = fused.dot_product_attention(
        q.swapaxes(1, 2),
        k_cache,
        v_cache,
        q_seqlen=jnp.full_like(lengths, q.shape[2]),
        # What cuDNN returns for no keys at all is undefined; such sequences are given one, and dropped below.
        kv_seqlen=jnp.maximum(lengths, 1),
        scale=problem.scale,
        mask_type=fused.MaskType.PADDING,
        return_residual=True,
    )
    dead = (lengths == 0)[:, None, None]
    return jnp.where(dead[..., None], 0.0, o.swapaxes(1, 2).astype(jnp.float32)), jnp.where(dead, -jnp.inf, lse)
