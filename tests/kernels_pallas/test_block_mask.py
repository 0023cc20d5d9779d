import jax
import numpy as np
import pytest

from kernels_pallas import BlockMask


def causal(q, k):
    return q[0] >= k[0]


def causal_in_document(q, k):
    return (q[0] >= k[0]) & (q[1] == k[1])


def documents(sq=11, sk=14, seed=0):
    rng = np.random.default_rng(seed)
    q = np.stack([rng.integers(0, 9, sq), rng.integers(0, 2, sq)])
    k = np.stack([rng.integers(0, 9, sk), rng.integers(0, 2, sk)])
    return q, k


def brute_force(q, k):
    return np.array([[q[0, i] >= k[0, j] and q[1, i] == k[1, j] for j in range(k.shape[1])] for i in range(q.shape[1])])


def test_dense_and_traced_apply_the_predicate_to_every_pair():
    q, k = documents()
    mask = BlockMask.build(causal_in_document, q, k)
    assert mask.shape == (11, 14)
    np.testing.assert_array_equal(mask.dense(), brute_force(q, k))
    np.testing.assert_array_equal(jax.jit(mask.traced)(), brute_force(q, k))


def test_traced_stores_no_dense_constant():
    mask = BlockMask.build(causal_in_document, *documents(40, 50))
    closed = jax.make_jaxpr(mask.traced)()
    assert max(np.size(c) for c in closed.consts) == 2 * 50


@pytest.mark.parametrize("block", [(1, 1), (4, 5), (3, 14), (128, 64)])
def test_plan_counts_each_block(block):
    # Documents in runs, so that empty and full blocks occur; 11 and 14 leave ragged blocks at the ends.
    q = np.array([[0, 0, 0, 0, 0, 5, 5, 5, 9, 9, 9], [0] * 4 + [1] * 7])
    k = np.array([[0] * 5 + [5] * 6 + [9] * 3, [0] * 4 + [1] * 10])
    mask = BlockMask.build(causal_in_document, q, k, block)
    allowed, (bq, bk) = brute_force(q, k), block
    want = []
    for i in range(0, 11, bq):
        for j in range(0, 14, bk):
            part = allowed[i : i + bq, j : j + bk]
            want.append(2 if part.all() else 1 if part.any() else 0)
    got = mask.plan
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got.reshape(-1), want)
    assert mask.density == np.mean(np.array(want) > 0)


def test_equal_masks_share_a_compilation():
    traces = []

    def f(mask, x):
        traces.append(mask)
        return x * mask.traced()

    f = jax.jit(f, static_argnums=0)
    steps = np.arange(5)[None]
    for _ in range(2):
        f(BlockMask.build(causal, steps, steps), 1.0)
    assert len(traces) == 1
    f(BlockMask.build(causal, steps, steps + 1), 1.0)
    assert len(traces) == 2


def test_equality_looks_at_predicate_metadata_and_block():
    steps = np.arange(6)[None]
    mask = BlockMask.build(causal, steps, steps)
    assert mask == BlockMask.build(causal, list(steps), steps) and hash(mask) == hash(BlockMask(causal, steps, steps))
    others = [
        BlockMask.build(lambda q, k: q[0] >= k[0], steps, steps),
        BlockMask.build(causal, steps + 1, steps),
        BlockMask.build(causal, steps, steps - 1),
        BlockMask.build(causal, steps, steps, (64, 64)),
        BlockMask.build(causal, steps[:, :4], steps),
        "a mask",
    ]
    assert all(mask != other for other in others)


def test_metadata_is_a_copy_that_cannot_be_written():
    steps = np.arange(4)[None]
    mask = BlockMask.build(causal, steps, steps)
    steps[:] = 0
    assert mask.dense().sum() == 10
    with pytest.raises(ValueError, match="read-only"):
        mask.q_meta[0, 0] = 3


