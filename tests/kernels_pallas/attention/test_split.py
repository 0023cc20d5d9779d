"""Masks as runs of equal rows, and attention as dense products over them."""

import time

import jax
import numpy as np
import pytest

from kernels_pallas import BlockMask, explain
from kernels_pallas.attention import block_sparse_attention, split

pytestmark = pytest.mark.numeric


def brute_force_runs(mask):
    """(start, stop, keys seen) of every run of equal rows."""
    rows, found = mask.dense(), []
    for i, row in enumerate(rows):
        if i and np.array_equal(row, rows[i - 1]):
            found[-1][1] = i + 1
        else:
            found.append([i, i + 1, np.flatnonzero(row).tolist()])
    return found


@pytest.mark.parametrize("name", ["block_causal", "block_diagonal", "noisy_and_clean", "dead_run", "nothing", "everything"])
def test_runs_are_the_equal_rows(masks, name):
    got = [[r.start, r.stop, [j for span in r.spans for j in range(*span)]] for r in split.runs(masks[name])]
    assert got == brute_force_runs(masks[name])


@pytest.mark.parametrize("name", ["block_causal", "block_diagonal", "noisy_and_clean", "dead", "dead_run", "nothing"])
def test_pieces_cover_the_mask(masks, name):
    allowed, got = masks[name].dense(), np.zeros(masks[name].shape, bool)
    for start, stop, spans, masked in split.pieces(masks[name]):
        for a, b in spans:
            assert not got[start:stop, a:b].any()
            got[start:stop, a:b] = allowed[start:stop, a:b] if masked else True
    np.testing.assert_array_equal(got, allowed)


def test_short_runs_share_a_masked_piece(checks):
    mask = BlockMask.build(checks.not_later, checks.scales(650), checks.scales(650))
    masked, *rest = [(p.start, p.stop, p.masked) for p in split.pieces(mask)]
    assert masked == (0, 140, True)
    assert rest == [(140, 204, False), (204, 285, False), (285, 385, False), (385, 506, False), (506, 650, False)]


def test_refusals_say_why(checks, masks):
    line = np.arange(100)[None]
    assert "more than 64 runs" in split.pieces(BlockMask.build(checks.not_later, line, line))
    three = BlockMask.build(checks.same, np.zeros((1, 8)), np.array([[0, 1, 0, 1, 0]]))
    assert "see 3 separate intervals of keys, more than 2" in split.pieces(three)
    with pytest.raises(ValueError, match=r"implementation='split' cannot run on cpu cpu: .* more than 64 runs"):
        checks.run("split", checks.draw(masks["window"]), masks["window"])


@pytest.mark.parametrize("block, picked", [(16, "xla"), (32, "xla"), (64, "split")])
def test_leaves_masks_to_xla_that_it_does_more_for(checks, block, picked):
    """[noisy, clean] of 512 tokens. Noisy blocks of 16 share pieces with all keys between, blocks of 64 do not."""
    halves = np.stack([np.tile(np.arange(512) // block, 2), np.repeat([0, 1], 512)])
    mask = BlockMask.build(checks.noisy_and_clean, halves, halves)
    q = jax.ShapeDtypeStruct((1, 1024, 2, 16), "float32")
    (choice,) = explain(block_sparse_attention, q, q, q, mask)
    assert choice.implementation == picked
    scores = sum((1 + p.masked) * (p.stop - p.start) * (b - a) for p in split.pieces(mask) for a, b in p.spans)
    live = 128 * 128 * int((mask.planned((128, 128)) > 0).sum())
    assert (scores > live) == (picked == "xla")
    if picked == "xla":
        reason = f"are the work of {scores} pairs of queries and keys, live blocks of xla of {live}"
        assert reason in dict(choice.refused)["split"]


def test_large_masks_split_in_an_instant(checks):
    """One row a scale is looked at, not 9451, and hopeless masks are given up early."""
    sizes = np.array([1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]) ** 2
    steps, line = np.repeat(np.arange(14), sizes)[None], np.arange(sizes.sum())[None]
    start = time.process_time()
    found = split.runs(BlockMask.build(checks.not_later, steps, steps))
    assert [r.stop for r in found] == np.cumsum(sizes).tolist() and found[-1].spans == ((0, sizes.sum()),)
    assert isinstance(split.runs(BlockMask.build(checks.not_later, line, line)), str)
    assert time.process_time() - start < 2  # evaluating the predicate on all pairs of both takes longer


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 333, 680])
def test_lengths(checks, length):
    mask = BlockMask.build(checks.not_later, checks.scales(length), checks.scales(length))
    checks.check("split", mask, b=1, h=2, g=1)


@pytest.mark.parametrize("name", ["block_diagonal", "noisy_and_clean", "dead", "dead_run", "nothing"])
def test_masks(checks, masks, name):
    checks.check("split", masks[name], b=1)


@pytest.mark.parametrize("sizes", [{"h": 4, "g": 1}, {"h": 3, "g": 3}, {"dtype": "bfloat16"}, {"dtype": "float16"}])
def test_heads_and_dtypes(checks, masks, sizes):
    checks.check("split", masks["noisy_and_clean"], **sizes)


def test_large_logits(checks, masks):
    checks.check("split", masks["noisy_and_clean"], magnitude=30.0)


def test_long_runs_go_in_chunks(checks, masks, monkeypatch):
    """With room for 24 queries at a time, 140 leave a last chunk of 20."""
    monkeypatch.setattr(split, "_CPU_SCORES", 24 * 66 * 4)
    checks.check("split", masks["everything"], b=1, g=4)
