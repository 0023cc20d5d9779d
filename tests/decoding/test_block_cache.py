"""Layouts: what a query of a sub-block sees and writes, guided or not, and what layouts refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Guided, KVCache, Out, View, guide
from jaxgen.decoding.block_cache import Blocks, DualCache, FreeCache, SubBlockCache, Whole
from jaxgen.decoding.guidance import GuidedCache

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, CAPACITY, VOCAB = 3, 9, 6


def step(params, cache, view, cond):
    """Keeps each token as a one-hot key, and returns how often each is visible: the cache's contents as logits."""
    hot = jax.nn.one_hot(view.tokens, VOCAB)[:, :, None]
    cache = cache.stage(0, hot, hot)
    _, v, count = cache.read(0, view.tokens.shape[1], view.mask)
    visible = jnp.arange(v.shape[1]) < count[:, None]
    seen = jnp.where(visible[..., None], v[:, :, 0], 0).sum(axis=1)
    return Out(jnp.broadcast_to(seen[:, None], (*view.tokens.shape, VOCAB))), cache


def kept(tokens, lengths):
    """A cache that holds `tokens`, each row up to its length."""
    cache = KVCache.zeros(layers=1, batch=len(tokens), capacity=CAPACITY, heads=1, head_size=VOCAB)
    cache = cache.commit(jnp.zeros(len(tokens), jnp.int32))
    return step(None, cache, View(jnp.asarray(tokens), None), None)[1].commit(jnp.asarray(lengths))


def histogram(*rows):
    return np.bincount(np.concatenate([np.asarray(row) for row in rows]), minlength=VOCAB)


def test_a_sub_block_sees_the_kept_positions_and_the_whole_block():
    old = np.array([[0, 0, 1, 1], [0, 1, 2, 3], [5, 5, 5, 5]])
    lengths = np.array([4, 2, 0])
    cache = kept(old, lengths)
    block = np.array([[2, 3, 4, 5]] * B)
    whole = SubBlockCache(cache, jnp.zeros(B, jnp.int32), jnp.ones(B, bool), 4)
    assert whole.capacity == CAPACITY
    out, whole = step(None, whole, View(jnp.asarray(block), None), None)
    np.testing.assert_array_equal(out.params[:, 0], [histogram(o[:n], r) for o, n, r in zip(old, lengths, block)])
    # Rows 0 and 2 write two slots anew, at their own offsets; row 1 does not write.
    part = SubBlockCache(whole.cache, jnp.array([2, 0, 0]), jnp.array([True, False, True]), 4)
    out, part = step(None, part, View(jnp.zeros((B, 2), jnp.int32), None), None)
    now = np.array([[2, 3, 0, 0], [2, 3, 4, 5], [0, 0, 4, 5]])
    np.testing.assert_array_equal(out.params[:, 1], [histogram(o[:n], r) for o, n, r in zip(old, lengths, now)])
    np.testing.assert_array_equal(part.cache.length, lengths)
    # What is committed is the block as it was last written.
    after, _ = step(None, part.cache.commit(4), View(jnp.full((B, 1), 5), None), None)
    np.testing.assert_array_equal(after.params[:, 0], [histogram(o[:n], r, [5]) for o, n, r in zip(old, lengths, now)])