@pytest.mark.parametrize(
    ("q", "k", "block", "message"),
    [
        (np.arange(4), np.arange(4)[None], (8, 8), r"q_meta \(4,\)"),
        (np.zeros((2, 4)), np.zeros((1, 4)), (8, 8), "with one m"),
        (np.zeros((1, 4)), np.zeros((1, 4)), (0, 8), r"block \(0, 8\)"),
    ],
)
def test_bad_metadata(q, k, block, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.build(causal, q, k, block)


def test_predicates_must_be_element_wise():
    with pytest.raises(ValueError, match=r"element-wise: it gave shape \(\)"):
        BlockMask.build(lambda q, k: (q[0] >= k[0]).all(), np.zeros((1, 4)), np.zeros((1, 4)))


def test_repr_names_predicate_and_shape():
    assert repr(BlockMask.build(causal, np.zeros((1, 3)), np.zeros((1, 4)))) == "BlockMask(causal, 3x4, block=(128, 64))"


@pytest.mark.parametrize("block", [(2, 3), (4, 5), (64, 64)])
def test_lists_hold_exactly_the_live_blocks(block):
    mask = BlockMask.build(causal_in_document, *documents(31, 29))
    plan = mask.planned(block)
    for lists, grid in ((mask.rows(block), plan), (mask.columns(block), plan.T)):
        for i, row in enumerate(grid):
            n = lists.count[i]
            assert lists.index[i, :n].tolist() == np.flatnonzero(row).tolist()
            assert not lists.kind[i, n:].any() and not lists.index[i, n:].any()
    exact = mask.rows(block, padding_is_partial=False)
    for i, row in enumerate(plan):
        assert exact.kind[i, : exact.count[i]].tolist() == row[row > 0].tolist()


def test_ragged_full_blocks_are_partial_for_kernels_that_pad():
    everyone = BlockMask.build(causal, np.ones((1, 5)), np.zeros((1, 6)))
    assert everyone.rows((4, 4), padding_is_partial=False).kind.tolist() == [[2, 2], [2, 2]]
    assert everyone.rows((4, 4)).kind.tolist() == [[2, 1], [1, 1]]
    q_meta, k_meta = everyone.padded((4, 4))
    assert q_meta.shape == (2, 8) and k_meta.shape == (2, 8)
    assert q_meta[1].tolist() == [1] * 5 + [0] * 3 and k_meta[1].tolist() == [1] * 6 + [0] * 2


def test_algebra_and_cuts():
    q, k = documents(13, 17)
    a, b = BlockMask.build(causal, q[:1], k[:1]), BlockMask.build(causal_in_document, q, k)
    x, y = a.dense(), b.dense()
    for got, want in ((a & b, x & y), (a | b, x | y), (~b, ~y), (~(a & b) | a, ~(x & y) | x), (b & b, y)):
        np.testing.assert_array_equal(got.dense(), want)
        np.testing.assert_array_equal(jax.jit(got.traced)(), want)
    assert (a & b) == (a & b) and (a & b) != (a | b) and hash(a & b) == hash(a & b)
    np.testing.assert_array_equal(b[2:9, ::-1].dense(), y[2:9, ::-1])
    assert (b & b).q_meta.shape[0] == 2 and (a & b).q_meta.shape[0] == 3
    with pytest.raises(ValueError, match="one shape"):
        a & b[:5, :]
    with pytest.raises(ValueError, match="not by 3"):
        b[3]
    with pytest.raises(ValueError, match="not with int"):
        b & 1


def test_densities():
    mask = BlockMask.build(causal, np.arange(64)[None], np.arange(64)[None], (16, 16))
    assert mask.density == 10 / 16
    assert mask.element_density == 64 * 65 / 2 / 64**2


def test_neighbours_must_not_matter():
    def ranked(q, k):
        return (q[0] >= k[0]) & (np.cumsum(np.ones_like(q[0] + k[0]), axis=1) % 2 == 0)

    with pytest.raises(ValueError, match="changes with its neighbours"):
        BlockMask.build(ranked, np.arange(8)[None], np.arange(8)[None])
    with pytest.raises(ValueError, match="must give bool, not int32"):
        BlockMask.build(lambda q, k: q[0] + k[0], np.arange(8)[None], np.arange(8)[None])
    with pytest.raises(ValueError, match="must not be empty"):
        BlockMask.build(causal, np.zeros((1, 0)), np.zeros((1, 3)))
