"""Full-view prompts: what a token sees of them, steps with a cache, and prompts that the sampler draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Settings, View, gumbel
from jaxgen.generators import ClassCodes, PromptedLlama, PromptedSampler

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, V, N = 2, 7, 4
SIZES = dict(vocab=V, grid=(2, 3), width=24, heads=2, depth=2, scan_layers=True, prompts=N)
LEARNED, CODES = PromptedLlama(**SIZES, num_classes=3), PromptedLlama(**SIZES, num_classes=3, prompt="codes")
LABELS, TOKENS = np.array([0, 2], np.int32), np.random.default_rng(0).integers(0, V, (B, 6)).astype(np.int32)
CLASS = PromptedLlama(**SIZES | dict(prompts=6), num_classes=3, prompt="class")
IMAGES = np.random.default_rng(1).permuted(np.arange(84) % V).reshape(14, 6).astype(np.int32)  # of classes 0, 1 and 2
BANK = ClassCodes.of(IMAGES, np.repeat([0, 1, 2], [2, 5, 7]), 3)
SETTINGS = Settings(cfg=1.5, temperature=0.9, top_k=5, top_p=0.0)


@pytest.fixture(scope="module", params=[LEARNED, CODES, CLASS], ids=["learned", "codes", "class"])
def case(request, randomize):
    model, key = request.param, jax.random.key(5)
    prompts = np.asarray(BANK.draw(key, LABELS) if model is CLASS else model.draw(key, B))
    cond = LABELS if model is LEARNED else np.concatenate([LABELS[:, None], prompts], 1)
    apply = jax.jit(model.apply)
    return model, jax.device_put(randomize(model.param_shapes())), cond, lambda *args: np.asarray(apply(*args))


def test_tokens_see_the_class_the_whole_prompt_and_what_is_before(case):
    model, params, cond, logits = case
    whole = logits(params, cond, TOKENS)
    assert whole.shape == (B, 6, V) and whole.dtype == np.float32
    for i in range(6):
        changed = TOKENS.copy()
        changed[:, i] = (changed[:, i] + 1) % V
        moved = np.abs(logits(params, cond, changed) - whole).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(moved, np.arange(6) > i)
    for j in range(model.prompts):
        if model is LEARNED:
            embed = params["params"]["prompt_embed"]
            other = logits({"params": params["params"] | {"prompt_embed": embed.at[j].add(1.0)}}, cond, TOKENS)
        else:
            changed = cond.copy()
            changed[:, 1 + j] = (changed[:, 1 + j] + 1) % V
            other = logits(params, changed, TOKENS)
        assert np.all(np.abs(other - whole).max(-1) > 1e-6)
    label = (cond + 1) % 3 if cond.ndim == 1 else np.concatenate([(cond[:, :1] + 1) % 3, cond[:, 1:]], 1)
    assert np.all(np.abs(logits(params, label, TOKENS) - whole).max(-1) > 1e-6)


def test_steps_with_a_cache_are_the_whole(case):
    model, params, cond, logits = case

    @jax.jit
    def steps(params, cond):
        cache, out = model.apply(params, model.init_cache(B), cond, method="begin"), []
        for i in range(6):
            view = View(TOKENS[:, max(i - 1, 0)][:, None], jnp.array([i]))
            law, cache = model.apply(params, cache, view, cond, method="step")
            cache, out = cache.commit(1), [*out, law.params]
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(steps(params, cond), logits(params, cond, TOKENS), atol=2e-5)


def test_the_sampler_is_a_loop_over_whole_passes(case):
    """Greedy choices of guided logits plus noise, with the prompts of the key; one trace for all labels and settings."""
    model, params, _, logits = case
    sampler, key = PromptedSampler(generator=model, tokenizer=None), jax.random.key(3)
    traces = PromptedSampler._sample._cache_size()
    variables = {"generator": params} | ({"prompts": BANK} if model is CLASS else {})
    got = np.asarray(sampler(variables, key, LABELS, SETTINGS)[1])

    def told(labels):
        prompts = BANK.draw(key, labels) if model is CLASS else model.draw(key, B)
        return labels if model is LEARNED else np.concatenate([labels[:, None], prompts], 1)

    noise, tokens = np.asarray(gumbel(key, jnp.arange(B), jnp.arange(6), V)), np.zeros((B, 6), np.int32)
    for i in range(6):
        rows = [logits(params, told(labels), tokens)[:, i] for labels in (LABELS, np.full(B, 3, np.int32))]
        mixed = ((1 + SETTINGS.cfg) * rows[0] - SETTINGS.cfg * rows[1]) / SETTINGS.temperature
        for b in range(B):
            kept = np.argsort(-mixed[b])[: SETTINGS.top_k]
            tokens[b, i] = kept[np.argmax(mixed[b, kept] + noise[b, i, kept])]
    np.testing.assert_array_equal(got, tokens)
    for change in ({"cfg": 6.0}, {"temperature": 5.0}, {"top_k": 1}):
        assert np.any(sampler(variables, key, LABELS, SETTINGS._replace(**change))[1] != got), change
    assert np.any(sampler(variables, key, LABELS[::-1], SETTINGS)[1] != got)
    assert PromptedSampler._sample._cache_size() == traces + 1


def test_drawn_prompts():
    """Even over the codebook, another in each row, the same in each batch; in training anew with each key."""
    drawn = np.asarray(CODES.draw(jax.random.key(0), 525))
    counts = np.bincount(drawn.reshape(-1), minlength=V)
    assert drawn.shape == (525, N) and len(counts) == V
    assert np.all(np.abs(counts - 300) < 5 * 300**0.5)
    assert len(np.unique(drawn, axis=0)) > 400
    np.testing.assert_array_equal(CODES.draw(jax.random.key(0), B), drawn[:B])


def test_drawn_images_of_a_class():
    """Evenly among those of the class, never the image itself; any image where there is no class."""
    tokens, first, count = (np.asarray(x) for x in BANK)
    np.testing.assert_array_equal(first, [0, 2, 7, 0])
    np.testing.assert_array_equal(count, [2, 5, 7, 14])
    for label in range(4):
        inside = range(first[label], first[label] + count[label])
        labels = np.full(700, label)
        drawn = np.asarray(BANK.draw(jax.random.key(label), labels))
        found = np.argmax((drawn[:, None] == tokens).all(-1), 1)
        counts = np.bincount(found, minlength=14)
        assert set(found) == set(inside) and np.all(np.abs(counts[inside] - 700 / len(inside)) < 5 * (700 / len(inside)) ** 0.5)
        np.testing.assert_array_equal(BANK.draw(jax.random.key(label), labels[:3]), drawn[:3])
        own = np.broadcast_to(tokens[inside[-1]], drawn.shape)
        others = np.asarray(BANK.draw(jax.random.key(label), labels, own))
        assert not (others == own).all(1).any()
        np.testing.assert_array_equal(others[found != inside[-1]], drawn[found != inside[-1]])
    for labels, found in (([0, 0, 2, 2], "0 images of class 1 of 3"), ([0, 0, 1, 1, 2], "1 images of class 2 of 3")):
        with pytest.raises(ValueError, match=f"{found}: expected 3 classes of at least 2"):
            ClassCodes.of(tokens[: len(labels)], labels, 3)
    with pytest.raises(ValueError, match="2 images of class 0 of 4: expected 3 classes"):
        ClassCodes.of(tokens[:8], [0, 0, 1, 1, 2, 2, 3, 3], 3)
    with pytest.raises(ValueError, match="expected those of a class side by side"):
        ClassCodes.of(tokens[:4], [1, 1, 0, 0], 2)


@pytest.mark.parametrize("case", [LEARNED, CODES], ids=["learned", "codes"], indirect=True)
def test_training_draws_prompts_anew(case):
    model, params, _, _ = case
    train = jax.jit(lambda key: model.apply(params, LABELS, TOKENS, train=True, rngs={"dropout": key}))
    same = np.allclose(train(jax.random.key(0)), train(jax.random.key(1)))
    assert same == (model is LEARNED)  # there is no dropout here


def test_prompts_lie_in_rows_above_the_image():
    np.testing.assert_array_equal(
        LEARNED._coords, [[-1, -1], [0, 0], [0, 1], [0, 2], [1, 0], *[[i, j] for i in (2, 3) for j in range(3)]]
    )
    line = PromptedLlama(vocab=V, grid=(3,), width=8, heads=1, depth=1, num_classes=2, prompts=2)
    np.testing.assert_array_equal(line._coords[:, 0], [-1, 0, 1, 2, 3, 4])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(prompts=0), "prompts=0: expected at least 1"),
        (dict(prompt="images"), "prompt='images' is not one of learned, codes, class"),
        (dict(prompt="class"), "prompts=4: a prompt of kind 'class' is an image, 6 tokens"),
        (dict(prompt="codes", num_classes=0, caption_width=4), "prompt='codes': expected a model of classes"),
    ],
)
def test_bad_prompts(change, message):
    with pytest.raises(ValueError, match=message):
        LEARNED.clone(**change)


def test_an_image_of_the_class_must_be_given():
    with pytest.raises(ValueError, match=r"labels \(2,\): expected \[b, 7\]"):
        jax.eval_shape(CLASS.apply, CLASS.param_shapes(), LABELS, TOKENS)
