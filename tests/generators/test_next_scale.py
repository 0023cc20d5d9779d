"""The next-scale transformer: equations, causality, cached steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import masks
from jaxgen.decoding import View
from jaxgen.generators import NextScaleTransformer
from jaxgen.nn import AdaLNHead, AdaLNTransformer

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def features(tiny):
    return RNG.normal(size=(4, 13, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def full(tiny):
    run = jax.jit(tiny.generator.apply)
    return lambda labels, features: np.asarray(run(tiny.params["generator"], labels, features))


@pytest.fixture(scope="module")
def whole(tiny, full, features):
    return full(tiny.labels, features)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_logits_from_the_parts(tiny, randomize, features, l2_norm):
    """Embeddings in NumPy, then the transformer and the head, which have tests of their own."""
    generator = tiny.generator.clone(l2_norm=l2_norm, shared_adaln=not l2_norm, scan_layers=False)
    params = randomize(generator.param_shapes(6))
    p = params["params"]
    cond = p["class_embed"]["embedding"][tiny.labels]
    x = np.concatenate([cond[:, None] + p["start"], features @ p["word_embed"]["kernel"] + p["word_embed"]["bias"]], axis=1)
    x = x + p["position"] + p["level"][[0] + [1] * 4 + [2] * 9]
    scale = {} if l2_norm else {"attention_scale": 0.25 / np.sqrt(16)}  # the authors' factor
    transformer = AdaLNTransformer(
        32, 2, 2, l2_norm=l2_norm, shared_adaln=not l2_norm, mask=masks.block_causal(generator.order), **scale
    )

    @jax.jit
    def parts(p, x, cond):
        x, _ = transformer.apply({"params": p["transformer"]}, x, cond)
        return AdaLNHead(16).apply({"params": p["head"]}, x, cond)

    got = jax.jit(generator.apply)(params, tiny.labels, features)
    assert got.shape == (4, 14, 16) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, parts(p, x, cond), atol=1e-5)


def test_a_scale_sees_itself_and_earlier_ones_only(tiny, full, whole, features):
    ends = tiny.generator.order.ends
    for step in (1, 2):
        start = ends[step - 1]
        changed = features.copy()
        changed[:, start - 1] += 3.0  # the first cell of the scale; features start at the second scale
        new = full(tiny.labels, changed)
        np.testing.assert_array_equal(new[:, :start], whole[:, :start])
        assert np.all(np.abs(new - whole)[:, start:].max(-1) > 1e-4)  # every later position feels it, the last cell too


def test_the_label_reaches_every_position(tiny, full, whole, features):
    new = full((tiny.labels + 1) % 4, features)
    assert np.all(np.abs(new - whole).max(-1) > 1e-3)


@pytest.mark.parametrize("traced", [False, True])
def test_cached_steps_are_the_full_forward(tiny, whole, features, traced):
    """With a static cache length, and with traced ones that differ in nothing but how they are known."""
    order, generator = tiny.generator.order, tiny.generator
    parts = [np.zeros((4, 1, 6), np.float32), features[:, :4], features[:, 4:]]

    @jax.jit
    def run(params, labels, parts, offsets):
        cache, out = generator.init_cache(4), []
        if traced:
            cache = type(cache)(cache.k, cache.v, offsets)
        for step, part in enumerate(parts):
            view = View(part, jnp.arange(*order.span(step)), time=step)
            result, cache = generator.apply(params, cache, view, labels, method="step")
            cache = cache.commit(part.shape[1])
            out.append(result.params)
        assert result.feats.shape == (4, 9, 32)
        return jnp.concatenate(out, axis=1), cache.length

    logits, length = run(tiny.params["generator"], tiny.labels, parts, jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(length, [14] * 4)
    np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_scanned_layers_are_the_unrolled_ones(tiny, whole, features):
    generator = tiny.generator.clone(scan_layers=False)
    p = dict(tiny.params["generator"]["params"])
    blocks = p["transformer"]["blocks"]
    p["transformer"] = {f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(2)}
    got = jax.jit(generator.apply)({"params": p}, tiny.labels, features)
    np.testing.assert_allclose(got, whole, atol=1e-5)


def test_half_precision_is_close_and_ends_in_float32(tiny, whole, features):
    half = tiny.generator.clone(dtype=jnp.bfloat16)
    got = jax.jit(half.apply)(tiny.params["generator"], tiny.labels, features)
    assert got.dtype == jnp.float32 and half.init_cache(2).k.dtype == jnp.bfloat16
    error = np.abs(got - whole).max() / np.abs(whole).max()
    assert 1e-4 < error < 0.05, error


def test_drop_path_is_for_training(tiny, whole, features):
    generator = tiny.generator.clone(drop_path_rate=0.5)
    apply = jax.jit(generator.apply, static_argnames="train")
    params = tiny.params["generator"]
    trained = apply(params, tiny.labels, features, train=True, rngs={"dropout": jax.random.key(0)})
    assert np.abs(trained - whole).max() > 0.1
    np.testing.assert_allclose(apply(params, tiny.labels, features), whole, atol=1e-5)


def test_the_cache_has_room_for_all_scales(tiny):
    cache = tiny.generator.init_cache(6)
    assert cache.k.shape == cache.v.shape == (2, 6, 14, 2, 16) and cache.length == 0


def test_initial_scales():
    sizes = dict(vocab=64, num_classes=500, patch_nums=(1, 16), width=48, heads=2, depth=2)
    generator = NextScaleTransformer(**sizes, scan_layers=True)
    init = jax.jit(lambda key, module: module.init(key, jnp.zeros(1, jnp.int32), jnp.zeros((1, 256, 8))), static_argnums=1)
    p = init(jax.random.key(0), generator)["params"]
    std = (1 / (3 * 48)) ** 0.5
    for leaf in (p["class_embed"]["embedding"], p["position"], p["word_embed"]["kernel"]):
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.1)
    np.testing.assert_allclose(np.std(p["head"]["head"]["kernel"]), 0.02 * std, rtol=0.1)
    ada = p["transformer"]["blocks"]["ada"]["dense"]["kernel"].std(axis=(0, 1, 3))
    np.testing.assert_allclose(ada, np.array([1e-3] * 2 + [0.5] * 4) * std, rtol=0.1)
    assert generator == NextScaleTransformer(**sizes, scan_layers=True)
    assert hash(generator) == hash(NextScaleTransformer(**sizes, scan_layers=True))
