"""Who may attend to whom, made from an order. Each function returns a `kernels_pallas.BlockMask`."""

from __future__ import annotations

from jaxgen.orders import Order
from kernels_pallas import BlockMask

__all__ = ["block_causal", "draw"]


def _not_later(q, k):
    return q[0] >= k[0]


def block_causal(order: Order, *, block: tuple[int, int] = (128, 64)) -> BlockMask:
    """Each position sees its own step and all earlier ones (VAR, Tian et al. 2024, fig. 3b).

    With `raster(l)` this is the plain causal mask.
    """
    step = order.step_of[None]
    return BlockMask.build(_not_later, step, step, block)


def draw(mask: BlockMask) -> str:
    """The mask as text, a row a query: `#` allowed, `.` not."""
    return "\n".join("".join("#" if x else "." for x in row) for row in mask.dense())
