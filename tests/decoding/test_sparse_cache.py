"""Sparse caches: with room for all they are the full cache; with less, the full cache under the mask that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import View, check_step
from jaxgen.decoding.sparse_cache import RetrievalCache, SinkCache, exposing
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.nn.rope import rotate

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, V, P = 2, 11, 20
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, P)), jnp.int32)


@pytest.fixture(scope="module")
def world(randomize):
    return build(randomize, depth=2, heads=4, kv_heads=2)


def build(randomize, **sizes):
    model = LanguageModel(vocab=V, width=16, **sizes)
    params = jax.device_put(randomize(jax.eval_shape(model.init, jax.random.key(0), TOKENS)))
    params["params"]["head"]["kernel"] = 2 * params["params"]["head"]["kernel"]
    step = stepper(model)
    world = type("World", (), {})()
    world.model, world.params = model, params
    world.step = jax.jit(lambda cache, view: step(params, cache, view, None))
    world.exposing = jax.jit(lambda cache, view: exposing(step)(params, cache, view, None))
    return world


def read(step, cache, tokens, start, mask=None):
    """(log-laws, cache with the tokens staged)."""
    q = tokens.shape[1]
    mask = jnp.tril(jnp.ones((q, q), bool)) if mask is None else jnp.asarray(mask)
    out, cache = step(cache, View(tokens, jnp.broadcast_to(start + jnp.arange(q), (B, q)), mask))
    return np.asarray(jax.nn.log_softmax(out.params)), cache


def lengths(n):
    return jnp.full((B,), n, jnp.int32)


def in_pieces(step, cache, sizes):
    laws, start, cache = [], 0, cache.commit(lengths(0))
    for size in sizes:
        law, cache = read(step, cache, TOKENS[:, start : start + size], start)
        cache, start = cache.commit(lengths(size)), start + size
        laws.append(law)
    return np.concatenate(laws, axis=1), cache


@pytest.mark.parametrize("sink, recent", [(0, 1), (2, 5), (3, P)])
def test_a_sink_cache_is_a_mask(world, sink, recent):
    """Read in pieces, over many rounds of the ring, it gives the laws of one query of the full cache under the mask."""
    age = np.arange(P)[:, None] - np.arange(P)
    mask = (age >= 0) & ((age < recent) | (np.arange(P) < sink))
    want, _ = read(world.step, world.model.init_cache(B, P), TOKENS, 0, mask)
    empty = SinkCache.like(world.model.init_cache(B, 1), sink=sink, recent=recent, slack=3)
    assert empty.k.shape[2] == sink + recent + 3
    got, _ = in_pieces(world.step, empty, [3, 2, 3, 3, 2, 3, 2, 2])
    np.testing.assert_allclose(got, want, atol=2e-5)
    if recent < P:
        full, _ = read(world.step, world.model.init_cache(B, P), TOKENS, 0)
        assert np.abs(full - want).max() > 0.01


def test_it_keeps_the_contract_of_steps(world):
    """Staging, rollback, ragged rows, trees and their paths."""
    empty = SinkCache.like(world.model.init_cache(B, 1), sink=2, recent=6, slack=13)
    call = lambda params, cache, view, cond: world.step(cache, view)  # noqa: E731
    check_step(call, params=None, cache=empty, cond=None, batch=B, vocab=V)


def test_committed_tokens_can_be_taken_back_within_the_slack(world):
    empty = SinkCache.like(world.model.init_cache(B, 1), sink=2, recent=5, slack=3)
    _, cache = in_pieces(world.step, empty, [3, 3, 3])
    want, _ = read(world.step, cache, TOKENS[:, 9:11], 9)
    _, wrong = read(world.step, cache, TOKENS[:, :3], 9)
    _, wrong = read(world.step, wrong.commit(lengths(1)), TOKENS[:, :2], 10)
    got, _ = read(world.step, wrong.commit(lengths(2)).restore(cache), TOKENS[:, 9:11], 9)
    np.testing.assert_array_equal(got, want)


def retrieval(world, prompt, **settings):
    """(the cache after reading a prompt of some rows' lengths, the full cache)."""
    view = View(TOKENS[:, :P], jnp.arange(P), jnp.tril(jnp.ones((P, P), bool)))
    out, cache = world.exposing(world.model.init_cache(B, P + 8).commit(lengths(0)), view)
    queries = jnp.take_along_axis(out.feats.queries, (prompt - 1)[None, :, None, None, None], axis=2)[:, :, 0]
    return RetrievalCache.select(out.feats.k, out.feats.v, queries, prompt, **settings), cache.commit(prompt), out.feats


def test_retrieval_with_room_for_everything_is_the_full_cache(randomize):
    world = build(randomize, depth=2, heads=4, kv_heads=2, scan_layers=True)
    prompt = jnp.array([P - 1, 9])
    sparse, full, _ = retrieval(world, prompt, budget=20, chunk=2, recent=8, slack=5)
    assert sparse.k.shape[2] == 20 + 13
    new = TOKENS[:, :5]
    view = View(new, prompt[:, None] + jnp.arange(5), jnp.tril(jnp.ones((5, 5), bool)))
    want, got = (world.step(cache, view)[0].params for cache in (full, sparse))
    np.testing.assert_allclose(got, want, atol=2e-5)
    # Tokens that were staged elsewhere: keys and values of all layers at once.
    k, v = (x[:, :, :3] for x in world.exposing(full, view)[0].feats[1:3])
    want, _ = world.step(world.step(full, view)[1].commit(lengths(3)), View(new[:, 3:], view.pos[:, 3:], view.mask[:2, :2]))
    written = sparse.stage(slice(None), k, v).commit(lengths(3))
    got, _ = world.step(written, View(new[:, 3:], view.pos[:, 3:], view.mask[:2, :2]))
    np.testing.assert_allclose(got.params, want.params, atol=2e-5)


def test_retrieval_selects_what_the_query_scores_highest(world):
    """Slot by slot against a loop over layers, rows and heads."""
    prompt = jnp.array([P - 1, 13])
    budget, chunk, recent = 6, 2, 3
    sparse, _, seen = retrieval(world, prompt, budget=budget, chunk=chunk, recent=recent, slack=2)
    k, v, visible = sparse.read(1, 1, jnp.ones((1, 1), bool))
    keys, values, queries = (np.asarray(x, np.float64) for x in (seen.k, seen.v, seen.queries))
    others = 0
    for row, length in enumerate([P - 1, 13]):
        start = length // chunk * chunk
        last = set(range(start, length))
        for head in range(keys.shape[3]):
            parts = keys[1, row, :start, head].reshape(-1, chunk, keys.shape[4])
            score = parts.mean(axis=1) @ queries[1, row, length - 1, head]
            rest = sorted(range(1, len(parts)), key=lambda c: -score[c])[: budget // chunk - 1]
            others += rest != list(range(1, budget // chunk))
            want = sorted(last | {chunk * c + i for c in [0, *rest] for i in range(chunk)})
            shown = np.asarray(visible)[row, 0, 0].copy()
            shown[budget + (length - start) % sparse.ring] = False  # the staged query itself
            for buffer, source in ((k, keys), (v, values)):
                got = np.asarray(buffer)[row, shown, head]
                assert sorted(map(tuple, got.tolist())) == sorted(map(tuple, source[1, row][want, head].tolist()))
    assert others  # it is not just the first chunks


def test_exposed_queries_are_the_models(randomize):
    world = build(randomize, depth=1, heads=4, kv_heads=2)
    view = View(TOKENS, jnp.arange(P), jnp.tril(jnp.ones((P, P), bool)))
    out, cache = world.exposing(world.model.init_cache(B, P), view)
    weights = world.params["params"]
    x = weights["embed"]["embedding"][TOKENS]
    block = weights["transformer"]["blocks_0"]
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * block["attention_norm"]["scale"]
    kernel = block["attention"]["qkv"]["kernel"][:, :, :2]  # of each of two groups: two queries, a key and a value
    q = rotate(jnp.einsum("bld,dgrk->blgrk", x, kernel).reshape(B, P, 4, -1), jnp.arange(P))
    np.testing.assert_allclose(out.feats.queries[0], q.reshape(B, P, 2, 2, -1).sum(3), atol=1e-5)
    np.testing.assert_array_equal(out.feats.k, cache.k)


def test_bad_input(world):
    model = world.model
    for name in ("sink=-1", "recent=0", "slack=0"):
        field, value = name.split("=")
        with pytest.raises(ValueError, match=name):
            SinkCache.like(model.init_cache(B, 1), **dict(sink=1, recent=2, slack=2) | {field: int(value)})
    cache = SinkCache.like(model.init_cache(B, 1), sink=1, recent=2, slack=2)
    with pytest.raises(ValueError, match="3 new positions: this cache has room for 2 behind its 2 recent ones"):
        world.step(cache, View(TOKENS[:, :3], jnp.arange(3)))
    k = jnp.zeros((1, B, 4, 2, 4))
    for settings in (dict(budget=5), dict(recent=1), dict(chunk=0), dict(slack=0)):
        with pytest.raises(ValueError, match="must be a multiple of chunk"):
            RetrievalCache.select(k, k, k[:, :, 0], lengths(4), **dict(budget=4, chunk=2, recent=2, slack=1) | settings)

    def blind(params, cache, view, cond):
        return world.step(cache.cache, view)[0], cache

    with pytest.raises(ValueError, match="shows no queries"):
        exposing(blind)(None, model.init_cache(B, P), View(TOKENS, jnp.arange(P)), None)
