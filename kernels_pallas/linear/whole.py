"""One block of linear attention whose tokens all see each other: what it writes is added to the state before it reads.

No [c, c] array exists. The functions are those of `chunk`, where the factors are not used.
"""

from __future__ import annotations

from kernels_pallas.linear.chunk import Array, Cotangents, product

__all__ = ["advance", "backward", "forward"]


def advance(k: Array, v: Array, f: None, m: Array) -> Array:
    """The transposed state [dv, dk] after the block, of k [c, dk], v [c, dv] and the state before."""
    del f
    return m + product(v, k, 0, 0)


def forward(q: Array, k: Array, v: Array, f: None, m: Array) -> tuple[Array, Array]:
    """Outputs [c, dv] in float32 and `advance`."""
    m = advance(k, v, f, m)
    return product(q, m, 1, 1), m


def backward(q: Array, k: Array, v: Array, f: None, m: Array, o_bar: Array, m_bar: Array) -> Cotangents:
    """Cotangents of the inputs of `forward`, given those of the outputs [c, dv] and of the state after the block [dv, dk]."""
    m = advance(k, v, f, m)
    m_bar = m_bar + product(o_bar, q, 0, 0)
    return Cotangents(q=product(o_bar, m), k=product(v, m_bar), v=product(k, m_bar, 1, 1), log_decay=None, m=m_bar)
