"""CAVLC's codes and what they cost, by hand."""

import itertools
from fractions import Fraction

import pytest

from jaxgen.decoding import cavlc
from jaxgen.decoding.code_trees import NO_CODE, Forest

MOST = [(0, 16), (1, 16), (2, 16), (3, 16), (0, 15), (4, 4)]


def leaves():
    yield from (cavlc.token_leaves(kind, most) for kind, most in MOST)
    yield from (cavlc.zeros_leaves(total, most) for most in (16, 15, 4) for total in range(1, most))
    yield from (cavlc.runs_leaves(zeros, runs) for zeros in range(1, 15) for runs in range(1, 15))


def test_codes_can_be_told_apart():
    for tree in leaves():
        codes = [code for code, *_ in tree]
        assert len(set(codes)) == len(codes) and not any(a != b and b.startswith(a) for a in codes for b in codes)
        assert sum(Fraction(1, 2 ** len(code)) for code in codes) <= 1
    assert [cavlc.number(i) for i in range(5)] == ["1", "010", "011", "00100", "00101"]
    assert [cavlc.signed(i) for i in (0, 1, -1, 2)] == ["1", "010", "011", "00100"]
    assert sorted(cavlc.INTER_PATTERNS) == list(range(48))


def test_symbols():
    """Of what the tables say, some entries read in the standard; one less zero is possible in blocks of fifteen."""
    tokens = {code: divmod(symbol, 4) for code, symbol, _ in cavlc.token_leaves(0, 16)}
    assert (tokens["1"], tokens["01"], tokens["0000000000000100"]) == ((0, 0), (1, 1), (16, 0))
    assert max(symbol for _, symbol, _ in cavlc.token_leaves(1, 15)) == 4 * 15 + 3
    assert {code: zeros for code, zeros, _ in cavlc.zeros_leaves(3, 4)} == {"1": 0, "0": 1}
    assert [len(cavlc.zeros_leaves(5, most)) for most in (16, 15)] == [12, 11]
    assert [run for _, run, _ in cavlc.runs_leaves(9, 2)] == list(range(10))


@pytest.mark.parametrize("total, most", [(1, 16), (3, 15), (6, 16), (2, 4), (4, 4), (14, 16), (15, 15)])
def test_the_cheapest_places(total, most):
    """Against all ways to put coefficients."""

    def cost(places):
        zeros, bits = places[-1] + 1 - total, 0
        if total < most:
            bits += {z: len(code) for code, z, _ in cavlc.zeros_leaves(total, most)}[zeros]
        for i in range(total - 1, 0, -1):
            if not zeros:
                break
            run = places[i] - places[i - 1] - 1
            bits += {r: len(code) for code, r, _ in cavlc.runs_leaves(zeros, i)}[run]
            zeros -= run
        return bits

    assert cavlc.zeros_rest(total, most) == min(map(cost, itertools.combinations(range(most), total)))


def test_a_forest():
    """Nodes of a second tree follow those of the first; the fewest bits count what comes behind a code."""
    forest = Forest()
    first, second = forest.grow([("1", 5, 9), ("01", 6, 0)]), forest.grow([("0", 7, 3)])
    assert (first, second) == (0, 2)
    assert forest.children == [[1, -6], [NO_CODE, -7], [-8, NO_CODE]] and forest.rest == [2, 1, 4]
