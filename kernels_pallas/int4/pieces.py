"""Numbers as sums of bfloat16, for kernels that multiply nothing else."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["pieces"]

# A bfloat16 has 8 significant bits; float16 has 11 and float32 24.
_COUNT = {"bfloat16": 1, "float16": 2, "float32": 3}


def pieces(x: Float[Array, "m k"]) -> Float[Array, "p m k"]:
    """bfloat16 arrays that add up to x: the first is x rounded, each other the rest.

    Example:
      >>> pieces(jnp.full((1, 1), 1.01, jnp.float32)).astype(jnp.float32).sum()
      Array(1.01, dtype=float32)
    """
    out, rest = [], x.astype(jnp.float32)
    for _ in range(_COUNT[x.dtype.name]):
        out.append(rest.astype(jnp.bfloat16))
        rest = rest - out[-1].astype(jnp.float32)
    return jnp.stack(out)
