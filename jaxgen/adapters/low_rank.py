"""Low-rank adapters for the dense layers of any Linen model, switched on for some positions only (Hu et al. 2022).

layers = linear_layers(model, variables, x)
adapters = init_low_rank(key, layers, rank=8)
with low_rank_layers(adapters, gate):
    y = model.apply(variables, x)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from jaxgen.adapters.linear import Linear, contracted_axes, layer_features, rows_of
from jaxgen.nn.placement import place_rows

__all__ = ["init_low_rank", "low_rank_layers"]


def init_low_rank(
    key: Key[Array, ""], layers: Mapping[str, Linear], *, rank: int, where: Callable[[str], bool] | None = None
) -> dict[str, dict[str, Array]]:
    """{path: {"a": [k, r], "b": [r, n]}}; b is 0, so that nothing changes before training.

    Args:
      key: of a.
      layers: of `jaxgen.adapters.linear_layers`.
      rank: r.
      where: which layers, by path; None is all.

    Raises:
      ValueError: a rank below 1, no layers, or scanned ones.
    """
    chosen = {path: layer for path, layer in layers.items() if where is None or where(path)}
    if rank < 1 or not chosen:
        raise ValueError(f"rank={rank} must be at least 1, and where has to pick some of {', '.join(layers)}")
    scanned = [path for path, layer in chosen.items() if layer.stacked]
    if scanned:
        raise ValueError(f"layers {', '.join(scanned)} are scanned: adapters take unrolled ones")
    keys = jax.random.split(key, len(chosen))
    return {
        path: {"a": jax.random.normal(k, (layer.k, rank)) / math.sqrt(layer.k), "b": jnp.zeros((rank, layer.n))}
        for k, (path, layer) in zip(keys, chosen.items())
    }


@contextlib.contextmanager
def low_rank_layers(
    adapters: Mapping[str, Mapping[str, Array]], gate: Bool[Array, "b l"] | None = None, *, scale: float = 1.0
) -> Iterator[None]:
    """While modules are traced inside, dense layers compute y = W x + scale gate (x a) b; where the gate is off y is W x exactly.

    Args:
      adapters: of `init_low_rank`, by path.
      gate: which positions; None is all.
      scale: of what is added, often alpha / r.
    """

    def add(next_fun, args, kwargs, context):
        y, axes = next_fun(*args, **kwargs), contracted_axes(context)
        adapter = None if axes is None else adapters.get("/".join(context.module.path))
        if adapter is None:
            return y
        x = rows_of(args[0], axes)
        more = place_rows(x @ adapter["a"].astype(x.dtype))
        more = scale * place_rows(more @ adapter["b"].astype(x.dtype))
        if gate is not None:
            more = jnp.where(gate[..., None], more, 0)
        return y + more.reshape(*more.shape[:-1], *layer_features(context.module)).astype(y.dtype)

    with nn.intercept_methods(add):
        yield
