"""The Axial Transformer as a recipe (S162): a next-token system whose attention runs along one axis at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import config as config_lib
from jaxgen import masks
from jaxgen.benchmark import measure
from jaxgen.generators import AxialSampler, AxialTransformer, NextTokenTransformer
from jaxgen.orders import raster
from jaxgen.recipes import claims
from jaxgen.recipes.claims import Claim
from jaxgen.recipes.pixel_tokens import PixelConfig

__all__ = ["AxialConfig", "compare_axial", "costs_by_size", "dependences", "plain"]


@dataclasses.dataclass(frozen=True)
class AxialConfig(PixelConfig):
    """`PixelConfig` with an axial transformer.

    Attributes:
      outer: pairs of blocks of the outer decoder; the other blocks of `model.depth` are the inner one's.

    Raises:
      ValueError: no pair, or no block besides, or see `PixelConfig`.
    """

    outer: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.outer < 1 or self.model.depth <= 2 * self.outer:
            raise ValueError(
                f"outer={self.outer}, model.depth={self.model.depth}: expected at least one pair of blocks, and a block besides"
            )

    def build_generator(self) -> AxialTransformer:
        """The generator module."""
        fields = self._generator_fields() | dict(depth=self.model.depth - 2 * self.outer, outer=self.outer)
        del fields["length"]
        grid = self.build_tokenizer().grid if self.levels else self.tokenizer.patch_nums * 2
        return AxialTransformer(grid=grid, **fields)

    def build_sampler(self) -> AxialSampler:
        """From key and labels to images."""
        return AxialSampler(generator=self.build_generator(), tokenizer=self.build_tokenizer())


def plain(config: AxialConfig) -> PixelConfig:
    """The next-token system with full attention on the same tokens, with as many blocks and the same training."""
    return PixelConfig(**config_lib.fields_of(config, PixelConfig))


def compare_axial(config: AxialConfig, *, seeds: int, samples: int, log: Callable[[str], None]) -> Claim:
    """Likelihood, quality and speed against full attention; see `compare_generators`."""

    def columns(recipe, params) -> dict:
        row = {"test nats a token": round(claims.test_nats(recipe, params), 4)}
        model = recipe.config.build_generator()
        return row | ({"model calls": f"{model.length} + {model.grid[0]}"} if isinstance(model, AxialTransformer) else {})

    systems = {"S162 Axial Transformer": config, "baseline, full attention": plain(config)}
    title = "Axial against full attention at equal depth, data and training budget"
    claim = claims.compare_generators(systems, seeds=seeds, samples=samples, log=log, columns=columns, title=title)
    return claim._replace(notes=f"{claim.notes} Calls of the inner decoder, and of the outer one, which is called once a row.")


def dependences(config: AxialConfig, *, samples: int = 4) -> Claim:
    """Which tokens move which laws, of models with random weights: all earlier ones, if nothing is left out, and no later ones.

    Args:
      config: whose generators are tried, with larger weights than training starts from so that every path is seen.
      samples: token grids that each token is changed in.
    """
    rows = []
    for name, one in {"S162 Axial Transformer": config, "baseline, full attention": plain(config)}.items():
        model, n = one.build_generator(), one.build_tokenizer().order.length
        tokens = np.random.default_rng(0).integers(0, model.vocab, (samples, n)).astype(np.int32)
        labels = np.zeros(samples, np.int32)
        params = _random(jax.eval_shape(model.init, jax.random.key(0), labels, tokens))
        # One program for all, so that what does not depend on a token is the same to the last bit.
        laws = jax.jit(model.apply)
        base, moves = np.asarray(laws(params, labels, tokens)), []
        for place in range(n):
            changed = tokens.copy()
            changed[:, place] = (changed[:, place] + 1) % model.vocab
            moves.append(np.abs(laws(params, labels, changed) - base).max((0, 2)))
        moves, earlier = np.stack(moves), np.arange(n)[:, None] < np.arange(n)  # [changed, law]
        row = {"system": name, "tokens": n, "earlier tokens that move a law": f"{(moves[earlier] > 0).sum()} of {earlier.sum()}"}
        rows.append(row | {"other tokens that do": f"{(moves[~earlier] > 0).sum()} of {(~earlier).sum()}"})
    notes = "A law of all earlier tokens and no others, at every place, is an exact autoregressive factorisation."
    return Claim("Pairs of a token and a law that depends on it", rows, notes)


def _random(shapes):
    """Parameters of these shapes of which none is 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), shapes)


def costs_by_size(config: AxialConfig, sides: Sequence[int]) -> Claim:
    """Attention and time of one forward pass over grids of several sizes, for which nothing is trained.

    Args:
      config: whose generators are run.
      sides: tokens along a side of each grid.
    """
    rows = []
    for side in sides:
        row = {"tokens": side**2}
        for name, model in _sized(config, side).items():
            labels, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((1, side**2), jnp.int32)
            params = _random(jax.eval_shape(model.init, jax.random.key(0), labels, tokens))
            seconds = measure(jax.jit(model.apply), params, labels, tokens)["seconds"]
            row[f"{name}: attended a token"] = round(_pairs(model) / side**2, 1)
            row[f"{name}: us a token"] = round(1e6 * seconds / side**2, 2)
        rows.append(row)
    notes = "Attended: keys that a token meets in all blocks together, as sqrt(l) where attention is axial, as l if not."
    return Claim("Cost of a forward pass by the size of the grid", rows, notes)


def _sized(config: AxialConfig, side: int) -> dict[str, AxialTransformer | NextTokenTransformer]:
    axial, full = config.build_generator(), plain(config).build_generator()
    return {"axial": axial.clone(grid=(side, side)), "full attention": full.clone(length=side**2)}


def _pairs(model: AxialTransformer | NextTokenTransformer) -> int:
    """Queries times the keys that they see, in all blocks."""

    def causal(length: int) -> int:
        return int(masks.block_causal(raster(length)).dense().sum())

    if isinstance(model, NextTokenTransformer):
        return model.depth * causal(model.length)
    rows, columns = model.grid
    return model.outer * (rows * columns**2 + columns * causal(rows)) + model.depth * rows * causal(columns)
