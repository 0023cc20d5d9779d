"""How far one text is from another."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["edit_distance"]


def edit_distance(
    a: Int[np.ndarray, "b n"],
    b: Int[np.ndarray, "b m"],
    a_length: Int[np.ndarray, "b"] | None = None,
    b_length: Int[np.ndarray, "b"] | None = None,
) -> Float[np.ndarray, "b"]:
    """Insertions, deletions and substitutions that turn each row of `a` into that of `b` (Levenshtein 1966).

    d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + [a_i != b_j]), for all rows of the batch at once.

    Args:
      a, b: tokens.
      a_length, b_length: of each row; None is all.

    Raises:
      ValueError: another number of rows in `a` than in `b`.

    Example:
      >>> edit_distance(np.array([[1, 2, 3]]), np.array([[2, 3, 4]]))
      array([2.])
    """
    rows, n = a.shape
    if len(b) != rows:
        raise ValueError(f"{rows} rows against {len(b)}: expected as many")
    m = b.shape[1]
    every = np.arange(rows)
    a_length = np.full(rows, n) if a_length is None else np.asarray(a_length)
    b_length = np.full(rows, m) if b_length is None else np.asarray(b_length)
    table = np.zeros((n + 1, rows, m + 1))
    table[0] = np.arange(m + 1)
    for i in range(1, n + 1):
        table[i, :, 0] = i
        best = np.minimum(table[i - 1, :, 1:] + 1, table[i - 1, :, :-1] + (a[:, i - 1 : i] != b))
        # What a run of insertions reaches: d[j] = min over k <= j of best[k] + j - k.
        reach = np.concatenate([table[i, :, :1], best], axis=1) - np.arange(m + 1)
        table[i] = np.minimum.accumulate(reach, axis=1) + np.arange(m + 1)
    return table[a_length, every, b_length]
