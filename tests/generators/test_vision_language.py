"""The vision-language model: cached = full, and drafts from compressed pictures that change nothing but the number of calls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, View, check_step
from jaxgen.decoding.topology import RuntimeTree
from jaxgen.generators.feature_drafter import FeatureDraft, FeatureDrafter
from jaxgen.generators.sequence_sampler import stepper
from jaxgen.generators.vision_language import PictureDraft, VisionLanguageModel, VisionLanguageSampler
from jaxgen.nn.compression import ElasticCompressor

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = VisionLanguageModel(vocab=5, width=16, heads=2, depth=2, image_size=(8, 16), channels=(4, 6))
COMPRESSOR = ElasticCompressor(grid=MODEL.grid, ways=("prune", "pool", "drop"))
DRAFTER = FeatureDrafter(width=16, heads=2, compressor=COMPRESSOR)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, 8, 16, 1)).astype(np.float32)


def initialise(drafter, text, visual):
    left = drafter.see(visual, visual, text[:, 0])
    return drafter(text, text, prefix=left.tokens, count=left.count)


@pytest.fixture(scope="module")
def params(randomize):
    vectors = jnp.zeros((1, 8, 16))
    shapes = {
        "generator": jax.eval_shape(MODEL.init, jax.random.key(0), IMAGES[:1], jnp.zeros((1, 4), jnp.int32)),
        "drafter": jax.eval_shape(lambda: DRAFTER.init(jax.random.key(0), vectors, vectors, method=initialise)),
    }
    return {name: randomize(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def sampler():
    return VisionLanguageSampler(model=MODEL, stop=(2,))


@pytest.mark.slow
def test_cached_is_full(params, sampler):
    tokens = np.random.default_rng(1).integers(0, 5, (6, 7))
    want = jax.jit(lambda: MODEL.apply(params["generator"], IMAGES, tokens))()
    visual = MODEL.apply(params["generator"], IMAGES, method="look")
    cache = MODEL.init_cache(6, MODEL.visual_tokens + 13)
    features, cache = MODEL.apply(params["generator"], cache, visual, method="prefix")
    full = jax.jit(lambda: MODEL.apply(params["generator"], visual, tokens, method="features"))()
    np.testing.assert_allclose(features, full[:, : MODEL.visual_tokens], atol=1e-5)

    view = View(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(7), (6, 7)), jnp.tril(jnp.ones((7, 7), bool)))
    out, _ = jax.jit(stepper(MODEL))(params["generator"], cache, view, None)
    np.testing.assert_allclose(out.params, want, atol=1e-4)
    other = jax.jit(lambda: MODEL.apply(params["generator"], IMAGES[::-1], tokens))()
    assert np.abs(other - want).max() > 1e-2


@pytest.mark.slow
def test_its_step_keeps_the_contract(params):
    visual = MODEL.apply(params["generator"], IMAGES[:2], method="look")
    cache = MODEL.init_cache(2, MODEL.visual_tokens + 13)
    _, cache = MODEL.apply(params["generator"], cache, visual, method="prefix")
    # The contract counts positions of text; a cache that holds the picture is where it starts.
    cache = dataclasses.replace(cache, length=jnp.full((2,), MODEL.visual_tokens))
    check_step(stepper(MODEL), params=params["generator"], cache=cache, cond=None, batch=2, vocab=5)


@pytest.mark.slow
def test_drafts_from_pictures_change_nothing(params, sampler):
    """The tokens of plain sampling, with different numbers of visual tokens a row, in one trace for two temperatures."""
    draft = FeatureDraft(MODEL, DRAFTER, RuntimeTree(5, 3), Coupled(), beam=2)
    method = PictureDraft(draft)
    seen, _ = sampler.see(params, IMAGES)
    prompt = np.array([[1, 3], [0, 1], [4, 4], [1, 0], [3, 3], [0, 4]])
    counts = np.asarray(method.look(params, prompt, seen).count)
    assert len(set(counts.tolist())) > 1
    drafted = dataclasses.replace(sampler, method=method)
    traces = VisionLanguageSampler._sample._cache_size()
    for temperature in (0.7, 1.2):
        want, got = (
            s(params, jax.random.key(2), IMAGES, prompt, [2, 1, 2, 2, 1, 2], max_length=10, temperature=temperature)
            for s in (sampler, drafted)
        )
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert int(got.row_calls.sum()) < int(want.row_calls.sum())
    assert VisionLanguageSampler._sample._cache_size() == traces + 2


@pytest.mark.slow
def test_the_drafter_sees_what_it_was_trained_on(params, sampler):
    """Features that a cache gives are those of the whole sequence, the compressed picture before it."""
    method = PictureDraft(FeatureDraft(MODEL, DRAFTER, RuntimeTree(2, 1), beam=2))
    seen, _ = sampler.see(params, IMAGES)
    prompt = jnp.array([[1], [0], [4], [1], [3], [0]])
    left = method.look(params, prompt, seen)
    proposer, _ = method(params, prompt, 8, seen)
    embedded = MODEL.apply(params["generator"], prompt, method=lambda module, x: module.embed(x))
    whole = DRAFTER.apply(params["drafter"], embedded, jnp.zeros_like(embedded), prefix=left.tokens, count=left.count)
    drafter = proposer.drafter
    cache, state, _, first = drafter.start(6)
    _, x = drafter.fuse(state, prompt, first)
    got, _ = drafter.read(x, jnp.zeros((6, 1), jnp.int32), cache, jnp.ones((1, 1), bool))
    np.testing.assert_allclose(got, whole, atol=1e-4)
    moved = DRAFTER.apply(params["drafter"], embedded, jnp.zeros_like(embedded), prefix=left.tokens + 1, count=left.count)
    assert (np.abs(moved - whole).max((1, 2)) > 1e-3).tolist() == (left.count > 0).tolist()


def test_bad_input(params, sampler):
    prompt = np.zeros((6, 1), np.int32)
    with pytest.raises(ValueError, match=r"images \(5, 8, 16, 1\): expected 6 of \(8, 16\)"):
        sampler(params, jax.random.key(0), IMAGES[1:], prompt, max_length=4)
    with pytest.raises(ValueError, match="image_size=.* must be multiples of 4"):
        VisionLanguageModel(vocab=5, width=16, heads=2, depth=1, image_size=(6, 8), channels=(4, 6)).init(
            jax.random.key(0), jnp.zeros((1, 6, 8, 1)), prompt
        )
