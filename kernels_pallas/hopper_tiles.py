"""What kernels on Hopper share: tiles in shared memory that wgmma reads, and their products."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["accumulate", "pad_length", "product", "transforms"]


def transforms(columns: int) -> tuple:
    """The layout in which wgmma reads 16-bit tiles: rows of eight, swizzled over 128 bytes, or 64 where those do not divide."""
    span = 64 if columns % 64 == 0 else 32
    return plgpu.TilingTransform((8, span)), plgpu.SwizzleTransform(2 * span)


def pad_length(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[b, l, ...] with zeros after l up to a multiple of 8, the rows of a layout tile.

    The copy engine does the rest: what a tile reads past the end is zero, what it writes there is dropped.
    """
    return tuple(jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8)) + ((0, 0),) * (x.ndim - 2)) for x in arrays)


def product(a, b, *, issued: Callable[[], None] | None = None) -> jax.Array:
    """float32 a @ b of two tiles in shared memory.

    Args:
      a: [m, k] reference.
      b: [k, n] reference; `ref.T` is free.
      issued: called when the product is under way, before it is waited for.
    """

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b)
        if issued is not None:
            issued()
        return accumulator[...]  # waits for all products of this warpgroup, so that a and b may be overwritten

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def accumulate(accumulators: tuple[jax.Array, ...], body: Callable[[Callable], None], stage=None) -> tuple[jax.Array, ...]:
    """Adds products of tiles in registers and tiles in shared memory to `accumulators`, in place.

    Args:
      accumulators: float32 [m, n] each.
      body: `body(add)`, where `add(i, a, b)` starts `accumulators[i] += a @ b`, a [m, k] a value, b [k, n] a reference. It
        returns at once, so what `body` computes next overlaps. All are waited for at the end; only then may b be overwritten.
      stage: [m, k] shared memory, or None. Pallas's interpreter needs it: it takes neither a value as first operand nor
        accumulators that outlive a product.
    """
    if stage is None:

        def run(refs):
            body(lambda i, a, b: plgpu.wgmma(refs[i], a, b))

        return pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in accumulators))
    sums = list(accumulators)

    def add(i, a, b):
        stage[...] = a
        plgpu.commit_smem()
        sums[i] += product(stage, b)

    body(add)
    return tuple(sums)
