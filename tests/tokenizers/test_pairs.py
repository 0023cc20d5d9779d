"""Byte pairs against the textbook's loop, the way back, and what is refused."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen.tokenizers.bytes import from_tokens, to_tokens
from jaxgen.tokenizers.pairs import BYTES, END, Pairs, learn_pairs

FEW = st.lists(st.sampled_from([0, 1, 255]), max_size=24).map(bytes)


def replaced(tokens, pair, new):
    """From the left, one after another."""
    out, i = [], 0
    while i < len(tokens):
        hit = tuple(tokens[i : i + 2]) == pair
        out.append(new if hit else tokens[i])
        i += 2 if hit else 1
    return out


def textbook(files, count):
    """Merges, and the files in their tokens."""
    files, merges = [list(file) for file in files], []
    for i in range(count):
        counts = collections.Counter(pair for file in files for pair in zip(file, file[1:]))
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges += best
        files = [replaced(file, best, END + 1 + i) for file in files]
    return tuple(merges), files


@settings(max_examples=60, deadline=None)
@given(st.lists(FEW, max_size=6), FEW)
def test_merges_are_the_textbooks(files, other):
    """And those of another run; every file comes back, also one that nothing was learnt from."""
    merges, tokens = textbook(files, 6)
    pairs = learn_pairs(files, 6)
    assert pairs.merges == merges == learn_pairs(iter(files), 6).merges
    assert [pairs.encode(file).tolist() for file in files] == tokens
    assert pairs.decode(pairs.encode(other)) == other and len(pairs.encode(other)) <= len(other)


def test_pieces_and_rows():
    pairs = Pairs((97, 98, 257, 97, 0, 0))
    assert pairs.pieces[:256] == tuple(bytes([i]) for i in range(256))
    assert pairs.pieces[256:] == (b"", b"ab", b"aba", b"\0\0") and len(pairs) == 3
    assert pairs.encode(b"abaab\0\0\0").tolist() == [258, 257, 259, 0]
    row = to_tokens(b"abab\0", 5, pairs)
    assert row.tolist() == [257, 257, 0, END, END] and from_tokens(row, pairs) == b"abab\0"
    assert to_tokens(b"abab\0", 2, pairs).tolist() == [257, 257]
    assert pairs.decode(np.array([260, 97])) == b"a"  # a token that no merge made
    assert BYTES.encode(b"\0\xff").tolist() == [0, 255] and not len(BYTES)


@pytest.mark.parametrize(
    "merges, message",
    [
        ((1, 2, 3), "merges: 3 tokens, expected two for each merge"),
        ((1, 256), r"merges\[1\]=256"),
        ((257, 1), r"merges\[0\]=257: merge 0 joins"),
        ((1, 2, 3, 258), r"merges\[3\]=258"),
        ((-1, 2), r"merges\[0\]=-1"),
    ],
)
def test_bad_merges(merges, message):
    with pytest.raises(ValueError, match=message):
        Pairs(merges)
