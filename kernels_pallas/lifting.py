"""Making a kernel work under `jax.vmap` and over a mesh: batched axes are folded into its own, and shards run it locally."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from kernels_pallas.device import Device, Partition

__all__ = ["lift"]


def lift(fn: Callable, axes: str, device: Device) -> Callable:
    """`fn` with rules for `vmap` and, where the device has a partition, split over its mesh.

    Args:
      fn: a function of arrays to an array or a tuple of arrays; None arguments are passed on.
      axes: a word an array, arguments and results: "bshd bsgd b -> bshd bsh". In it, `b` is the batch, along which `fn` is
        independent; `h`, `g` and `n` are heads or columns, along which it is too as long as all of them are split alike; other
        letters are anything else. "_" is an argument or a result that is None.
      device: that `fn` was built for.

    Returns:
      A function of the same arguments. Under `vmap` the new axis is folded into `b`; where an array without `b` is batched,
      the calls run one after another.
    """
    words_in, words_out = (part.split() for part in axes.split("->"))

    def call(*args):
        if len(args) != len(words_in):
            raise TypeError(f"{len(args)} arguments for axes {axes!r}")
        live = [i for i, x in enumerate(args) if x is not None]
        words = [words_in[i] for i in live]

        def dense(*arrays):
            full = list(args)
            for i, x in zip(live, arrays):
                full[i] = x
            out = fn(*full)
            out = out if isinstance(out, tuple) else (out,)
            return tuple(x for x, word in zip(out, words_out, strict=True) if word != "_")

        made = [word for word in words_out if word != "_"]
        out = iter(_vmapped(_sharded(dense, words, made, device.partition), words)(*(args[i] for i in live)))
        out = tuple(None if word == "_" else next(out) for word in words_out)
        return out if len(words_out) > 1 else out[0]

    return call


def _vmapped(fn: Callable, words: list[str]) -> Callable:
    wrapped = custom_vmap(fn)

    @wrapped.def_vmap
    def rule(size, batched, *args):
        if any(b and "b" not in word for b, word in zip(batched, words)):
            wide = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(args, batched)]
            out = jax.lax.map(lambda xs: wrapped(*xs), tuple(wide))
            return out, (True,) * len(out)
        folded = []
        for x, b, word in zip(args, batched, words):
            if "b" in word:
                x = x if b else jnp.broadcast_to(x, (size, *x.shape))
                x = x.reshape(-1, *x.shape[2:])
            folded.append(x)
        out = wrapped(*folded)
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in out), (True,) * len(out)

    return wrapped


def _sharded(fn: Callable, words_in: list[str], words_out: list[str], partition: Partition | None) -> Callable:
    if partition is None:
        return fn

    def call(*args):
        manual = set(jax.sharding.get_abstract_mesh().manual_axes)
        spread = {
            "batch": _dividing(partition, partition.batch, manual, [(x, w, "b") for x, w in zip(args, words_in)]),
            "heads": _dividing(partition, partition.heads, manual, [(x, w, "hgn") for x, w in zip(args, words_in)]),
        }
        if not any(spread.values()):
            return fn(*args)

        def spec(word):
            where = {"b": spread["batch"], **dict.fromkeys("hgn", spread["heads"])}
            return P(*(where.get(letter) or None for letter in word))

        in_specs, out_specs = tuple(spec(w) for w in words_in), tuple(spec(w) for w in words_out)
        # Kernels say nothing about how their outputs vary over the mesh, so that check is off.
        return jax.shard_map(fn, mesh=partition.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)

    return call


def _dividing(partition: Partition, names: tuple[str, ...], manual: set[str], arrays) -> tuple[str, ...]:
    """The axes of `names`, not yet manual, whose product divides every axis that they would split."""
    names = tuple(name for name in names if name not in manual)
    ways = math.prod(partition.mesh.shape[name] for name in names)
    sizes = [x.shape[i] for x, word, letters in arrays for i, letter in enumerate(word) if letter in letters]
    return names if all(size % ways == 0 for size in sizes) else ()
