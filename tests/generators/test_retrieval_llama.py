"""RDM's transformer: what it sees of neighbours and tokens, cached steps, and the compiled loop against one in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View, gumbel, sample_tokens
from jaxgen.generators import retrieval_llama
from jaxgen.generators.retrieval_llama import RetrievalLlama, RetrievalSampler, neighbours
from jaxgen.nn.cross_attention import Context
from jaxgen.retrieval import build_index
from jaxgen.tokenizers import FlexibleTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, K, VOCAB, WIDTH = 3, 2, 9, 6
MODEL = RetrievalLlama(vocab=VOCAB, grid=2, feature_width=WIDTH, width=16, heads=2, depth=2, scan_layers=True)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, VOCAB, (B, 4)).astype(np.int32)
CONTEXT = Context(RNG.normal(size=(B, K, WIDTH)).astype(np.float32), np.array([[1, 1], [1, 0], [0, 0]], bool))
LABELS = np.array([0, 1, 1, 2, 0, 2, 1], np.int32)
SETTINGS = Settings(cfg=1.5, temperature=0.9, top_k=5, top_p=0.0)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(MODEL.param_shapes()))


@pytest.fixture(scope="module")
def full(params):
    run = jax.jit(MODEL.apply)
    return lambda tokens, context=CONTEXT: np.asarray(run(params, context, tokens))


def test_what_is_seen(params, full):
    whole = full(TOKENS)
    assert whole.shape == (B, 4, VOCAB) and whole.dtype == np.float32
    for place in range(4):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        moved = np.abs(full(changed) - whole).max(axis=(0, 2)) > 1e-5
        np.testing.assert_array_equal(moved, np.arange(4) > place)
    for place in range(K):
        features = CONTEXT.features.copy()
        features[:, place] += 1.0
        moved = np.abs(full(TOKENS, Context(features, CONTEXT.mask)) - whole).max(-1)
        assert (moved[CONTEXT.mask[:, place]] > 1e-4).all() and (moved[~CONTEXT.mask[:, place]] == 0).all()
    # Blocks one by one are the scanned ones.
    inner = dict(params["params"])
    stacked = inner["transformer"]["blocks"]
    inner["transformer"] = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(2)}
    unrolled = jax.jit(MODEL.clone(scan_layers=False).apply)({"params": inner}, CONTEXT, TOKENS)
    np.testing.assert_allclose(unrolled, whole, atol=1e-5)
    # Neighbours are a set.
    swapped = Context(CONTEXT.features[:, ::-1], CONTEXT.mask[:, ::-1])
    np.testing.assert_allclose(full(TOKENS, swapped), whole, atol=1e-5)


def test_cached_steps_are_the_whole(params, full):
    @jax.jit
    def run(params, tokens):
        cache, out = MODEL.init_cache(B), []
        before = jnp.concatenate([jnp.full((B, 1), -1), tokens[:, :-1]], axis=1)
        for first, end in ((0, 1), (1, 4)):
            view = View(before[:, first:end], jnp.arange(first, end), jnp.tril(jnp.ones((end - first,) * 2, bool)))
            result, cache = MODEL.apply(params, cache, view, CONTEXT, method="step")
            cache = cache.commit(end - first)
            out.append(result.params)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(run(params, TOKENS), full(TOKENS), atol=1e-5)


def test_the_compiled_loop_is_the_python_loop_and_traces_once(params, full, randomize, monkeypatch):
    tokenizer = FlexibleTokenizer(
        ch=4, ch_mult=(1, 1), res_blocks=1, groups=2, vocab=VOCAB, width=4, z_channels=4, patch_nums=(2,), channels=1
    )
    image = jax.ShapeDtypeStruct((1, *tokenizer.image_size, 1), np.float32)
    variables = {"generator": params}
    variables["tokenizer"] = jax.device_put(randomize(jax.eval_shape(tokenizer.init, jax.random.key(0), image), seed=1))
    sampler = RetrievalSampler(generator=MODEL, tokenizer=tokenizer, k=K)
    traces, key = [], jax.random.key(3)
    monkeypatch.setattr(retrieval_llama, "sample_tokens", lambda *a, **k: traces.append(1) or sample_tokens(*a, **k))
    features = RNG.normal(size=(7, WIDTH)).astype(np.float32)
    index = build_index(features, LABELS, chunk=8)
    asked = np.array([2, 1, 0], np.int32)
    images, got, ids = sampler(variables, key, index, asked, SETTINGS)
    assert images.shape == (B, *tokenizer.image_size, 1)

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_array_equal(LABELS[ids[:, 0]], asked)  # the entry drawn is the nearest to itself
    np.testing.assert_array_equal(ids, np.argsort(-unit @ unit.T, axis=1)[ids[:, 0], :K])
    found = Context(unit[np.asarray(ids)], np.ones((B, K), bool))
    null = Context(np.zeros((B, K, WIDTH), np.float32), np.zeros((B, K), bool))
    noise = np.asarray(gumbel(jax.random.split(key)[1], jnp.arange(B), jnp.arange(4), VOCAB))
    tokens = np.zeros((B, 4), np.int32)
    for place in range(4):
        law = (1 + SETTINGS.cfg) * full(tokens, found)[:, place] - SETTINGS.cfg * full(tokens, null)[:, place]
        law /= SETTINGS.temperature
        for b in range(B):
            best = np.argsort(-law[b])[: SETTINGS.top_k]
            tokens[b, place] = best[np.argmax(law[b, best] + noise[b, place, best])]
    np.testing.assert_array_equal(got, tokens)

    # Another database, other entries, other settings: one compilation.
    other = build_index(-features[:5], LABELS[:5], chunk=8)
    assert np.any(sampler(variables, key, other, asked, SETTINGS)[1] != got)
    drawn = [np.asarray(sampler(variables, jax.random.key(i), index, np.full(B, -1), SETTINGS)[2])[:, 0] for i in range(4)]
    assert len(np.unique(drawn)) > 3
    for change in ({"cfg": 4.0}, {"temperature": 5.0}, {"top_k": 1}):
        assert np.any(sampler(variables, key, index, asked, SETTINGS._replace(**change))[1] != got), change
    assert len(traces) == 1

    with pytest.raises(ValueError, match=r"label 3: the database has none of it, only 0, 1, 2"):
        sampler(variables, key, index, np.array([0, 3]))
    with pytest.raises(ValueError, match="k=2 neighbours of a database of 1 entries"):
        sampler(variables, key, build_index(features[:1]), np.array([-1]))
    with pytest.raises(ValueError, match=r"labels float64 \(1,\): expected integers"):
        sampler(variables, key, index, np.array([0.5]))
    with pytest.raises(ValueError, match="k=0: expected at least 1 neighbour"):
        RetrievalSampler(generator=MODEL, tokenizer=tokenizer, k=0)
    with pytest.raises(ValueError, match=r"generator \(length, vocab\)=\(9, 9\) does not fit tokenizer \(4, 9\)"):
        RetrievalSampler(generator=MODEL.clone(grid=3), tokenizer=tokenizer, k=K)


def test_neighbours_that_are_passed_over_are_not_there():
    index = build_index(np.eye(WIDTH)[:3], chunk=4)
    context = neighbours(index, np.eye(WIDTH, dtype=np.float32)[:1], 3, below=0.9)
    np.testing.assert_array_equal(context.mask, [[True, True, False]])
    np.testing.assert_allclose(np.asarray(context.features)[0, :2], np.eye(WIDTH)[1:3], atol=1e-6)
