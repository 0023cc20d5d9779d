"""The nearest neighbours of features in a database: exact search, by inner products of unit vectors. Nothing here imports Flax.

    index = build_index(features)                                 # [n, c]
    similarity, ids = nearest(index, queries, 4)                  # [b, c] -> [b, 4], best first

An index is a pytree: it goes into compiled functions as an argument, so that a database can be swapped for another one. Those of
at most as many `chunk`s share one compilation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Index", "build_index", "check_index", "empty_index", "nearest"]


class Index(NamedTuple):
    """A database.

    Attributes:
      features: unit vectors, padded with rows of 0.
      labels: of each row; -1 on the padding, and where nothing is known.
      count: rows that are not padding.
    """

    features: Float[Array, "n c"]
    labels: Int[Array, "n"]
    count: Int[Array, ""]


def build_index(features: Float[np.ndarray, "m c"], labels: Int[np.ndarray, "m"] | None = None, *, chunk: int = 1024) -> Index:
    """A database of features, which are made unit vectors.

    Args:
      features: one row an entry.
      labels: >= 0; None is nothing known.
      chunk: the number of rows is rounded up to a multiple of this.

    Raises:
      ValueError: no features, features that are not finite numbers, a chunk < 1, or another number of labels.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not features.size:
        raise ValueError(f"features {features.shape}: an index needs at least one row of numbers")
    if not np.isfinite(features).all():
        raise ValueError(f"features {features.shape}: not all are finite")
    labels = np.full(len(features), -1) if labels is None else np.asarray(labels)
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels {labels.shape}: expected one for each of {len(features)} features")
    spare = _spare(len(features), chunk)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return Index(
        jnp.asarray(np.pad(unit, ((0, spare), (0, 0)))),
        jnp.asarray(np.pad(labels.astype(np.int32), (0, spare), constant_values=-1)),
        jnp.int32(len(features)),
    )


def empty_index(count: int, width: int, *, chunk: int = 1024) -> Index:
    """What `build_index` makes of features [count, width], in shape; traceable."""
    rows = count + _spare(count, chunk)
    return Index(jnp.zeros((rows, width)), jnp.full(rows, -1, jnp.int32), jnp.int32(count))


def _spare(count: int, chunk: int) -> int:
    """Rows of padding."""
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    return -count % chunk


def check_index(index: Index, k: int, width: int) -> None:
    """That an index can be asked for k neighbours of features with `width` numbers; not traceable.

    Raises:
      ValueError: k < 1, fewer entries than k, or features of another width.
    """
    count = int(index.count)
    if not 1 <= k <= count:
        raise ValueError(f"k={k} neighbours of a database of {count} entries: expected 1..{count}")
    if index.features.shape[1] != width:
        raise ValueError(f"a database of {index.features.shape[1]} numbers an entry: expected {width}")


@functools.partial(jax.jit, static_argnames=("k", "chunk"))
def nearest(
    index: Index, queries: Float[Array, "b c"], k: int, *, below: float = jnp.inf, chunk: int = 1024
) -> tuple[Float[Array, "b k"], Int[Array, "b k"]]:
    """(Cosines, rows) of the k entries most similar to each query, best first; of equal ones, the first in the database.

    Where fewer are left than k, cosines are -inf and the rows mean nothing.

    Args:
      index: of n rows, n >= k.
      queries: any vectors; 0 is equally far from all.
      k: neighbours.
      below: entries at least as similar as this are passed over, such as the query itself; traced.
      chunk: rows that are compared at a time; memory grows with b * chunk.

    Raises:
      ValueError: fewer rows than k, or a chunk < 1.
    """
    rows = index.features.shape[0]
    if not 1 <= k <= rows or chunk < 1:
        raise ValueError(f"k={k}, chunk={chunk}: expected 1..{rows} neighbours, and chunks of at least 1")
    chunk = min(chunk, rows)
    queries = queries / jnp.maximum(jnp.linalg.norm(queries, axis=-1, keepdims=True), 1e-12)
    b = len(queries)

    def one(i, best):
        # The last chunk ends with the database; what it shares with the one before is not looked at twice.
        start = jnp.minimum(i * chunk, rows - chunk)
        ids = start + jnp.arange(chunk)
        part = jax.lax.dynamic_slice_in_dim(index.features, start, chunk)
        scores = jnp.einsum("bc,nc->bn", queries, part, precision="highest")
        fresh = (ids >= i * chunk) & (ids < index.count) & (scores < below)
        scores = jnp.concatenate([best[0], jnp.where(fresh, scores, -jnp.inf)], axis=1)
        ids = jnp.concatenate([best[1], jnp.broadcast_to(ids, (b, chunk))], axis=1)
        scores, places = jax.lax.top_k(scores, k)
        return scores, jnp.take_along_axis(ids, places, axis=1)

    best = jnp.full((b, k), -jnp.inf), jnp.zeros((b, k), jnp.int32)
    return jax.lax.fori_loop(0, -(-rows // chunk), one, best)
