"""Sub-vocabularies: who sees whom, one part is the plain Llama, cached steps, and both samplers against plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View, gumbel
from jaxgen.decoding.noise import ORDER
from jaxgen.generators import (
    ImageLlama,
    MaskedSubVocabularyLlama,
    MaskedSubVocabularySampler,
    SubVocabularyLlama,
    SubVocabularySampler,
)

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


MASKED = MaskedSubVocabularyLlama(vocab=V, parts=N, **SIZES)


@pytest.fixture(scope="module")
def filled(randomize):
    """(Parameters, logits) of the masked model."""
    params = jax.device_put(randomize(MASKED.param_shapes()))
    run = jax.jit(MASKED.apply)
    return params, lambda tokens, labels=LABELS: np.asarray(run(params, labels, tokens))


def test_every_cell_sees_all_cells_that_are_known_and_the_class(filled):
    _, logits = filled
    whole = logits(TOKENS)
    assert whole.shape == (B, 4 * N, V) and whole.dtype == np.float32  # the mask is read, not predicted
    for i in range(4 * N):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % V
        assert np.all(np.abs(logits(changed) - whole).max(axis=(0, 2)) > 1e-6)
    assert np.all(np.abs(logits(TOKENS, (LABELS + 1) % 3) - whole).max(-1) > 1e-6)
    hidden, other = TOKENS.copy(), (TOKENS + 1) % V
    hidden[:, N : 2 * N] = MASKED.mask
    other = np.where(hidden == MASKED.mask, MASKED.mask, other)
    assert np.all(np.abs(logits(hidden) - whole).max(-1) > 1e-6)
    # Masked cells differ by their place alone, and what is masked says nothing.
    empty = logits(np.full_like(TOKENS, MASKED.mask))
    assert np.all(np.abs(empty - logits(hidden)).max(-1) > 1e-6)
    assert np.all(np.abs(empty.reshape(B, 4, N, V)[:, 1:] - empty.reshape(B, 4, N, V)[:, :1]).max(axis=(2, 3)) > 1e-6)
    assert not np.allclose(logits(other)[:, N : 2 * N], logits(hidden)[:, N : 2 * N])


def test_the_blocks_and_heads_are_those_of_the_causal_model():
    shapes = MASKED.param_shapes()["params"]
    mask = shapes.pop("mask_embed")
    assert mask.shape == (24,)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, MODEL.param_shapes()["params"])


def test_the_masked_sampler_is_maskgits_loop(filled):
    """All cells drawn at each pass, the most certain kept: in numpy, by whole passes; one trace for labels and settings."""
    params, logits = filled
    steps, choice, key = 3, 2.0, jax.random.key(3)
    sampler = MaskedSubVocabularySampler(generator=MASKED, tokenizer=None, steps=steps, choice_temperature=choice)
    traces = MaskedSubVocabularySampler._sample._cache_size()
    weights = np.array([0.5, 1.5, 3.0], np.float32)
    got = np.asarray(sampler({"generator": params}, key, LABELS, SETTINGS._replace(cfg=weights))[1])

    tokens, rows = np.full((B, 4, N), MASKED.mask), jnp.arange(B)
    for i in range(steps):
        flat = tokens.reshape(B, -1)
        mixed = (1 + weights[i]) * logits(flat) - weights[i] * logits(flat, np.full(B, 3, np.int32))
        law = mixed.reshape(B, 4, N, V) / SETTINGS.temperature
        law = np.where(law >= np.sort(law)[..., -SETTINGS.top_k, None], law, -np.inf)
        law = law - np.log(np.exp(law).sum(-1, keepdims=True))
        at = jnp.arange(4) + 4 * i
        drawn = np.argmax(law + np.asarray(gumbel(key, rows, at, N * V)).reshape(law.shape), -1)
        certain = np.take_along_axis(law, drawn[..., None], -1)[..., 0].mean(-1)
        certain = certain + choice * (1 - (i + 1) / steps) * np.asarray(gumbel(key, rows, at, 1, stream=ORDER))[..., 0]
        stay = max(1, math.floor(4 * math.cos(math.pi / 2 * (i + 1) / steps) + 1e-6)) if i + 1 < steps else 0
        for b in range(B):
            open_ = np.flatnonzero(tokens[b, :, 0] == MASKED.mask)
            kept = open_[np.argsort(-certain[b, open_])][: len(open_) - min(stay, len(open_) - 1) if stay else None]
            tokens[b, kept] = drawn[b, kept]
    np.testing.assert_array_equal(got, tokens.reshape(B, -1))
    assert got.max() < V
    for change in ({"cfg": weights + 5}, {"temperature": 5.0}, {"top_k": 1}):
        settings = SETTINGS._replace(**{"cfg": weights} | change)
        assert np.any(sampler({"generator": params}, key, LABELS, settings)[1] != got), change
    assert np.any(sampler({"generator": params}, key, LABELS[::-1], SETTINGS._replace(cfg=weights))[1] != got)
    assert MaskedSubVocabularySampler._sample._cache_size() == traces + 1
    with pytest.raises(ValueError, match=r"cfg of shape \(12,\): expected one weight, or 3, one a pass"):
        sampler({"generator": params}, key, LABELS, SETTINGS._replace(cfg=np.ones(12)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=0), "steps=0: expected 1 to 4 passes"),
        (dict(steps=5), "steps=5: expected 1 to 4 passes"),
        (dict(choice_temperature=-1.0), "choice_temperature=-1.0: expected a number that is not negative"),
    ],
)
def test_bad_passes(change, message):
    with pytest.raises(ValueError, match=message):
        MaskedSubVocabularySampler(**dict(generator=MASKED, tokenizer=None, steps=4) | change)
