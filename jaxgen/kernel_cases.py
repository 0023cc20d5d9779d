"""Problems that the kernels are compiled, measured and tuned on: shapes, work and traffic, by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import masks
from jaxgen.orders import Order, scales
from kernels_pallas import (
    BlockMask,
    block_sparse_attention,
    decode_attention,
    gated_delta,
    int4_matmul,
    linear_attention,
    pack_int4,
    tree_attention,
)

__all__ = ["Case", "LIMITS", "attention_mask", "compiled", "measured"]

# (FLOP/s in bf16, bytes/s) of a device's data sheet.
LIMITS = {"h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12), "v5e": (197e12, 0.82e12), "v5p": (459e12, 2.77e12)}
# VAR at 256, 512 and 1024 pixels (Tian et al. 2024; the last as in HART and Infinity).
PATCH_NUMS = {
    85: (1, 2, 4, 8),
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
BACKWARD = 2.5  # five products to recompute scores and make three gradients, where the forward pass has two


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
      name: op/problem[/backward].
      fn: of arrays; takes `implementation` by keyword.
      shapes: arguments, a pytree of `jax.ShapeDtypeStruct`.
      flops: that the problem needs (allowed elements only).
      executed: that whole live blocks of 128 x 64 cost; the same where nothing is blocked.
      bytes: that must cross the memory bus: arguments and results once.
      backward: also the gradients, to all float arguments.
      mask: of attention.
      bucket: dtype, head_size, length and density, for `kernels_pallas.tuning`.
      prepare: random arguments to such as the op takes: decays below 1, keys of unit length.
    """

    name: str
    fn: Callable
    shapes: tuple
    flops: float
    executed: float
    bytes: float
    backward: bool = False
    mask: BlockMask | None = None
    bucket: dict = dataclasses.field(default_factory=dict)
    prepare: Callable = lambda *args: args

    @property
    def op(self) -> str:
        """The first part of the name."""
        return self.name.split("/")[0]

    @property
    def kind(self) -> str:
        """Of attention its mask ("var", "hmar", "diffusion"), of linear ones the recurrence ("retention", "gla", "delta")."""
        return self.name.split("/")[1].split("-")[0]

    def build(self, **options) -> tuple[Callable, tuple]:
        """(function of the arguments, their shapes)."""
        return self.differentiated(functools.partial(self.fn, **options)), self.shapes

    def differentiated(self, fn: Callable) -> Callable:
        """With `backward` the gradients of the sum of the squared results, else `fn`."""
        return _gradients(fn) if self.backward else fn

    def inputs(self, seed: int = 0) -> tuple:
        """Random arguments: normal floats, as `prepare` leaves them, and integers as the case needs them."""
        leaves, tree = jax.tree.flatten(self.shapes)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        args = jax.tree.unflatten(tree, [_random(key, x) for key, x in zip(keys, leaves)])
        return jax.jit(self.prepare)(*args)


def _random(key, x):
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
    if x.dtype == jnp.bool_:
        return jnp.tril(jnp.ones(x.shape, bool))
    return jax.random.bits(key, x.shape, jnp.uint32).astype(x.dtype)


