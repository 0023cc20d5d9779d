"""Next-scale prediction by one network of many depths (S090 VARiant, Chen et al. 2025)."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.step import View
from jaxgen.generators.next_scale import NextScaleTransformer

__all__ = ["SupernetTransformer", "equidistant"]


class SupernetTransformer(NextScaleTransformer):
    """`NextScaleTransformer` whose late scales run through some of its blocks (arXiv:2511.16546, section 3).

    The first `bridge` scales, which lay out the picture, pass all blocks; later ones pass `subnet` of them, equidistant, with the
    weights of the full network. `generator.clone(subnet=d)` is the same network at another depth: it takes the same parameters,
    and is another module, so that each depth is compiled once and keeps its program when others are used.

    Sampling drops the keys and values of the other blocks as soon as the last full scale is done.

    Attributes:
      depths: the depths that are trained besides the full one, increasing, each from 2 to depth - 1.
      bridge: scales of the full network, at least one and not all.
      subnet: blocks of later scales, one of `depths`; 0 is all.

    Raises:
      ValueError: depths or a bridge out of range, a depth that is not one of the supernet's, or scanned blocks.

    Example:
      >>> model = SupernetTransformer(
      ...     vocab=64, num_classes=10, patch_nums=(1, 2, 4), width=64, heads=2, depth=6, depths=(2, 3), bridge=2
      ... )
      >>> params = model.init(key, labels, features)                        # labels [b], features [b, 20, c]
      >>> logits = model.clone(subnet=3).apply(params, labels, features)    # [b, 21, 64]
    """

    depths: tuple[int, ...] = (2, 4, 8)
    bridge: int = 6
    subnet: int = 0

    def __post_init__(self):
        if not self.depths or list(self.depths) != sorted({d for d in self.depths if 2 <= d < self.depth}):
            raise ValueError(f"depths={self.depths}: expected increasing numbers, from 2 to depth - 1 = {self.depth - 1}")
        if not 1 <= self.bridge < len(self.patch_nums):
            raise ValueError(f"bridge={self.bridge}: expected 1 to {len(self.patch_nums) - 1} of {len(self.patch_nums)} scales")
        if self.subnet not in (0, *self.depths):
            raise ValueError(f"subnet={self.subnet} is not in the supernet, which has depths={self.depths} and 0 for all blocks")
        if self.scan_layers:
            raise ValueError("scan_layers=True: the blocks of a supernet run one by one")
        super().__post_init__()

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The blocks of the late scales; None is all."""
        return equidistant(self.depth, self.subnet) if self.subnet else None

    def run(self, x: Float[Array, "b q d"], cond, cache: KVCache | None = None, view: View | None = None, *, train: bool = False):
        """(x, cache) after the blocks, of all scales or, with a cache, of the view's."""
        if cache is None:
            return self.transformer(x, cond, layers=self.layers, prefix=self.order.ends[self.bridge - 1], train=train)
        if self.layers is None or view.time < self.bridge:
            return self.transformer(x, cond, cache, view.mask)
        if view.time == self.bridge:
            cache = cache.narrow(self.layers, self.order.length)
        return self.transformer(x, cond, cache, view.mask, layers=self.layers)

    def init_cache(self, batch: int) -> KVCache:
        """An empty cache; with a subnet, of the full network's scales, which the first late one exchanges for its own."""
        if not self.subnet:
            return super().init_cache(batch)
        return self.empty_cache(batch, self.order.ends[self.bridge - 1])


def equidistant(depth: int, count: int) -> tuple[int, ...]:
    """`count` of `depth` blocks, the first and the last among them: floor(i (depth - 1) / (count - 1)), i = 0 .. count - 1.

    Raises:
      ValueError: fewer than 2, or more than there are.

    Example:
      >>> equidistant(30, 4)
      (0, 9, 19, 29)
    """
    if not 2 <= count <= depth:
        raise ValueError(f"count={count}: expected 2 to depth={depth}")
    return tuple(i * (depth - 1) // (count - 1) for i in range(count))
