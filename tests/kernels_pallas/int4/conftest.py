"""What the tests of 4-bit products share: quick compiles, and decoding of words bit by bit, as their documentation says."""

import numpy as np
import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(quick_compiles):
    """Interpreted kernels are large programs that run once."""


@pytest.fixture
def decode():
    """(integers, weights float64) [k, n] of packed weights without leading axes, one nibble at a time."""

    def integers(packed):
        words = np.asarray(packed.words)
        words = words.T[:, : packed.n] if packed.layout == "nk" else words
        q = np.empty((packed.k, packed.n), np.int64)
        for row in range(packed.k):
            block, rest = divmod(row, 4 * packed.tile)
            j, rest = divmod(rest, packed.tile)
            i, h = divmod(rest, 2)
            word = words[block * packed.tile // 2 + i].astype(np.int64)
            q[row] = ((word >> (4 * j + 16 * h)) & 15) - 8
        return q

    def both(packed):
        q, scales = integers(packed), np.asarray(packed.scales).astype(np.float64)[:, : packed.n]
        return q, q * np.repeat(scales, packed.group, axis=0)

    return both
