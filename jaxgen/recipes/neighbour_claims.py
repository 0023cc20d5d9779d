"""What next-neighbour order saves: calls of the model and time, on images and clips of growing size (S022 NAR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxgen.decoding import Settings
from jaxgen.generators import ImageLlama, NextTokenSampler
from jaxgen.recipe import Recipe
from jaxgen.recipes.claims import Claim, add_times
from jaxgen.recipes.image_llama import ImageLlamaConfig
from jaxgen.recipes.neighbours import NeighbourConfig, in_raster_order

__all__ = ["speed"]


def speed(
    config: NeighbourConfig,
    grids: Sequence[tuple[int, ...]],
    *,
    batches: Sequence[int] = (1, 8),
    log: Callable[[str], None],
) -> Claim:
    """Calls and milliseconds of sampling the tokens of an image or a clip, in next-neighbour and in raster order.

    Args:
      config: of the first; the second has as many blocks. Nothing is trained: what a call costs does not depend on the weights.
      grids: tokens along each axis.
      batches: samples at once.
      log: takes progress lines.
    """
    rows = []
    for grid in grids:
        name = "x".join(map(str, grid))
        log(f"speed: {name} tokens")
        systems = {"S022 NAR, next neighbour": config, "LlamaGen, next token": in_raster_order(config)}
        models = {order: system.build_generator().clone(grid=grid) for order, system in systems.items()}
        found = [{"tokens": name, "system": order, "model calls": model.order.steps} for order, model in models.items()]
        add_times(found, [_untrained(systems[order], model) for order, model in models.items()], batches)
        rows += found
    notes = "Untrained models of equal width and number of blocks; guidance included, decoding to pixels not."
    return Claim("Sampling the tokens of images (rows x columns) and clips (frames x rows x columns)", rows, notes)


def _untrained(config: ImageLlamaConfig, model: ImageLlama) -> tuple[Recipe, dict]:
    """A recipe whose samples are tokens, and parameters for it."""
    sampler = NextTokenSampler(generator=model, tokenizer=None)

    def sample(params, key, labels):
        return {"images": sampler(params, key, labels, Settings(cfg=1.0))[1]}

    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), model.param_shapes())
    return Recipe(config=config, stages=(), sample=sample), {"generator": variables}
