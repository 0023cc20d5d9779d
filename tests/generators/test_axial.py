"""The Axial Transformer: an exact factorisation, the outer decoder row by row, and a sampler whose law is the model's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, gumbel
from jaxgen.generators import AxialSampler, AxialTransformer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, ROWS, COLUMNS, VOCAB, CLASSES = 2, 3, 2, 7, 4
N = ROWS * COLUMNS
MODEL = AxialTransformer(vocab=VOCAB, num_classes=CLASSES, grid=(ROWS, COLUMNS), width=16, heads=2, depth=2, scan_layers=True)
LABELS = np.array([0, 3], np.int32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, N)).astype(np.int32)
# A weight of guidance for each position.
SETTINGS = Settings(cfg=np.linspace(0.5, 2.0, N, dtype=np.float32), temperature=0.9, top_k=5, top_p=0.0)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(MODEL.param_shapes()))


@pytest.fixture(scope="module")
def full(params):
    run = jax.jit(MODEL.apply)
    return lambda tokens, labels=LABELS: np.asarray(run(params, labels, tokens))


def test_every_law_depends_on_all_tokens_before_it_and_no_other(full):
    whole = full(TOKENS)
    assert whole.shape == (B, N, VOCAB) and whole.dtype == np.float32
    for place in range(N):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % VOCAB
        moved = np.abs(full(changed) - whole).max(axis=(0, 2)) > 1e-5
        np.testing.assert_array_equal(moved, np.arange(N) > place)
    assert np.all(np.abs(full(TOKENS, (LABELS + 1) % CLASSES) - whole).max(-1) > 1e-3)


def test_what_a_row_reads_of_those_above_is_what_training_computes(randomize):
    """Two pairs of outer blocks, a row at a time, against all rows at once."""
    model = MODEL.clone(outer=2, scan_layers=False)
    variables = jax.device_put(randomize(model.param_shapes()))

    @jax.jit
    def both(variables):
        def together(model):
            cells = TOKENS.reshape(B, ROWS, COLUMNS)
            x = model.token_embed(cells) + model.row_position[:, None] + model.column_position
            return model._outer(x, model.class_embed(LABELS))[0]

        told, caches = [], tuple(model.init_caches(B))
        for row in range(ROWS):
            above = TOKENS.reshape(B, ROWS, COLUMNS)[:, max(row - 1, 0)]
            context, caches = model.apply(variables, caches, above, jnp.int32(row), LABELS, method="enter")
            told.append(context)
        return model.apply(variables, method=together), jnp.stack(told, axis=1)

    want, got = both(variables)
    assert not got[:, 0].any()
    np.testing.assert_allclose(got[:, 1:], want[:, :-1], atol=1e-5)
    assert np.abs(want).max() > 0.1


def test_the_semi_parallel_sampler_draws_from_the_model(params, full):
    """Against a loop over full forward passes with the same noise; compiled once for all labels and settings."""
    key, sampler = jax.random.key(3), AxialSampler(generator=MODEL, tokenizer=None)
    traces = AxialSampler._sample._cache_size()
    got = np.asarray(sampler({"generator": params}, key, LABELS, SETTINGS)[1])

    draw = jax.jit(lambda row: gumbel(jax.random.fold_in(key, row), jnp.arange(B), jnp.arange(COLUMNS), VOCAB))
    noise = np.stack([draw(row) for row in range(ROWS)])
    tokens, null = np.zeros((B, N), np.int32), np.full(B, CLASSES, np.int32)
    for row, column in itertools.product(range(ROWS), range(COLUMNS)):
        place = row * COLUMNS + column
        weight = SETTINGS.cfg[place]
        logits = ((1 + weight) * full(tokens) - weight * full(tokens, null))[:, place] / SETTINGS.temperature
        for b in range(B):
            best = np.argsort(-logits[b])[: SETTINGS.top_k]
            tokens[b, place] = best[np.argmax(logits[b, best] + noise[row, b, column, best])]
    np.testing.assert_array_equal(got, tokens)

    for change in ({"cfg": SETTINGS.cfg + 5}, {"temperature": 5.0}, {"top_k": 1}):
        assert np.any(sampler({"generator": params}, key, LABELS, SETTINGS._replace(**change))[1] != got), change
    assert np.any(sampler({"generator": params}, key, LABELS[::-1], SETTINGS)[1] != got)
    assert AxialSampler._sample._cache_size() == traces + 1


@pytest.mark.parametrize("change", [dict(grid=(3, 0)), dict(grid=(3,)), dict(outer=0)])
def test_sizes_that_do_not_fit(change):
    with pytest.raises(ValueError, match="grid=.*, outer=.: expected rows, columns and at least one pair"):
        MODEL.clone(**change)
