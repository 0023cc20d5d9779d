"""4-bit weights: rounding to groups that share a scale, and the words that kernels read."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.device import current_device

__all__ = [
    "LAYOUTS",
    "PackedInt4",
    "group_scales",
    "nearest",
    "nests",
    "pack_int4",
    "pack_values",
    "relayout",
    "unpack_int4",
    "unpack_words",
]

LAYOUTS = ("kn", "nk")
LOW, HIGH = -8, 7
# Rows of "nk" words come in multiples of what one warpgroup multiplies at a time.
ROW_MULTIPLE = 64
_TILES = (64, 32, 16, 8, 4, 2)
# Shares of the largest weight that are tried as the end of the range, where errors are to be least.
_CLIPS = tuple(1 - i / 32 for i in range(20))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "scales"], meta_fields=["k", "n", "group", "tile", "layout"]
)
@dataclasses.dataclass(frozen=True)
class PackedInt4:
    """A matrix [k, n] of integers q in -8..7, eight a word, and a scale for every `group` rows of a column: w = scale q.

    It is a pytree: stacked layers are one with a leading axis on both arrays, for `lax.scan` and `vmap`.

    The nibble at bit 4 j + 16 h of word i of a block B of 4 `tile` rows holds q + 8 of row

        4 tile B + tile j + 2 i + h,    j in 0..3, i in 0..tile/2 - 1, h in 0..1

    so that one shift and one mask of a word leave two neighbouring rows in its halves, where two bfloat16 fit, and a tile of
    words gives tiles of consecutive rows. What differs between the layouts is the order of the axes: TPUs want columns on
    lanes, a Hopper warpgroup wants rows of a column side by side.

    Attributes:
      words: int32, [..., k / 8, n] ("kn") or [..., n', k / 8] ("nk").
      scales: [..., k / group, n] ("kn") or [..., k / group, n'] ("nk"), float32, bfloat16 or float16.
      k: rows.
      n: columns; n' is the next multiple of 64, filled with zeros.
      group: rows that share a scale.
      tile: see above.
      layout: "kn" or "nk".
    """

    words: Int[Array, "*l a b"]
    scales: Float[Array, "*l c n"]
    k: int
    n: int
    group: int
    tile: int
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes that a product with it reads."""
        return sum(x.size * x.dtype.itemsize for x in (self.words, self.scales))


def pack_int4(
    w: Float[Array, "*l k n"], group: int = 128, *, scale_dtype=jnp.bfloat16, clip: str = "mse", layout: str | None = None
) -> PackedInt4:
    """`w` rounded to the nearest of 16 values a group.

    Args:
      w: weights, [k, n], or a stack of such.
      group: rows of a column that share a scale; a multiple of 8 that divides k.
      scale_dtype: of the scales; integers are rounded with the scale as it is stored.
      clip: "max" gives the largest weight of a group the value 7; "mse" tries ends of the range down to 13/32 of that, and
        keeps the one with the least squared error.
      layout: what the words are for: "kn" TPUs, "nk" Hopper GPUs; XLA reads both. None is that of the current device (or
        `target`).

    Raises:
      ValueError: a w that is no floating [..., k, n], a group that does not fit k, or an unknown option.

    Example:
      >>> packed = pack_int4(jnp.ones((256, 3)), group=128)
      >>> packed.words.shape, packed.scales.shape
      ((32, 3), (2, 3))
    """
    if w.ndim < 2 or 0 in w.shape or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be floating [..., k, n] with no empty axis, not {w.dtype} {w.shape}")
    _check_group(w.shape[-2], group)
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    scales = group_scales(w, group, clip=clip, dtype=scale_dtype)
    return pack_values(nearest(w, scales), scales, layout=layout)


@functools.partial(jax.jit, static_argnames=("group", "clip", "dtype"))
def group_scales(w: Float[Array, "*l k n"], group: int, *, clip: str = "mse", dtype=jnp.float32) -> Float[Array, "*l c n"]:
    """A positive scale for every `group` rows of a column of `w`; see `pack_int4`."""
    if clip not in ("max", "mse"):
        raise ValueError(f"clip={clip!r} is not one of max, mse")
    if jnp.dtype(dtype).name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"scale_dtype={jnp.dtype(dtype).name} is not one of float32, bfloat16, float16")
    parts = w.astype(jnp.float32).reshape(*w.shape[:-2], -1, group, w.shape[-1])
    full = jnp.abs(parts).max(axis=-2) / HIGH

    def scaled(share):
        # A group of zeros may have any scale; the smallest normal number keeps one of float16 from becoming 0.
        return jnp.maximum(full * share, float(jnp.finfo(dtype).tiny)).astype(dtype)

    def better(carry, share):
        best, least = carry
        scales = scaled(share)
        wide = scales.astype(jnp.float32)[..., None, :]
        error = jnp.square(jnp.clip(jnp.round(parts / wide), LOW, HIGH) * wide - parts).sum(axis=-2)
        return (jnp.where(error < least, scales, best), jnp.minimum(error, least)), None

    if clip == "max":
        return scaled(1.0)
    (best, _), _ = jax.lax.scan(better, (scaled(1.0), jnp.full(full.shape, jnp.inf)), jnp.array(_CLIPS))
    return best


@jax.jit
def nearest(w: Float[Array, "*l k n"], scales: Float[Array, "*l c n"]) -> Int[Array, "*l k n"]:
    """The integers, int8, with which `scales` give the values nearest to `w`."""
    parts = w.astype(jnp.float32).reshape(*scales.shape[:-1], -1, w.shape[-1])
    q = jnp.clip(jnp.round(parts / scales.astype(jnp.float32)[..., None, :]), LOW, HIGH)
    return q.astype(jnp.int8).reshape(w.shape)


def pack_values(q: Int[Array, "*l k n"], scales: Float[Array, "*l c n"], *, layout: str | None = None) -> PackedInt4:
    """Integers in -8..7 and their scales, as words.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    *lead, k, n = q.shape
    if scales.ndim != q.ndim or scales.shape[:-2] != tuple(lead) or scales.shape[-1] != n or k % scales.shape[-2]:
        raise ValueError(f"q {q.shape} and scales {scales.shape} must be [..., k, n] and [..., k / group, n]")
    group = k // scales.shape[-2]
    _check_group(k, group)
    tile = _tile(k, group)
    packed = PackedInt4(_words(q, tile), scales, k, n, group, tile, "kn")
    return relayout(packed, layout or ("nk" if current_device().platform == "gpu" else "kn"))


@functools.partial(jax.jit, static_argnames="tile")
def _words(q, tile: int):
    *lead, k, n = q.shape
    u = (q.astype(jnp.int32) + 8).astype(jnp.uint32).reshape(*lead, k // (4 * tile), 4, tile // 2, 2, n)
    words = (u << _bits().astype(jnp.uint32)).sum(axis=(-4, -2), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words.reshape(*lead, k // 8, n), jnp.int32)


def relayout(packed: PackedInt4, layout: str) -> PackedInt4:
    """The same weights for another device; moves all words, so do it once.

    Raises:
      ValueError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == packed.layout:
        return packed
    words, scales = jnp.swapaxes(packed.words, -1, -2), packed.scales
    if layout == "nk":
        extra = -packed.n % ROW_MULTIPLE
        none = [(0, 0)] * (words.ndim - 2)
        words, scales = jnp.pad(words, [*none, (0, extra), (0, 0)]), jnp.pad(scales, [*none, (0, 0), (0, extra)])
    else:
        words, scales = words[..., : packed.n], scales[..., : packed.n]
    return dataclasses.replace(packed, words=words, scales=scales, layout=layout)


def unpack_int4(packed: PackedInt4) -> Int[Array, "*l k n"]:
    """The integers, int8; times the scales, each repeated `group` times, they are the weights."""
    packed = relayout(packed, "kn")
    return unpack_words(packed.words, packed.tile).astype(jnp.int8)


@functools.partial(jax.jit, static_argnames="tile")
def unpack_words(words: Int[Array, "*l w n"], tile: int) -> Int[Array, "*l k n"]:
    """int32 values of "kn" words."""
    *lead, w, n = words.shape
    parts = words.reshape(*lead, -1, 1, tile // 2, 1, n)
    return (((parts >> _bits()) & 15) - 8).reshape(*lead, 8 * w, n)


def _bits() -> Int[Array, "4 1 2 1"]:
    """Where the nibble of [tile j, word, half h, column] lies in its word."""
    return (4 * jnp.arange(4)[:, None] + 16 * jnp.arange(2))[:, None, :, None]


def _check_group(k: int, group: int) -> None:
    if not isinstance(group, int) or group < 8 or group % 8 or k % group:
        raise ValueError(f"group={group!r} must be a multiple of 8 that divides the {k} rows of w")


def _tile(k: int, group: int) -> int:
    """The largest tile whose blocks fill k, and which groups are made of."""
    fits = [tile for tile in _TILES if k % (4 * tile) == 0]
    return next((tile for tile in fits if nests(group, tile)), fits[0])


def nests(group: int, tile: int) -> bool:
    """Whether blocks of 4 `tile` rows are made of whole groups, or groups of whole blocks, in whole tiles."""
    return group % tile == 0 and math.gcd(group, 4 * tile) in (group, 4 * tile)
