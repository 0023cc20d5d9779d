"""The Llama of neighbours, in two and three dimensions: who sees and predicts whom, and the sampler against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, gumbel
from jaxgen.generators import NeighbourLlama, NextTokenSampler
from jaxgen.nn import Context

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SIZES = dict(vocab=7, width=24, heads=2, depth=1, scan_layers=True)
FLAT = NeighbourLlama(**SIZES, grid=(3, 4), num_classes=3, kv_heads=1)
CLIP = NeighbourLlama(**SIZES, grid=(2, 3, 2), caption_width=5, prefix=3)
TOKENS = np.random.default_rng(0).integers(0, 7, (2, 12)).astype(np.int32)
FEATURES = np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32)
WORDS = Context(FEATURES, np.array([[True, False, True], [True] * 3]))
CONDITIONS = {FLAT: np.array([1, 3], np.int32), CLIP: WORDS}


@pytest.fixture(scope="module", params=[FLAT, CLIP], ids=["image", "clip"])
def case(request, randomize):
    model = request.param
    params = randomize(model.param_shapes())
    apply = jax.jit(model.apply)
    return model, jax.device_put(params), CONDITIONS[model], lambda cond, tokens: np.asarray(apply(params, cond, tokens))


def test_what_a_token_is_predicted_from(case):
    """All that is nearer to the corner, and the condition; nothing at its own distance, for which one more call would be due."""
    model, _, cond, logits = case
    whole, distance = logits(cond, TOKENS), np.indices(model.shape).sum(0).reshape(-1)
    assert whole.shape == (2, 12, 7) and whole.dtype == np.float32
    for i in range(12):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % 7
        moved = np.abs(logits(cond, changed) - whole).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, distance > distance[i])
    twice = np.array([2.0, 1, 1], np.float32)[:, None]
    other = (cond + 1) % 4 if model.num_classes else Context(cond.features * twice, cond.mask)
    assert np.all(np.abs(logits(other, TOKENS) - whole).max(-1) > 1e-5)


def test_each_head_speaks_along_its_axis(case):
    """With one head scaled by 0, what only it predicts is 0, and what it predicts with others is their share of the mean."""
    model, params, cond, logits = case
    names = ["heads_before_1", "heads_before_0", "head"][-len(model.shape) :]
    inner, parts = params["params"], []
    for name in names:
        rest = {other: jax.tree.map(jnp.zeros_like, inner[other]) for other in names if other != name}
        parts.append(np.asarray(jax.jit(model.apply)({"params": inner | rest}, cond, TOKENS)))
    coords = np.indices(model.shape).reshape(len(names), -1)
    for axis, part in enumerate(parts):
        speaks = np.abs(part).max(axis=(0, 2)) > 0
        np.testing.assert_array_equal(speaks, (coords[axis] > 0) | (coords.sum(0) == 0))
    np.testing.assert_allclose(sum(parts), logits(cond, TOKENS), atol=1e-5)


@pytest.mark.parametrize("settings", [Settings(1.5, 0.9, 5, 0.8), Settings(0.0, 1.0, 0, 0.0)], ids=["all", "plain"])
def test_the_compiled_loop_is_the_python_loop(case, settings):
    """Greedy choices of logits plus noise, all tokens at one distance from one pass over the whole, without a cache."""
    model, params, cond, logits = case
    neighbours, key = model.neighbours, jax.random.key(4)
    noise = np.asarray(neighbours.join(gumbel(key, jnp.arange(2), jnp.arange(12), 7)))
    null = model.apply(params, cond, np.ones(2, bool), method="drop")
    tokens = np.zeros((2, 12), np.int32)
    for step in range(model.order.steps):
        mixed = (1 + settings.cfg) * np.float64(logits(cond, tokens)) - settings.cfg * np.float64(logits(null, tokens))
        for i in neighbours.index[slice(*model.order.span(step))]:
            for b in range(2):
                scores = mixed[b, i] / settings.temperature
                kept = np.argsort(-scores)[: settings.top_k or None]
                if settings.top_p:
                    law = np.exp(scores[kept]) / np.exp(scores[kept]).sum()
                    kept = kept[np.cumsum(law) - law < settings.top_p]
                tokens[b, i] = kept[np.argmax(scores[kept] + noise[b, i, kept])]
    images, got = NextTokenSampler(generator=model, tokenizer=None)({"generator": params}, key, cond, settings)
    assert images is None
    np.testing.assert_array_equal(got, tokens)


def test_one_program_for_all_settings_and_rows_apart(case):
    model, params, cond, _ = case
    sampler, given = NextTokenSampler(generator=model, tokenizer=None), {"generator": params}
    _, usual = sampler(given, jax.random.key(0), cond, Settings(cfg=1.0))
    before = NextTokenSampler._sample._cache_size()
    backwards = jax.tree.map(lambda x: x[::-1], cond)
    _, other = sampler(given, jax.random.key(1), backwards, Settings(cfg=0.5, temperature=2.0, top_k=3))
    assert NextTokenSampler._sample._cache_size() == before and np.any(usual != other)
    _, same = sampler(given, jax.random.key(0), jax.tree.map(lambda x: np.stack([x[0], x[0]]), cond), Settings(cfg=1.0))
    np.testing.assert_array_equal(same[0], usual[0])


def test_blocks_before_a_head_are_counted():
    deep = FLAT.clone(head_depth=2)
    assert deep.layers == 3 and deep.init_cache(2).k.shape[0] == 3 and CLIP.layers == 3
    stacks = deep.param_shapes()["params"]["stacks_0"]["blocks"]["mlp"]["w2"]["kernel"]
    assert stacks.shape[0] == 2
    for fields in (dict(grid=(4,)), dict(head_depth=0)):
        with pytest.raises(ValueError, match="expected two or three axes, and at least 1 block"):
            FLAT.clone(**fields)
    for grid in (0, (), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="expected a positive number, or one to three of them"):
            FLAT.clone(grid=grid)
