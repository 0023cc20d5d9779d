import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import KVCache

pytestmark = pytest.mark.numeric

LAYERS, B, S, H, D = 2, 3, 9, 2, 4


def empty(length=0):
    cache = KVCache.zeros(layers=LAYERS, batch=B, capacity=S, heads=H, head_size=D)
    return KVCache(cache.k, cache.v, length)


def pieces(q, seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, q, H, D)), jnp.float32) for _ in range(2)]


def filled(length):
    """All nine positions written, `length` of them committed: what lies behind is rubbish that must stay unseen."""
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.normal(size=(LAYERS, B, S, H, D)), jnp.float32) for _ in range(2))
    return KVCache(k, v, length)


def visible(cache, layer, q, mask=None):
    """For each row and query, the keys and values it sees, in order of position."""
    k, v, allowed = cache.read(layer, q, mask)
    if allowed is None:
        allowed = np.ones((B, 1, q, k.shape[1]), bool)
    elif allowed.ndim == 1:  # how many from the first on
        allowed = np.arange(k.shape[1]) < np.asarray(allowed)[:, None, None, None]
    allowed = np.broadcast_to(allowed, (B, 1, q, k.shape[1]))
    return [[(np.asarray(k)[b, allowed[b, 0, i]], np.asarray(v)[b, allowed[b, 0, i]]) for i in range(q)] for b in range(B)]


def assert_sees(cache, layer, q, want, mask=None):
    """`want(b, i)` gives (keys, values) of row b's query i."""
    got = visible(cache, layer, q, mask)
    for b in range(B):
        for i in range(q):
            for mine, theirs in zip(got[b][i], want(b, i)):
                np.testing.assert_array_equal(mine, theirs)


LENGTHS = {"static": lambda n: n, "scalar": lambda n: jnp.int32(n), "rows": lambda n: jnp.full(B, n, jnp.int32)}


@pytest.mark.parametrize("kind", LENGTHS)
def test_queries_see_what_is_committed_and_each_other(kind):
    start, (k, v) = filled(LENGTHS[kind](4)), pieces(3, 2)
    cache = start.stage(1, k, v)
    np.testing.assert_array_equal(cache.length, 4 if kind != "rows" else [4] * B)
    assert_sees(
        cache,
        1,
        3,
        lambda b, i: [np.concatenate([x[1, b, :4], new[b]]) for x, new in ((start.k, k), (start.v, v))],
    )
    np.testing.assert_array_equal(cache.k[0], start.k[0])  # another layer
    np.testing.assert_array_equal(cache.k[1, :, :4], start.k[1, :, :4])


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_mask_among_the_staged(kind, per_row):
    start, (k, v) = filled(LENGTHS[kind](2)), pieces(4, 3)
    rng = np.random.default_rng(4)
    mask = rng.random((B, 4, 4) if per_row else (4, 4)) < 0.5
    each = np.broadcast_to(mask, (B, 4, 4))
    assert_sees(
        start.stage(0, k, v),
        0,
        4,
        lambda b, i: [np.concatenate([x[0, b, :2], new[b, each[b, i]]]) for x, new in ((start.k, k), (start.v, v))],
        jnp.asarray(mask),
    )


def test_rows_of_different_lengths():
    lengths = [0, 5, 2]
    start, (k, v) = filled(jnp.array(lengths)), pieces(3, 5)
    causal = np.tril(np.ones((3, 3), bool))
    assert_sees(
        start.stage(1, k, v),
        1,
        3,
        lambda b, i: [np.concatenate([x[1, b, : lengths[b]], new[b, : i + 1]]) for x, new in ((start.k, k), (start.v, v))],
        jnp.asarray(causal),
    )


def test_a_static_length_reads_the_prefix_without_a_mask():
    k, v, mask = filled(4).read(0, 3)
    assert mask is None and k.shape == v.shape == (B, 7, H, D)


def test_traced_lengths_are_read_as_lengths():
    for length, want in ((jnp.int32(4), [7] * B), (jnp.array([4, 0, 2]), [7, 3, 5])):
        k, v, seen = filled(length).read(0, 3)
        assert seen.dtype == jnp.int32 and seen.tolist() == want and k.shape == v.shape == (B, S, H, D)


@pytest.mark.parametrize("kind", LENGTHS)
def test_commit_makes_permanent_and_not_committing_rolls_back(kind):
    start = filled(LENGTHS[kind](2))
    k, v = pieces(3, 6)
    k2, v2 = pieces(2, 7)
    kept = start.stage(0, k, v).commit(2).stage(0, k2, v2)  # the third is dropped
    rolled_back = start.stage(0, k, v).stage(0, k2, v2)
    assert_sees(
        kept,
        0,
        2,
        lambda b, i: [np.concatenate([x[0, b, :2], n[b, :2], m[b]]) for x, n, m in ((start.k, k, k2), (start.v, v, v2))],
    )
    assert_sees(rolled_back, 0, 2, lambda b, i: [np.concatenate([x[0, b, :2], m[b]]) for x, m in ((start.k, k2), (start.v, v2))])


