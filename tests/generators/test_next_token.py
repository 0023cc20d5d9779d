"""The next-token baseline: causality, cached steps, and the compiled loop against one in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View, gumbel, sample_tokens
from jaxgen.generators import NextTokenTransformer

pytestmark = pytest.mark.numeric

B, LENGTH, VOCAB, CLASSES = 3, 6, 9, 4
MODEL = NextTokenTransformer(vocab=VOCAB, num_classes=CLASSES, length=LENGTH, width=16, heads=2, depth=2, scan_layers=True)
LABELS = np.array([0, 3, 2], np.int32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, LENGTH)).astype(np.int32)
KEY = jax.random.key(3)
SETTINGS = Settings(cfg=1.5, temperature=0.9, top_k=5, top_p=0.8)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(jax.eval_shape(MODEL.init, jax.random.key(0), LABELS, TOKENS)))


@pytest.fixture(scope="module")
def full(params):
    run = jax.jit(MODEL.apply)
    return lambda labels, tokens: np.asarray(run(params, labels, tokens))


noise = jax.jit(lambda key: gumbel(key, jnp.arange(B), jnp.arange(LENGTH), VOCAB))


@functools.partial(jax.jit, static_argnames="batch")
def _sample(params, labels, key, settings, batch):
    return sample_tokens(
        functools.partial(MODEL.apply, method="step"),
        params=params,
        cache=MODEL.init_cache(2 * batch),
        cond=jnp.concatenate([labels, jnp.full_like(labels, CLASSES)]),
        batch=batch,
        order=MODEL.order,
        key=key,
        settings=settings,
    )


@pytest.fixture(scope="module")
def sample(params):
    def run(settings=SETTINGS, labels=LABELS, key=KEY):
        return np.asarray(_sample(params, jnp.asarray(labels), key, Settings(*map(jnp.float32, settings)), len(labels)))

    return run


def test_a_position_sees_the_class_and_earlier_tokens(full):
    whole = full(LABELS, TOKENS)
    assert whole.shape == (B, LENGTH, VOCAB) and whole.dtype == np.float32
    for i in range(LENGTH):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % VOCAB
        moved = np.abs(full(LABELS, changed) - whole).max(axis=(0, 2))
        np.testing.assert_array_equal(moved > 1e-4, np.arange(LENGTH) > i)
    assert np.all(np.abs(full((LABELS + 1) % CLASSES, TOKENS) - whole).max(-1) > 1e-3)


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [2, 1, 3]])
def test_cached_steps_are_the_full_forward(params, full, pieces):
    @jax.jit
    def run(params, labels, tokens):
        cache, out, start = MODEL.init_cache(B), [], 0
        before = jnp.concatenate([jnp.full((B, 1), -1), tokens[:, :-1]], axis=1)
        for n in pieces:
            pos = jnp.arange(start, start + n)
            view = View(before[:, start : start + n], pos, mask=jnp.tril(jnp.ones((n, n), bool)))
            result, cache = MODEL.apply(params, cache, view, labels, method="step")
            cache, start = cache.commit(n), start + n
            out.append(result.params)
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(run(params, LABELS, TOKENS), full(LABELS, TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    "settings", [SETTINGS, Settings(0.0, 1.0, 0, 0.0), Settings(2.0, 1.0, 1, 0.0)], ids=["all", "plain", "greedy"]
)
def test_the_compiled_loop_is_the_python_loop(full, sample, settings):
    whole_noise = np.asarray(noise(KEY))
    tokens = np.zeros((B, LENGTH), np.int32)
    for i in range(LENGTH):
        conditional, unconditional = (
            np.float64(full(labels, tokens)[:, i]) for labels in (LABELS, np.full(B, CLASSES, np.int32))
        )
        logits = ((1 + settings.cfg) * conditional - settings.cfg * unconditional) / settings.temperature
        for b in range(B):
            order = np.argsort(-logits[b])[: settings.top_k or None]
            if settings.top_p:
                law = np.exp(logits[b, order]) / np.exp(logits[b, order]).sum()
                order = order[np.cumsum(law) - law < settings.top_p]
            tokens[b, i] = order[np.argmax(logits[b, order] + whole_noise[b, i, order])]
    np.testing.assert_array_equal(sample(settings), tokens)


def test_settings_matter_and_share_a_program(sample):
    usual, before = sample(), _sample._cache_size()
    for change in ({"cfg": 4.0}, {"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.1}):
        assert np.any(sample(SETTINGS._replace(**change)) != usual), change
    assert np.any(sample(key=jax.random.key(4)) != usual)
    assert _sample._cache_size() == before


def test_guidance_for_each_position(sample):
    """A weight has a say in the tokens from its position on, and equal ones are one."""
    usual = sample()
    np.testing.assert_array_equal(sample(SETTINGS._replace(cfg=np.full(LENGTH, SETTINGS.cfg))), usual)
    late = sample(SETTINGS._replace(cfg=np.where(np.arange(LENGTH) < 3, SETTINGS.cfg, -9.0)))
    np.testing.assert_array_equal(late[:, :3], usual[:, :3])
    assert np.any(late[:, 3:] != usual[:, 3:])


def test_a_row_does_not_depend_on_its_batch(sample):
    usual = sample()
    np.testing.assert_array_equal(sample(labels=LABELS[:2]), usual[:2])
    np.testing.assert_array_equal(sample(labels=LABELS[[0, 2, 1]])[0], usual[0])
    same = sample(Settings(cfg=0.0), labels=np.array([1, 1, 1]))
    assert np.any(same[0] != same[1]) and np.any(same[1] != same[2])


def test_scanned_layers_are_the_unrolled_ones(params, full):
    p = dict(params["params"])
    blocks = p["transformer"]["blocks"]
    p["transformer"] = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(2)}
    got = jax.jit(MODEL.clone(scan_layers=False).apply)({"params": p}, LABELS, TOKENS)
    np.testing.assert_allclose(got, full(LABELS, TOKENS), atol=1e-5)


def test_the_size_of_its_parts(params):
    """The baseline differs from the next-scale model in its embeddings alone."""
    p = params["params"]
    assert set(p) == {"token_embed", "class_embed", "position", "transformer", "head"}
    assert p["token_embed"]["embedding"].shape == (VOCAB, 16) and p["class_embed"]["embedding"].shape == (
        CLASSES + 1,
        16,
    )
    assert p["position"].shape == (LENGTH, 16)
    assert MODEL.init_cache(2).k.shape == (2, 2, LENGTH, 2, 8)