def _gradients(fn):
    def loss(floats, rest, where):
        floats, rest = iter(floats), iter(rest)
        args = [next(floats) if is_float else next(rest) for is_float in where]
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(fn(*args)))

    def gradients(*args):
        where = tuple(all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(arg)) for arg in args)
        floats = [x for x, is_float in zip(args, where) if is_float]
        return jax.grad(loss)(floats, [x for x, is_float in zip(args, where) if not is_float], where)

    return gradients


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def attention_mask(kind: str, length: int) -> BlockMask:
    """ "var" (block-causal over scales), "hmar" (block-diagonal), or "diffusion" ([noisy, clean] in blocks of 16)."""
    if kind == "diffusion":
        return masks.block_diffusion(Order(((16,),) * (length // 32)))
    order = scales(PATCH_NUMS[length])
    return {"var": masks.block_causal, "hmar": masks.block_diagonal}[kind](order)


def _attention(kind: str, length: int, batch: int, heads: int, head_size: int, backward: bool) -> Case:
    mask = attention_mask(kind, length)
    full = 4.0 * batch * heads * length * length * head_size
    q = _array(batch, length, heads, head_size)

    def fn(q, k, v, implementation=None):
        return block_sparse_attention(q, k, v, mask, implementation=implementation)

    times = 1 + BACKWARD if backward else 1
    name = f"attention/{kind}-{length}-b{batch}-h{heads}-d{head_size}"
    bucket = {"dtype": "bfloat16", "head_size": head_size, "length": length, "density": mask.element_density}
    arrays = 4 + 4 * backward  # q, k, v, o; and for gradients do, dq, dk, dv
    shares = times * full * np.array([mask.element_density, mask.density])
    return Case(name + "/backward" * backward, fn, (q, q, q), *shares, arrays * _size(q), backward, mask, bucket)


def _linear(op: str, batch: int, length: int, heads: int, size: int, backward: bool) -> Case:
    x, gate = _array(batch, length, heads, size), _array(batch, length, heads, dtype=jnp.float32)
    shapes = {
        "retention": (x, x, x, gate),
        "gla": (x, x, x, _array(batch, length, heads, size, dtype=jnp.float32)),
        "delta": (x, x, x, gate, gate),
    }[op]

    def prepare(q, k, v, log_decay, *beta):
        if op == "delta":
            k = k / jnp.linalg.norm(k.astype(jnp.float32), axis=-1, keepdims=True).astype(k.dtype)
        return q, k, v, -jax.nn.softplus(log_decay), *map(jax.nn.sigmoid, beta)

    def fn(*args, implementation=None):
        return (gated_delta if op == "delta" else linear_attention)(*args, implementation=implementation)[0]

    chunk = 64
    products = (4 * size + 4 * chunk) * (1.5 if op == "delta" else 1)
    flops = batch * length * heads * size * products * (1 + BACKWARD if backward else 1)
    traffic = (_size(shapes) + _size(x)) * (2 if backward else 1)
    name = f"{'delta' if op == 'delta' else 'linear'}/{op}-b{batch}-t{length}-h{heads}-d{size}"
    bucket = {"dtype": "bfloat16", "head_size": size, "length": length, "density": 1.0}
    return Case(name + "/backward" * backward, fn, shapes, flops, flops, traffic, backward, prepare=prepare, bucket=bucket)


def _decode(batch: int, length: int, heads: int, kv_heads: int, size: int, tree: int = 0) -> Case:
    cache = _array(batch, length, kv_heads, size)
    lengths = jnp.full((batch,), length, jnp.int32)
    if tree:
        node = _array(batch, tree, kv_heads, size)
        shapes = (_array(batch, tree, heads, size), cache, cache, node, node, _array(tree, tree, dtype=jnp.bool_))

        def fn(q, k, v, k_tree, v_tree, ancestors, implementation=None):
            return tree_attention(q, k, v, lengths, k_tree, v_tree, ancestors, implementation=implementation)
    else:
        shapes = (_array(batch, heads, size), cache, cache)

        def fn(q, k, v, implementation=None):
            return decode_attention(q, k, v, lengths, implementation=implementation)

    flops = 4.0 * batch * heads * max(tree, 1) * (length + tree) * size
    name = f"decode/{f'tree{tree}-' if tree else ''}b{batch}-s{length}-h{heads}-g{kv_heads}-d{size}"
    bucket = {"dtype": "bfloat16", "head_size": size, "length": length, "density": 1.0}
    return Case(name, fn, shapes, flops, flops, _size(shapes) + _size(shapes[0]), bucket=bucket)


def _int4(rows: int, k: int, n: int) -> Case:
    packed = jax.eval_shape(lambda w: pack_int4(w, group=128), _array(k, n, dtype=jnp.float32))
    shapes = (_array(rows, k), packed)

    def fn(x, w, implementation=None):
        return int4_matmul(x, w, implementation=implementation)

    flops = 2.0 * rows * k * n
    bucket = {"dtype": "bfloat16", "head_size": n, "length": rows, "density": 1.0}
    return Case(f"int4/m{rows}-k{k}-n{n}", fn, shapes, flops, flops, _size(shapes) + rows * n * 2, bucket=bucket)


def _in_float32(case: Case) -> Case:
    """The case with float32 for bfloat16, which CPUs have no products for."""

    def wider(x):
        return jax.ShapeDtypeStruct(x.shape, jnp.float32) if x.dtype == jnp.bfloat16 else x

    shapes = jax.tree.map(wider, case.shapes)
    return dataclasses.replace(case, shapes=shapes, bytes=case.bytes * _size(shapes) / _size(case.shapes))


def compiled() -> list[Case]:
    """What `scripts/compile_kernels.py` compiles: published sizes, forward and backward of every op."""
    attention = [("var", 2240, 8, 30, 64), ("var", 9451, 1, 16, 128), ("hmar", 2240, 8, 30, 64), ("diffusion", 8192, 4, 16, 128)]
    cases = [_attention(*sizes, backward=True) for sizes in attention]
    cases += [_linear(op, 4, 4096, 64, 128, backward=True) for op in ("retention", "gla", "delta")]
    cases += [_decode(32, 4096, 32, 8, 128), _decode(8, 4096, 32, 8, 128, tree=64)]
    return cases + [_int4(16, 8192, 8192), _int4(256, 8192, 8192)]


def measured(size: str) -> list[Case]:
    """What `scripts/benchmark.py kernels` times.

    Args:
      size: "full" for accelerators, the sizes of the limits' table; "small" for CPUs.

    Raises:
      ValueError: another size.
    """
    both = (False, True)
    if size == "full":
        attention = [(kind, n, *rest) for n, *rest in ((2240, 8, 30, 64), (9451, 1, 16, 128)) for kind in ("var", "hmar")]
        cases = [_attention(*case, backward) for case in [*attention, ("diffusion", 8192, 4, 16, 128)] for backward in both]
        cases += [_linear(op, 4, 4096, 64, 128, backward) for op in ("retention", "gla", "delta") for backward in both]
        cases += [_decode(32, 4096, 32, 8, 128), _decode(8, 4096, 32, 8, 128, tree=64)]
        return cases + [_int4(rows, 8192, 8192) for rows in (1, 16, 32, 64, 256)]
    if size == "small":
        attention = [("var", 680, 2, 8, 64), ("hmar", 680, 2, 8, 64), ("diffusion", 1024, 2, 8, 64)]
        cases = [_attention(*case, backward) for case in attention for backward in both]
        cases += [_linear(op, 1, 1024, 8, 64, backward) for op in ("retention", "gla", "delta") for backward in both]
        cases += [_decode(4, 1024, 8, 2, 64), _decode(2, 1024, 8, 2, 64, tree=16)]
        return [_in_float32(case) for case in cases + [_int4(rows, 1024, 1024) for rows in (1, 16)]]
    raise ValueError(f"size={size!r} is not one of full, small")
