"""Nearest neighbours against a sort in NumPy, in chunks of several sizes; what is passed over, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import retrieval
from jaxgen.retrieval import Index, build_index, check_index, nearest

pytestmark = pytest.mark.numeric
RNG = np.random.default_rng(0)
FEATURES, QUERIES = RNG.normal(size=(11, 5)).astype(np.float32), RNG.normal(size=(3, 5)).astype(np.float32)


def cosines():
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (np.float64(QUERIES), np.float64(FEATURES))]
    return unit[0] @ unit[1].T


@pytest.mark.parametrize("rows, chunk", [(4, 4), (4, 5), (1, 16)], ids=["whole chunks", "an overlapping last one", "one"])
def test_neighbours_are_those_of_a_sort(rows, chunk):
    index = build_index(FEATURES, chunk=rows)
    assert index.features.shape == (12 if rows == 4 else 11, 5) and index.count == 11
    similarity, ids = nearest(index, QUERIES, 4, chunk=chunk)
    want = np.argsort(-cosines(), axis=1)[:, :4]
    np.testing.assert_array_equal(ids, want)
    np.testing.assert_allclose(similarity, np.take_along_axis(cosines(), want, 1), atol=1e-6)


def test_entries_as_similar_as_oneself_are_passed_over():
    index = build_index(FEATURES, np.arange(11), chunk=4)
    similarity, ids = nearest(index, FEATURES, 2, chunk=4)
    np.testing.assert_array_equal(ids[:, 0], np.arange(11))
    np.testing.assert_allclose(similarity[:, 0], 1, atol=1e-6)
    np.testing.assert_array_equal(nearest(index, FEATURES, 1, below=0.9999, chunk=4)[1][:, 0], ids[:, 1])
    # Fewer left than were asked for.
    similarity, _ = nearest(index, QUERIES, 11, below=0.0, chunk=4)
    np.testing.assert_array_equal(np.isfinite(similarity).sum(1), (cosines() < 0).sum(1))
    assert (np.asarray(nearest(index, QUERIES, 12, chunk=4)[0])[:, -1] == -np.inf).all()  # the padding is no entry


def test_a_database_is_swapped_without_compiling(monkeypatch):
    traces = []
    run = jax.jit(lambda index, queries: traces.append(1) or retrieval.nearest(index, queries, 2, chunk=4))
    first = run(build_index(FEATURES, chunk=4), QUERIES)[1]
    second = run(build_index(-FEATURES[:9], chunk=4), QUERIES)[1]
    assert len(traces) == 1 and (np.asarray(first) != np.asarray(second)).any() and np.asarray(second).max() < 9


def test_bad_input():
    for empty in (np.zeros((0, 5)), np.zeros((3, 0)), np.zeros(4)):
        with pytest.raises(ValueError, match="an index needs at least one row of numbers"):
            build_index(empty)
    with pytest.raises(ValueError, match=r"labels \(3,\): expected one for each of 11"):
        build_index(FEATURES, np.arange(3))
    with pytest.raises(ValueError, match="not all are finite"):
        build_index(FEATURES * np.nan)
    with pytest.raises(ValueError, match="chunk=0"):
        build_index(FEATURES, chunk=0)
    index = build_index(FEATURES[:3])
    with pytest.raises(ValueError, match=r"k=4 neighbours of a database of 3 entries: expected 1\.\.3"):
        check_index(index, 4, 5)
    with pytest.raises(ValueError, match="a database of 5 numbers an entry: expected 6"):
        check_index(index, 2, 6)
    check_index(index, 3, 5)
    small = Index(jnp.ones((2, 5)), jnp.zeros(2, jnp.int32), jnp.int32(2))
    with pytest.raises(ValueError, match=r"k=3, chunk=1024: expected 1\.\.2 neighbours"):
        nearest(small, QUERIES, 3)
