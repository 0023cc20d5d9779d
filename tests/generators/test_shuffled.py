"""Token-Shuffle: what a window sees, cached steps, and the compiled loop against one in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View, gumbel, sample_tokens
from jaxgen.generators import ShuffledSampler, ShuffledTransformer, next_token_sampler
from jaxgen.nn import window_order
from jaxgen.orders import blocks
from jaxgen.tokenizers import MultiScaleTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, VOCAB, CLASSES, S = 3, 9, 4, 2
MODEL = ShuffledTransformer(
    vocab=VOCAB, num_classes=CLASSES, length=16, width=16, heads=2, depth=2, scan_layers=True, window=S, mixing=1
)
ORDER = window_order((4, 4), S)
WINDOW_OF = np.argsort(ORDER) // S**2  # of each cell in raster order
LABELS = np.array([0, 3, 2], np.int32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, 16)).astype(np.int32)
SETTINGS = Settings(cfg=1.5, temperature=0.9, top_k=5, top_p=0.0)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(jax.eval_shape(MODEL.init, jax.random.key(0), LABELS, TOKENS)))


@pytest.fixture(scope="module")
def full(params):
    run = jax.jit(MODEL.apply)
    return lambda tokens, labels=LABELS: np.asarray(run(params, labels, tokens))


@pytest.fixture(scope="module")
def sampler():
    tokenizer = MultiScaleTokenizer(
        ch=4, ch_mult=(1,), res_blocks=1, attention=False, groups=4, vocab=VOCAB, width=4, patch_nums=(4,), phis=1, channels=1
    )
    return ShuffledSampler(generator=MODEL, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def variables(params, sampler, randomize):
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), np.float32)
    abstract = jax.eval_shape(sampler.tokenizer.init, jax.random.key(0), image)
    return {"generator": params, "tokenizer": jax.device_put(randomize(abstract, seed=1))}


def test_a_window_sees_the_class_and_earlier_windows(full):
    whole = full(TOKENS)
    assert whole.shape == (B, 16, VOCAB) and whole.dtype == np.float32
    for cell in range(16):
        changed = TOKENS.copy()
        changed[:, cell] = (changed[:, cell] + 1) % VOCAB
        moved = np.abs(full(changed) - whole).max(axis=(0, 2)) > 1e-4
        np.testing.assert_array_equal(moved, WINDOW_OF > WINDOW_OF[cell])
    assert np.all(np.abs(full(TOKENS, (LABELS + 1) % CLASSES) - whole).max(-1) > 1e-3)


def test_the_transformer_runs_on_windows(params):
    assert MODEL.order.steps == 4 and MODEL.order.length == 16
    assert params["params"]["position"].shape == (4, 16)
    assert MODEL.init_cache(2).k.shape == (2, 2, 4, 2, 8)


def test_cached_steps_in_pieces_are_the_whole(params, full):
    @jax.jit
    def run(params, tokens):
        cache, out, start = MODEL.init_cache(B), [], 0
        before = jnp.concatenate([jnp.full((B, S**2), -1), tokens[:, : -(S**2)]], axis=1)
        for n in (1, 2, 1):
            first, end = start * S**2, (start + n) * S**2
            view = View(before[:, first:end], jnp.arange(first, end), jnp.tril(jnp.ones((n, n), bool)))
            result, cache = MODEL.apply(params, cache, view, LABELS, method="step")
            cache, start = cache.commit(n), start + n
            out.append(result.params)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(run(params, TOKENS[:, ORDER]), full(TOKENS)[:, ORDER], atol=1e-5)


def test_the_compiled_loop_is_the_python_loop_and_traces_once(sampler, variables, full, monkeypatch):
    traces = []
    monkeypatch.setattr(next_token_sampler, "sample_tokens", lambda *a, **k: traces.append(1) or sample_tokens(*a, **k))
    key = jax.random.key(3)
    images, got = sampler(variables, key, LABELS, SETTINGS)
    assert images.shape == (B, 4, 4, 1)

    noise = np.asarray(gumbel(key, jnp.arange(B), jnp.arange(16), VOCAB))  # at places in the order of the windows
    tokens, null = np.zeros((B, 16), np.int32), np.full(B, CLASSES, np.int32)
    for start in range(0, 16, S**2):
        logits = (1 + SETTINGS.cfg) * full(tokens) - SETTINGS.cfg * full(tokens, null)
        for place in range(start, start + S**2):
            cell = ORDER[place]
            for b in range(B):
                law = logits[b, cell] / SETTINGS.temperature
                best = np.argsort(-law)[: SETTINGS.top_k]
                tokens[b, cell] = best[np.argmax(law[best] + noise[b, place, best])]
    np.testing.assert_array_equal(got, tokens)

    assert np.any(sampler(variables, key, LABELS[::-1], SETTINGS)[1] != got)
    for change in ({"cfg": 4.0}, {"temperature": 5.0}, {"top_k": 1}):
        assert np.any(sampler(variables, key, LABELS, SETTINGS._replace(**change))[1] != got), change
    assert len(traces) == 1


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="window=3: must divide both sides of the grid, 4 x 4"):
        MODEL.clone(window=3)
    with pytest.raises(ValueError, match="window=4: its square must divide the width, 24"):
        MODEL.clone(window=4, width=24)
    with pytest.raises(ValueError, match="length=8: tokens of a square grid"):
        MODEL.clone(length=8)
    with pytest.raises(ValueError, match=r"merged=True: expected steps of one size, not \[1, 2\]"):
        sample_tokens(None, params=None, cache=None, cond=None, batch=1, order=blocks(5, 2), key=jax.random.key(0), merged=True)
