"""The Llama of image tokens: steps with a cache are the whole, nothing looks ahead, and captions stand in front."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View
from jaxgen.generators import ImageLlama, NextTokenSampler
from jaxgen.nn import Context, rotate
from jaxgen.tokenizers import FlexibleTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SIZES = dict(vocab=11, grid=3, width=32, heads=4, depth=2, kv_heads=2, scan_layers=True)
CLASSES, CAPTIONS = ImageLlama(**SIZES, num_classes=5), ImageLlama(**SIZES, caption_width=6, prefix=4)
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)
FEATURES = np.random.default_rng(1).standard_normal((2, 4, 6)).astype(np.float32)
# A caption of two words, whose padding is given on the right, and one of four.
WORDS = Context(FEATURES, np.array([[True, True, False, False], [True] * 4]))
CONDITIONS = {CLASSES: np.array([1, 5], np.int32), CAPTIONS: WORDS}


@pytest.fixture(scope="module", params=[CLASSES, CAPTIONS], ids=["classes", "captions"])
def case(request, randomize):
    model = request.param
    return model, jax.device_put(randomize(model.param_shapes())), CONDITIONS[model]


def test_steps_with_a_cache_are_the_whole(case):
    model, params, cond = case
    whole = jax.jit(model.apply)(params, cond, TOKENS)
    assert whole.shape == (2, 9, 11) and whole.dtype == jnp.float32

    @jax.jit
    def steps(params, cond):
        cache, out = model.apply(params, model.init_cache(2), cond, method="begin"), []
        for i in range(9):
            view = View(TOKENS[:, max(i - 1, 0)][:, None], jnp.array([i]))
            law, cache = model.apply(params, cache, view, cond, method="step")
            cache, out = cache.commit(1), [*out, law.params]
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(steps(params, cond), whole, atol=2e-5)


def test_nothing_looks_ahead_and_the_condition_is_read(case):
    model, params, cond = case
    logits = jax.jit(model.apply)
    changed = np.concatenate([TOKENS[:, :4], 10 - TOKENS[:, 4:]], axis=1)
    base, changed = logits(params, cond, TOKENS), logits(params, cond, changed)
    np.testing.assert_array_equal(base[:, :5], changed[:, :5])
    assert not np.allclose(base[:, 5:], changed[:, 5:])
    twice = np.array([2.0, 1, 1, 1], np.float32)[:, None]
    other = cond - 1 if model.num_classes else Context(cond.features * twice, cond.mask)
    assert not np.allclose(base[:, 0], logits(params, other, TOKENS)[:, 0])


def test_dropped_conditions_say_nothing(case):
    """A dropped caption has the learned features in place of its own, and is as long as it was."""
    model, params, cond = case
    dropped = model.apply(params, cond, np.array([True, False]), method="drop")
    if model.num_classes:
        return np.testing.assert_array_equal(dropped, [5, 5])
    np.testing.assert_array_equal(dropped.features, [params["params"]["no_caption"], FEATURES[1]])
    np.testing.assert_array_equal(dropped.mask, [[False, False, True, True], [True] * 4])


@pytest.mark.parametrize("grid", [3, (9,)])
def test_padding_is_nowhere(randomize, grid):
    """A short caption among longer ones is what it is to a model of short captions, on whichever side it is padded."""
    long = CAPTIONS.clone(grid=grid)
    short, params = long.clone(prefix=2), jax.device_put(randomize(long.param_shapes()))
    few = {"params": params["params"] | {"no_caption": params["params"]["no_caption"][:2]}}
    want = jax.jit(short.apply)(few, Context(FEATURES[:, :2], np.ones((2, 2), bool)), TOKENS)
    places = ([0, 1], [2, 3], [0, 3])
    for at in places:
        features, mask = np.full((2, 4, 6), 9.0, np.float32), np.zeros((2, 4), bool)
        features[:, at], mask[:, at] = FEATURES[:, :2], True
        np.testing.assert_allclose(jax.jit(long.apply)(params, Context(features, mask), TOKENS), want, atol=1e-5)


def test_what_is_no_place_turns_to_nothing():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    pos = jnp.array([[[-1, -1], [0, 0], [1, 2]]])
    turned = rotate(x, pos)
    assert not turned[:, 0].any()
    np.testing.assert_allclose(turned[:, 1], x[:, 1], atol=1e-6)
    assert turned[:, 2].all() and not np.allclose(turned[:, 2], x[:, 2])


def test_sampling_compiles_once_and_guidance_mixes_logits(case):
    model, params, cond = case
    tokenizer = FlexibleTokenizer(ch=8, ch_mult=(1,), res_blocks=1, groups=4, z_channels=4, vocab=11, width=4, patch_nums=(3,))
    image = jax.ShapeDtypeStruct((1, 3, 3, 3), np.float32)
    given = {"generator": params, "tokenizer": jax.jit(tokenizer.init)(jax.random.key(0), jnp.zeros(image.shape))}
    sampler, traces = NextTokenSampler(generator=model, tokenizer=tokenizer), NextTokenSampler._sample._cache_size()
    images, tokens = sampler(given, jax.random.key(0), cond, Settings(cfg=1.5, top_k=1))
    sampler(given, jax.random.key(1), jax.tree.map(lambda x: x[::-1], cond), Settings(cfg=0.5, temperature=0.7, top_p=0.9))
    assert images.shape == (2, 3, 3, 3) and NextTokenSampler._sample._cache_size() == traces + 1
    # The most likely token at each place, given those before: (1 + t) conditional - t unconditional.
    logits = jax.jit(model.apply)
    null = model.apply(params, cond, np.ones(2, bool), method="drop")
    mixed = 2.5 * logits(params, cond, tokens) - 1.5 * logits(params, null, tokens)
    np.testing.assert_array_equal(mixed.argmax(-1), tokens)


def test_bad_input(case):
    model, params, _ = case
    for fields in (dict(), dict(num_classes=2, caption_width=3), dict(num_classes=2, prefix=3)):
        with pytest.raises(ValueError, match="expected classes, which are one vector, or captions"):
            ImageLlama(**SIZES, **fields)
    tokenizer = FlexibleTokenizer(ch=8, ch_mult=(1,), groups=4, vocab=11, width=4, patch_nums=(3,))
    sampler = NextTokenSampler(generator=model, tokenizer=tokenizer)
    long = Context(np.zeros((1, 9, 6)), np.ones((1, 9), bool))
    refused = [(np.array([7]), "label 7 is out of range")]
    if not model.num_classes:
        refused = [(long, r"captions \(1, 9, 6\) with a mask \(1, 9\)"), (FEATURES, "captions of type ndarray")]
    for given, message in refused:
        with pytest.raises(ValueError, match=message):
            sampler({}, jax.random.key(0), given)


def test_dropout_is_for_training(randomize):
    """Each rate matters by itself, and only while training."""
    model, params, cond = CLASSES, jax.device_put(randomize(CLASSES.param_shapes())), CONDITIONS[CLASSES]
    dropped = []
    for rates in (dict(token_dropout=0.5), dict(dropout=0.5), dict(dropout=0.5, remat=True)):
        noisy = model.clone(**rates)
        train = jax.jit(lambda params, key, noisy=noisy: noisy.apply(params, cond, TOKENS, train=True, rngs={"dropout": key}))
        first, second = (np.asarray(train(params, jax.random.key(i))) for i in (0, 1))
        assert np.any(np.abs(first - second) > 1e-3)
        dropped.append(first)
    np.testing.assert_allclose(dropped[1], dropped[2], atol=1e-5)
    assert np.any(np.abs(dropped[0] - dropped[1]) > 1e-3)
    np.testing.assert_array_equal(jax.jit(noisy.apply)(params, cond, TOKENS), jax.jit(model.apply)(params, cond, TOKENS))


def test_places_in_one_and_three_dimensions(case):
    """A model of one axis turns as a plain language model does, one of three by frame, row and column."""
    model, params, cond = case
    logits = [jax.jit(model.clone(grid=grid).apply)(params, cond, TOKENS) for grid in ((3, 3), (9,))]
    np.testing.assert_array_equal(logits[0], jax.jit(model.apply)(params, cond, TOKENS))
    assert np.any(np.abs(logits[0] - logits[1]) > 1e-4)
    line = model.clone(grid=(9,))._coords[:, 0]
    np.testing.assert_array_equal(line, np.arange(9 + model.prefix) - model.prefix)
    clip = model.clone(grid=(2, 3, 1))
    np.testing.assert_array_equal(clip._coords[model.prefix :], [[0, i, 0] for i in range(3)] + [[1, i, 0] for i in range(3)])
    assert clip.length == clip.order.steps == 6 and not (clip._coords[: model.prefix] + 1).any()
