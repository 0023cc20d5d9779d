"""Sub-vocabularies: who sees whom, one part is the plain Llama, cached steps, and the sampler against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View, gumbel
from jaxgen.generators import ImageLlama, SubVocabularyLlama, SubVocabularySampler

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, V, N = 2, 5, 3
SIZES = dict(grid=2, num_classes=3, width=24, heads=2, depth=2, scan_layers=True)
MODEL = SubVocabularyLlama(vocab=V, parts=N, **SIZES)
LABELS, TOKENS = np.array([0, 2], np.int32), np.random.default_rng(0).integers(0, V, (B, 4 * N)).astype(np.int32)
SETTINGS = Settings(cfg=1.5, temperature=0.9, top_k=4, top_p=0.0)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(MODEL.param_shapes()))


@pytest.fixture(scope="module")
def logits(params):
    run = jax.jit(MODEL.apply)
    return lambda tokens, labels=LABELS: np.asarray(run(params, labels, tokens))


def test_a_token_sees_the_cells_before_its_own(logits):
    whole, cell = logits(TOKENS), np.arange(4 * N) // N
    assert whole.shape == (B, 4 * N, V) and whole.dtype == np.float32
    for i in range(4 * N):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % V
        moved = np.abs(logits(changed) - whole).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, cell > cell[i])
    assert np.all(np.abs(logits(TOKENS, (LABELS + 1) % 3) - whole).max(-1) > 1e-6)


def test_parts_have_embeddings_and_heads_of_their_own(params, logits):
    """The same value in another part of a cell is another thing to read, and each part has its own law."""
    first = TOKENS.copy()
    first[:, :N] = [1, 2, 3]
    swapped = first.copy()
    swapped[:, :N] = [3, 2, 1]
    assert np.all(np.abs(logits(first) - logits(swapped))[:, N:].max(-1) > 1e-6)
    law = logits(TOKENS).reshape(B, 4, N, V)
    assert np.all(np.abs(law[:, :, 1:] - law[:, :, :1]).max(-1) > 1e-3)
    assert params["params"]["join"]["kernel"].shape == (N * 24, 24)


def test_one_part_is_the_plain_llama(randomize):
    one, plain = SubVocabularyLlama(vocab=V, parts=1, **SIZES), ImageLlama(vocab=V, **SIZES)
    variables = jax.device_put(randomize(plain.param_shapes()))
    assert jax.tree.structure(one.param_shapes()) == jax.tree.structure(variables)
    tokens = TOKENS[:, :4]
    np.testing.assert_array_equal(*(jax.jit(m.apply)(variables, LABELS, tokens) for m in (one, plain)))


def test_steps_with_a_cache_are_the_whole(params, logits):
    @jax.jit
    def steps(params):
        cache, out = MODEL.init_cache(B), []
        for i in range(4):
            view = View(TOKENS[:, max(i - 1, 0) * N :][:, :N], N * i + jnp.arange(N))
            law, cache = MODEL.apply(params, cache, view, LABELS, method="step")
            cache, out = cache.commit(1), [*out, law.params]
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(steps(params), logits(TOKENS), atol=2e-5)
    assert MODEL.init_cache(B).capacity == 4 and MODEL.order.steps == 4 and MODEL.order.length == 4 * N


def test_the_sampler_is_a_loop_over_whole_passes(params, logits):
    sampler, key = SubVocabularySampler(generator=MODEL, tokenizer=None), jax.random.key(3)
    traces = SubVocabularySampler._sample._cache_size()
    got = np.asarray(sampler({"generator": params}, key, LABELS, SETTINGS)[1])
    noise, tokens = np.asarray(gumbel(key, jnp.arange(B), jnp.arange(4 * N), V)), np.zeros((B, 4 * N), np.int32)
    for start in range(0, 4 * N, N):
        mixed = (1 + SETTINGS.cfg) * logits(tokens) - SETTINGS.cfg * logits(tokens, np.full(B, 3, np.int32))
        for b in range(B):
            for i in range(start, start + N):
                law = mixed[b, i] / SETTINGS.temperature
                kept = np.argsort(-law)[: SETTINGS.top_k]
                tokens[b, i] = kept[np.argmax(law[kept] + noise[b, i, kept])]
    np.testing.assert_array_equal(got, tokens)
    for change in ({"cfg": 6.0}, {"temperature": 5.0}, {"top_k": 1}):
        assert np.any(sampler({"generator": params}, key, LABELS, SETTINGS._replace(**change))[1] != got), change
    assert np.any(sampler({"generator": params}, key, LABELS[::-1], SETTINGS)[1] != got)
    assert SubVocabularySampler._sample._cache_size() == traces + 1


def test_no_parts():
    with pytest.raises(ValueError, match="parts=0: expected at least 1"):
        MODEL.clone(parts=0)
