import functools

import numpy as np
import pytest

from jaxgen.metrics.text import edit_distance


def by_recursion(a, b):
    @functools.cache
    def rest(i, j):
        if i == len(a) or j == len(b):
            return len(a) - i + len(b) - j
        return min(rest(i + 1, j) + 1, rest(i, j + 1) + 1, rest(i + 1, j + 1) + (a[i] != b[j]))

    return rest(0, 0)


def test_edit_distance_against_a_recursion():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (40, 9)), rng.integers(0, 3, (40, 7))
    a_length, b_length = rng.integers(0, 10, 40), rng.integers(0, 8, 40)
    got = edit_distance(a, b, a_length, b_length)
    want = [by_recursion(tuple(x[:n].tolist()), tuple(y[:m].tolist())) for x, y, n, m in zip(a, b, a_length, b_length)]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(edit_distance(a, a), np.zeros(40))
    with pytest.raises(ValueError, match="40 rows against 3"):
        edit_distance(a, b[:3])