def test_rows_of_either_kind_read_what_they_would_alone():
    """Row 0 begins a sub-block, rows 1 and 2 are inside one; a guided step sees the same in both halves."""
    layout, mask = DualCache(4, 0, 2), VOCAB - 1
    masked = np.array([[False, False, True, True], [False, True, True, True], [False, False, False, True]])
    tokens = np.where(masked, mask, np.array([[0, 1, 2, 3]]))
    stale = np.array([[3, 3, 3, 3]] * B)
    new, running = jnp.array([True, False, False]), jnp.ones(B, bool)

    def read(guided, rows):
        many = 2 if guided else 1
        cache = kept(np.tile(stale[rows], (many, 1)), np.zeros(many * len(rows), int))
        view = View(jnp.asarray(tokens[rows]), jnp.broadcast_to(jnp.arange(4), (len(rows), 4)))
        options = dict(masked=jnp.asarray(masked[rows]), new=new[rows], running=running[rows])
        wrapped, function, cond = (GuidedCache(cache), guide(step), Guided(None, 3.0)) if guided else (cache, step, None)
        got = jax.jit(lambda: layout.read(function, None, wrapped, view, cond, **options))()
        inner = got.cache.cache if guided else got.cache
        return np.asarray(got.out.params), np.asarray(inner.k[0, :, :4, 0].argmax(-1)), int(got.calls), np.asarray(got.read)

    out, keys, calls, positions = read(False, np.arange(B))
    # Row 0 is read whole; row 1 rewrites its first half, row 2 its second.
    want = np.array([tokens[0], [tokens[1, 0], tokens[1, 1], 3, 3], [3, 3, tokens[2, 2], tokens[2, 3]]])
    np.testing.assert_array_equal(keys, want)
    inside = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]], bool)  # slots whose law counts
    for row in range(B):
        np.testing.assert_array_equal(out[row][inside[row]], [histogram(want[row])] * 2)
    assert calls == 2 and positions.tolist() == [4, 2, 2]
    for row in range(B):
        alone, its_keys, calls, _ = read(False, np.array([row]))
        np.testing.assert_array_equal(alone[0][inside[row]], out[row][inside[row]])
        np.testing.assert_array_equal(its_keys[0], keys[row])
        assert calls == 1
    guided, both, calls, positions = read(True, np.arange(B))
    np.testing.assert_allclose(guided, out)  # equal halves
    np.testing.assert_array_equal(both, np.tile(keys, (2, 1)))
    assert calls == 2 and positions.tolist() == [4, 2, 2]


def test_sections_and_what_is_kept():
    masked = jnp.array([[0, 0, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8], bool)
    start = jnp.array([8, 0, 16])
    open_, section = Blocks(8).section(masked, start)
    np.testing.assert_array_equal(open_, masked)
    assert section.tolist() == [1, 0, 2] and Blocks(8).settled(masked).tolist() == [0, 0, 8]
    open_, section = Blocks(8, sub=2).section(masked, start)
    np.testing.assert_array_equal(open_, masked & jnp.array([[0, 0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8], bool))
    assert section.tolist() == [6, 0, 11]
    assert FreeCache(2).settled(masked).tolist() == [4, 0, 8]
    open_, section = FreeCache(4, in_order=True).section(masked, start)
    assert section.tolist() == [3, 0, 5]  # the third row's block, seen from the window, is the last
    np.testing.assert_array_equal(Whole().section(masked, start)[0], masked)
    assert FreeCache(4).windows(12) == (12, 8, 4) and Blocks(4).windows(12) == (4,) and Whole(4).windows(12) == (12,)


def test_bad_input():
    for make, message in (
        (lambda: Blocks(0), "size=0 must be at least 1"),
        (lambda: Whole(0), "size=0 must be at least 1"),
        (lambda: FreeCache(0), "size=0 must be at least 1"),
        (lambda: Blocks(4, 6), "prefill=6 must be whole blocks of 4"),
        (lambda: Blocks(4, sub=3), "sub=3 does not divide size=4"),
        (lambda: Blocks(4, sub=0), "sub=0 must be at least 1"),
        (lambda: DualCache(4), "sub=None: DualCache needs sub-blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    cache = kept(np.zeros((B, 4), int), np.zeros(B, int))
    sub = SubBlockCache(cache, jnp.zeros(B, jnp.int32), jnp.ones(B, bool), 4)
    with pytest.raises(ValueError, match="has no mask"):
        step(None, sub, View(jnp.zeros((B, 2), jnp.int32), None, jnp.ones((2, 2), bool)), None)
    view, rows = View(jnp.zeros((B, 4), jnp.int32), jnp.zeros((B, 4), jnp.int32)), jnp.ones(B, bool)
    with pytest.raises(ValueError, match="this cache is a tuple"):
        DualCache(4, sub=2).read(step, None, (), view, None, masked=jnp.ones((B, 4), bool), new=rows, running=rows)
