"""4-bit weights for the dense layers of any Linen model, without a change in its code (S137 MARLIN).

layers = linear_layers(model, variables, x)
packed = quantise(variables, layers, where=lambda path: "blocks" in path)
y = apply_int4(model)(packed, x)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxgen.adapters.gptq import gptq
from jaxgen.adapters.linear import Linear, contracted_axes, get_kernel, layer_features, replace_kernel, rows_of
from kernels_pallas.int4 import PackedInt4, int4_matmul, pack_int4, pack_values, unpack_int4

__all__ = [
    "Int4Module",
    "apply_int4",
    "dequantise",
    "int4_layers",
    "kernel_bytes",
    "quantise",
    "unstack_layers",
    "with_hessians",
]

PyTree = Any


def quantise(
    variables: PyTree,
    layers: Mapping[str, Linear],
    *,
    where: Callable[[str], bool] | None = None,
    group: int = 128,
    method: str = "rtn",
    hessians: Mapping[str, Array] | None = None,
    damp: float = 0.01,
    clip: str = "mse",
    scale_dtype=jnp.bfloat16,
    layout: str | None = None,
) -> PyTree:
    """`variables` with 4-bit kernels (`PackedInt4`), for `apply_int4`.

    Args:
      variables: of the model; nothing else in them changes.
      layers: of `linear_layers`.
      where: which layers, by path; None is all.
      group: inputs that share a scale; in a layer of k inputs it is the largest common divisor of k and this.
      method: "rtn" rounds to the nearest value, "gptq" makes up for each rounding error with the weights that come after it.
      hessians: x^T x of every layer by path, for "gptq"; see `with_hessians`.
      damp: see `gptq`.
      clip: see `pack_int4`.
      scale_dtype: of the scales.
      layout: see `pack_int4`.

    Raises:
      ValueError: an unknown method, layers that `where` leaves none of, a layer whose group would be less than 8 inputs, or
        a missing Hessian.
    """
    if method not in ("rtn", "gptq"):
        raise ValueError(f"method={method!r} is not one of rtn, gptq")
    chosen = [path for path in layers if where is None or where(path)]
    if not chosen:
        raise ValueError(f"where picks none of the {len(layers)} layers {', '.join(layers)}")
    missing = [path for path in chosen if method == "gptq" and path not in (hessians or {})]
    if missing:
        raise ValueError(f"method='gptq' needs hessians of {', '.join(missing)}")
    for path in chosen:
        layer = layers[path]
        size = math.gcd(layer.k, group)
        if size < 8:
            raise ValueError(f"layer {path} has {layer.k} inputs: group={group} leaves {size} to a scale; exclude it by where")
        w = get_kernel(variables, path).reshape(layer.matrix)
        if method == "rtn":
            packed = pack_int4(w, size, clip=clip, scale_dtype=scale_dtype, layout=layout)
        else:
            q, scales = gptq(w, hessians[path], size, damp=damp, clip=clip, scale_dtype=scale_dtype)
            packed = pack_values(q, scales, layout=layout)
        variables = replace_kernel(variables, path, packed)
    return variables


def dequantise(variables: PyTree, layers: Mapping[str, Linear]) -> PyTree:
    """`variables` with the float32 kernels that the 4-bit ones stand for."""
    for path, layer in layers.items():
        packed = get_kernel(variables, path)
        if isinstance(packed, PackedInt4):
            scales = jnp.repeat(packed.scales[..., : packed.n].astype(jnp.float32), packed.group, axis=-2)
            variables = replace_kernel(variables, path, (unpack_int4(packed) * scales).reshape(layer.shape))
    return variables


@dataclasses.dataclass(frozen=True)
class Int4Module:
    """A Linen module that takes variables of `quantise`; everything else of the module is there, too.

    Samplers that call `generator.apply` take it in the generator's place. Layers whose kernels are not packed are computed
    as ever, so float variables work as well.

    Attributes:
      module: the model.
      implementation: see `int4_matmul`.
    """

    module: nn.Module
    implementation: str | None = None

    def apply(self, variables: PyTree, *args, **kwargs):
        """`module.apply`, with packed layers computed by `int4_matmul`."""
        with int4_layers(self.implementation):
            return self.module.apply(variables, *args, **kwargs)

    __call__ = apply

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)


@contextlib.contextmanager
def int4_layers(implementation: str | None = None) -> Iterator[None]:
    """While modules are traced inside, dense layers whose kernels are packed are computed by `int4_matmul`.

    Args:
      implementation: see `int4_matmul`.
    """

    def multiply(next_fun, args, kwargs, context):
        axes = contracted_axes(context)
        kernel = None if axes is None else context.module.get_variable("params", "kernel")
        if not isinstance(kernel, PackedInt4):
            return next_fun(*args, **kwargs)
        layer, x = context.module, args[0]
        x = x.astype(layer.dtype or jnp.promote_types(x.dtype, layer.param_dtype))
        y = int4_matmul(rows_of(x, axes), kernel, implementation)
        y = y.reshape(*y.shape[:-1], *layer_features(layer))
        return y + layer.get_variable("params", "bias").astype(y.dtype) if layer.use_bias else y

    with nn.intercept_methods(multiply):
        yield


def apply_int4(module: nn.Module, implementation: str | None = None) -> Int4Module:
    """`apply(variables, ...)` of `module` for variables of `quantise`."""
    return Int4Module(module, implementation)


def with_hessians(module: nn.Module, fn: Callable, layers: Mapping[str, Linear]) -> Callable:
    """`fn`, returning also x^T x of the inputs x of every layer.

    Args:
      module: whose layers are watched, by whom `fn` calls `apply` (other modules may be called too).
      fn: any traceable function.
      layers: of `linear_layers`; what is not called gets zeros.

    Returns:
      A function to (what `fn` returns, {path: float32 [k, k]}).

    Raises:
      ValueError: layers that are scanned, whose inputs do not leave the scan: unroll the model (`unstack_layers`).
    """
    scanned = [path for path, layer in layers.items() if layer.stacked]
    if scanned:
        raise ValueError(f"layers {', '.join(scanned)} are scanned: unstack_layers(variables) and a module that unrolls them")

    def watched(*args, **kwargs):
        sums = {path: jnp.zeros((layer.k, layer.k)) for path, layer in layers.items()}

        def watch(next_fun, args, kwargs, context):
            axes, path = contracted_axes(context), "/".join(context.module.path)
            if axes is not None and path in sums and isinstance(_root(context.module), type(module)):
                x = rows_of(args[0], axes).reshape(-1, layers[path].k).astype(jnp.float32)
                sums[path] = sums[path] + jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(watch):
            out = fn(*args, **kwargs)
        return out, sums

    return watched


def unstack_layers(variables: PyTree, name: str = "blocks") -> PyTree:
    """Variables of the unrolled model (`name_0`, `name_1`, ...) from those of the scanned one (`name`); else as they are."""
    if not isinstance(variables, Mapping):
        return variables
    out = {}
    for key, value in variables.items():
        if key == name:
            for i in range(jax.tree.leaves(value)[0].shape[0]):
                out[f"{name}_{i}"] = jax.tree.map(lambda x, i=i: x[i], value)
        else:
            out[key] = unstack_layers(value, name)
    return out


def kernel_bytes(variables: PyTree, dtype=jnp.bfloat16) -> dict[str, int]:
    """Bytes of weights that one pass over the model reads, if everything that is not packed has `dtype`.

    Returns:
      {"packed": words and scales, "rest": all other parameters, "total": both}.
    """
    leaves = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, PackedInt4))
    packed = sum(x.nbytes for x in leaves if isinstance(x, PackedInt4))
    rest = sum(x.size for x in leaves if not isinstance(x, PackedInt4)) * jnp.dtype(dtype).itemsize
    return {"packed": packed, "rest": rest, "total": packed + rest}


def _root(module: nn.Module) -> nn.Module:
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return module
