"""S022 NAR: next-neighbour prediction, all tokens at one distance from the corner at a time (He et al. 2025, arXiv 2503.10696).

    python scripts/train.py --config configs/nar.py --variant small --workdir runs/nar --set data.path=mnist.npz
    python scripts/sample.py --workdir runs/nar --labels 0,1,2 --num 8 --cfg 1 --out grid.png

n x n tokens take 2n - 1 calls of the model. `--cfg` is constant over the image: the published scales are 1 + cfg.

Variants: `smoke`, `demo` and `small` have the data, sizes and budgets of `configs/llamagen.py`, whose last block goes to the
second head; `paper` is NAR-L (372M) for ImageNet at 256 pixels, `base`, `xl` and `xxl` its siblings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from configs import llamagen
from jaxgen import config as config_lib
from jaxgen.recipe import Recipe
from jaxgen.recipes import claims, neighbour_claims
from jaxgen.recipes.claims import Claim, claim_config
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.neighbours import NeighbourConfig, NeighbourModelConfig, in_raster_order

# LlamaGen's name of each published size; all are for 16 x 16 tokens.
PUBLISHED = {"base": "paper", "paper": "large", "xl": "xl", "xxl": "xxl"}
VARIANTS = ("smoke", "demo", "small", *PUBLISHED)


def get_config(variant: str) -> Recipe:
    """The recipe of a variant.

    Raises:
      ValueError: an unknown variant.
    """
    return build(variant).recipe()


def build(variant: str) -> NeighbourConfig:
    """The configuration of a variant."""
    if variant in PUBLISHED:
        # A block more than LlamaGen's. The authors lower the learning rate to a fifth after 150, 200 and 250 of the 300 epochs,
        # which here stays.
        width, depth, heads, hidden, _ = llamagen.PUBLISHED[PUBLISHED[variant]]
        return from_llama(llamagen.published(width, depth, heads, hidden, 16), blocks=depth + 1)
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = llamagen.build(variant)
    return from_llama(base, blocks=base.model.depth)


def from_llama(base: ImageLlamaConfig, *, blocks: int) -> NeighbourConfig:
    """The same data, tokenizer and training; `blocks` in all, the last of them before the second head alone."""
    model = NeighbourModelConfig(**config_lib.fields_of(base.model) | dict(depth=blocks - 1))
    return NeighbourConfig(**config_lib.fields_of(base) | dict(model=model))


def claim(budget: str = "small", *, seeds: int = 3, edits: Sequence[str] = (), log: Callable[[str], None] = print) -> list[Claim]:
    """S022's claims, measured again: 2n - 1 calls against n^2 at equal size, data and updates, and what that does to speed.

    The baseline is LlamaGen: the same tokenizer and number of blocks, and one head less.

    Args:
      budget: "smoke" (nothing is learnt), or "small" (the digits of `demo`).
      seeds: trainings of each system.
      edits: of the configuration, such as `data.path=...`.
      log: takes progress lines.
    """
    ours, smoke = claim_config(build, budget, edits, small="demo")
    systems = {"S022 NAR, next neighbour": ours, "LlamaGen, next token": in_raster_order(ours)}
    comparison = claims.compare_generators(systems, seeds=seeds, samples=100 if smoke else 1000, log=log)
    grids = ((4, 4), (2, 4, 4)) if smoke else ((8, 8), (16, 16), (4, 8, 8))
    # Heads of a size that two and three coordinates divide.
    model = dataclasses.replace(ours.model, width=24 if smoke else 192, heads=2 if smoke else 4)
    sized = dataclasses.replace(ours, model=model)
    return [comparison, neighbour_claims.speed(sized, grids, batches=(1, 8), log=log)]
