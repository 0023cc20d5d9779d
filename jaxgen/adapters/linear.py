"""The dense layers of any Linen model: finding them, reading and replacing their kernels, and computing them otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["Linear", "contracted_axes", "get_kernel", "layer_features", "linear_layers", "replace_kernel", "rows_of"]

PyTree = Any


class Linear(NamedTuple):
    """A dense layer as a matrix.

    Attributes:
      shape: of its kernel as the model has it: (stacked layers,) inputs, outputs.
      stacked: leading axes of the kernel that a scan over layers added.
      k: inputs.
      n: outputs.
    """

    shape: tuple[int, ...]
    stacked: int
    k: int
    n: int

    @property
    def matrix(self) -> tuple[int, ...]:
        """Shape of the kernel as (a stack of) matrices."""
        return (*self.shape[: self.stacked], self.k, self.n)


def linear_layers(module: nn.Module, variables: PyTree, *args, **kwargs) -> dict[str, Linear]:
    """The `nn.Dense` and `nn.DenseGeneral` layers that `module.apply(variables, *args, **kwargs)` calls, by path.

    Only shapes are computed: arguments may be `jax.ShapeDtypeStruct`s. Layers with batch axes in their kernel are left out.

    Example:
      >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)])
      >>> x = jnp.ones((2, 8))
      >>> linear_layers(model, model.init(jax.random.key(0), x), x)["layers_2"]
      Linear(shape=(16, 3), stacked=0, k=16, n=3)
    """
    found: dict[str, Linear] = {}

    def look(next_fun, args, kwargs, context):
        if (axes := contracted_axes(context)) is not None:
            path, features = "/".join(context.module.path), layer_features(context.module)
            shape = tuple(get_kernel(variables, path).shape)
            k = math.prod(args[0].shape[axis] for axis in axes)
            found[path] = Linear(shape, len(shape) - len(axes) - len(features), k, math.prod(features))
        return next_fun(*args, **kwargs)

    def apply(variables, args, kwargs):
        with nn.intercept_methods(look):
            return module.apply(variables, *args, **kwargs)

    arrays, rest = _split(args, kwargs)
    jax.eval_shape(lambda variables, arrays: apply(variables, *rest(arrays)), variables, arrays)
    return found


def get_kernel(variables: PyTree, path: str) -> Any:
    """The kernel of the layer at `path`.

    Raises:
      ValueError: there is no such layer.
    """
    tree = variables["params"]
    for name in _names(path):
        if name not in tree:
            raise ValueError(f"there is no layer {path}: {name} is not one of {', '.join(tree)}")
        tree = tree[name]
    return tree


def replace_kernel(variables: PyTree, path: str, kernel: Any) -> PyTree:
    """`variables` in which the layer at `path` has another kernel; what is not on the way is shared."""

    def put(tree, names):
        inner = kernel if len(names) == 1 else put(tree[names[0]], names[1:])
        return {**tree, names[0]: inner}

    return put(variables, ("params", *_names(path)))


def _names(path: str) -> tuple[str, ...]:
    """Keys from the parameters to a kernel; the path of a model that is one layer is empty."""
    return (*filter(None, path.split("/")), "kernel")


def contracted_axes(context) -> tuple[int, ...] | None:
    """The axes of its input over which a dense layer that is being called sums; None for anything else."""
    layer = context.module
    if context.method_name != "__call__" or not isinstance(layer, nn.Dense | nn.DenseGeneral) or layer.is_initializing():
        return None
    if isinstance(layer, nn.Dense):
        return (-1,)
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    return None if layer.batch_dims else axes


def rows_of(x, axes: tuple[int, ...]):
    """x [..., k] with the contracted axes flattened into one."""
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    return x.reshape(*x.shape[: -len(axes)], -1)


def layer_features(layer) -> tuple[int, ...]:
    return layer.features if isinstance(layer.features, tuple) else (layer.features,)


def _split(args, kwargs) -> tuple[list, Callable[[list], tuple[tuple, dict]]]:
    """The arrays among arguments, and how to put others in their place."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves]

    def rest(arrays):
        arrays: Iterator = iter(arrays)
        return jax.tree.unflatten(tree, [next(arrays) if a else x for x, a in zip(leaves, is_array)])

    return [x for x, a in zip(leaves, is_array) if a], rest