def test_rows_commit_on_their_own():
    start, (k, v) = filled(jnp.array([0, 5, 2])), pieces(3, 8)
    cache = start.stage(0, k, v).commit(jnp.array([3, 0, 1]))
    np.testing.assert_array_equal(cache.length, [3, 5, 3])
    k2, v2 = pieces(1, 9)
    want_k = [k[0], start.k[0, 1, :5], np.concatenate([start.k[0, 2, :2], k[2, :1]])]
    want_v = [v[0], start.v[0, 1, :5], np.concatenate([start.v[0, 2, :2], v[2, :1]])]
    assert_sees(
        cache.stage(0, k2, v2),
        0,
        1,
        lambda b, i: [np.concatenate([want_k[b], k2[b]]), np.concatenate([want_v[b], v2[b]])],
    )


@pytest.mark.parametrize("kind", LENGTHS)
def test_commit_of_a_path_keeps_the_accepted_branch_of_a_tree(kind):
    start = filled(LENGTHS[kind](2))
    cache = start
    news = [pieces(5, 10 + layer) for layer in range(LAYERS)]
    for layer, (k, v) in enumerate(news):
        cache = cache.stage(layer, k, v)
    path = np.array([[0, 2, 4], [1, 3, 3], [0, 1, 2]])
    cache = cache.commit(jnp.array([3, 2, 1]), jnp.asarray(path))
    np.testing.assert_array_equal(cache.length, [5, 4, 3])
    for layer, (k, v) in enumerate(news):
        for b, n in enumerate((3, 2, 1)):
            for stored, before, new in ((cache.k, start.k, k), (cache.v, start.v, v)):
                np.testing.assert_array_equal(stored[layer, b, :2], before[layer, b, :2])
                np.testing.assert_array_equal(stored[layer, b, 2 : 2 + n], new[b, path[b, :n]])


@pytest.mark.parametrize("kind", LENGTHS)
def test_take_picks_rows(kind):
    length = jnp.array([1, 2, 3]) if kind == "rows" else LENGTHS[kind](2)
    start, rows = filled(length), jnp.array([2, 0])
    taken = start.take(rows)
    np.testing.assert_array_equal(taken.k, start.k[:, [2, 0]])
    np.testing.assert_array_equal(taken.v, start.v[:, [2, 0]])
    np.testing.assert_array_equal(taken.length, [3, 1] if kind == "rows" else 2)


def test_capacity():
    k, v = pieces(3, 11)
    assert empty().capacity == S
    empty(6).stage(0, k, v)
    with pytest.raises(ValueError, match="7 cached \\+ 3 new positions exceed the cache's capacity 9"):
        empty(7).stage(0, k, v)


def test_a_static_length_stays_static_through_jit():
    @jax.jit
    def step(cache, k, v):
        assert isinstance(cache.length, int)
        return cache.stage(0, k, v).commit(k.shape[1])

    cache = step(empty(), *pieces(3, 12))
    assert cache.length == 3 and isinstance(cache.length, int)
    cache = step(cache, *pieces(3, 12))
    assert cache.length == 6 and step._cache_size() == 2  # a length is a shape: one program each


def test_a_traced_length_has_one_program():
    @jax.jit
    def step(cache, k, v):
        return cache.stage(0, k, v).commit(k.shape[1])

    cache = empty(jnp.int32(0))
    for _ in range(3):
        cache = step(cache, *pieces(3, 13))
    assert cache.length == 9 and step._cache_size() == 1


def test_the_dtype_of_the_cache_is_kept():
    cache = KVCache.zeros(layers=1, batch=B, capacity=S, heads=H, head_size=D, dtype=jnp.bfloat16)
    assert cache.stage(0, *pieces(2, 14)).k.dtype == jnp.bfloat16


def test_some_layers_and_more_room():
    cache = filled(4)
    small = cache.narrow((1,), 12)
    assert small.capacity == 12 and small.length == 4 and small.k.shape == (1, B, 12, H, D)
    for ours, theirs in ((small.k, cache.k), (small.v, cache.v)):
        np.testing.assert_array_equal(ours[0, :, :S], theirs[1])
    np.testing.assert_array_equal(cache.narrow((1, 0), S).k, cache.k[::-1])
    with pytest.raises(ValueError, match="capacity=8 is below that of the cache, 9"):
        cache.narrow((0,), 8)
