"""The compiled sampler against a loop in NumPy over full forward passes, an enumerated law, and its own program text."""

import dataclasses
import functools
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Known, Settings, gumbel
from jaxgen.generators import NextScaleSampler, NextScaleTransformer, box_mask, check_labels, keep_tokens
from jaxgen.orders import scales
from jaxgen.tokenizers import MultiScaleTokenizer

pytestmark = pytest.mark.numeric

KEY = jax.random.key(7)
LABELS = np.array([0, 2, 1], np.int32)
SPANS = [(0, 1), (1, 5), (5, 14)]
SETTINGS = Settings(cfg=1.5, temperature=0.9, top_k=7, top_p=0.8)
NOTHING = Known(np.zeros((3, 14), np.int32), np.zeros((3, 14), bool))


@pytest.fixture(scope="module")
def sample(tiny):
    """Samples for LABELS unless told otherwise; calls with three rows share a program."""

    def run(settings=SETTINGS, labels=LABELS, known=NOTHING, key=KEY, sampler=tiny.sampler):
        images, tokens = sampler(tiny.params, key, labels, settings, known)
        return np.asarray(images), np.asarray(tokens)

    return run


@pytest.fixture(scope="module")
def usual(sample):
    return sample()


@pytest.fixture(scope="module")
def model(tiny):
    """The model's parts, for the loop below."""
    p, tokenizer = tiny.params, tiny.tokenizer
    logits = jax.jit(lambda labels, features: tiny.generator.apply(p["generator"], labels, features))
    inputs = jax.jit(lambda tokens: tokenizer.apply(p["tokenizer"], tokens, method="inputs"))
    decode = jax.jit(lambda tokens: tokenizer.apply(p["tokenizer"], tokens, method="decode"))
    feed = jax.jit(lambda *args: tokenizer.apply(p["tokenizer"], *args, method="feed"), static_argnums=1)
    decode_features = jax.jit(lambda picture: tokenizer.apply(p["tokenizer"], picture, method="decode_features"))
    return types.SimpleNamespace(logits=logits, inputs=inputs, decode=decode, feed=feed, decode_features=decode_features)


@functools.partial(jax.jit, static_argnums=1)
def noise(key, stream=0):
    """Of all rows and positions."""
    return gumbel(key, jnp.arange(3), jnp.arange(14), 16, stream=stream)


def truncated(row, temperature, top_k, top_p):
    row = row / temperature
    order = np.argsort(-row)[: top_k or None]
    if top_p:
        law = np.exp(row[order] - row[order].max())
        law /= law.sum()
        order = order[np.cumsum(law) - law < top_p]
    out = np.full(row.shape, -np.inf)
    out[order] = row[order]
    return out


def python_loop(model, settings, labels=LABELS, known=None, smooth=False):
    """Algorithm 2 of Tian et al. 2024 with guidance, a full forward pass a scale, no cache.

    Returns the tokens and, for mixtures, the image, which tokens do not determine.
    """
    b = len(labels)
    tokens, features = np.zeros((b, 14), np.int32), np.zeros((b, 13, 6), np.float32)
    picture = np.zeros((b, 3, 3, 6), np.float32)
    for s, (start, end) in enumerate(SPANS):
        conditional = np.float64(model.logits(labels, features)[:, start:end])
        unconditional = np.float64(model.logits(np.full(b, 3), features)[:, start:end])
        t = settings.cfg * s / 2
        logits = (1 + t) * conditional - t * unconditional
        logits = np.apply_along_axis(truncated, -1, logits, settings.temperature, settings.top_k, settings.top_p)
        codes = ids = (logits + noise(KEY)[:b, start:end]).argmax(-1)
        if smooth:  # the authors' `more_smooth`
            tau = max(0.27 * (1 - s / 2 * 0.95), 0.005)
            z = (logits * (1 + s / 2) + noise(KEY, 1)[:b, start:end]) / tau
            codes = np.exp(z - z.max(-1, keepdims=True))
            codes = (codes / codes.sum(-1, keepdims=True)).astype(np.float32)
            ids = codes.argmax(-1)
        if known is not None:
            keep = np.asarray(known.keep[:, start:end])
            ids = np.where(keep, known.tokens[:, start:end], ids)
            codes = np.where(keep[..., None], np.eye(16, dtype=np.float32)[ids], codes) if smooth else ids
        tokens[:, start:end] = ids
        if smooth:
            picture, following = model.feed(picture, s, codes)
            if following is not None:
                features[:, end - 1 : SPANS[s + 1][1] - 1] = following
        else:
            # Later tokens are still 0 and their inputs rubbish: no position that is read sees them.
            features = np.asarray(model.inputs(tokens))
    return tokens, model.decode_features(picture) if smooth else None


CASES = [
    SETTINGS,
    Settings(cfg=0.0, temperature=1.0, top_k=0, top_p=0.0),
    Settings(cfg=3.0, temperature=1.0, top_k=1, top_p=0.0),
    Settings(cfg=-0.5, temperature=1.7, top_k=0, top_p=0.95),
]


@pytest.mark.parametrize("settings", CASES, ids=["all", "plain", "greedy", "negative guidance"])
def test_the_compiled_loop_is_the_python_loop(model, sample, settings):
    want, _ = python_loop(model, settings)
    images, tokens = sample(settings)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(images, model.decode(tokens), atol=1e-5)


def test_mixtures_of_codes(tiny, model, sample, usual):
    smooth = dataclasses.replace(tiny.sampler, smooth=True)
    rng = np.random.default_rng(1)
    given, some = rng.integers(0, 16, (3, 14)).astype(np.int32), rng.random((3, 14)) < 0.3
    for keep in (np.zeros((3, 14), bool), some):
        known = Known(given, keep)
        want, image = python_loop(model, SETTINGS, known=known, smooth=True)
        images, tokens = sample(known=known, sampler=smooth)
        np.testing.assert_array_equal(tokens, want)
        np.testing.assert_array_equal(tokens[keep], given[keep])
        # The last scale's softmax divides by 0.0135 and 2: rounding of the logits grows by a hundred.
        np.testing.assert_allclose(images, image, atol=3e-4)
        assert np.abs(images - model.decode(tokens)).max() > 1e-3 and np.any(tokens != usual[1])

    # Where everything is given there is nothing to mix.
    images, tokens = sample(known=Known(given, np.ones((3, 14), bool)), sampler=smooth)
    np.testing.assert_array_equal(tokens, given)
    np.testing.assert_allclose(images, model.decode(given), atol=1e-5)


def test_every_setting_changes_something(sample, usual):
    for change in ({"cfg": 4.0}, {"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.3}):
        assert np.any(sample(SETTINGS._replace(**change))[1] != usual[1]), change
    assert np.any(sample(key=jax.random.key(8))[1] != usual[1])


def test_one_trace_for_all_settings_labels_keys_and_parameters(tiny, sample, usual):
    before = NextScaleSampler._sample._cache_size()
    equal = NextScaleSampler(generator=tiny.generator.clone(), tokenizer=tiny.tokenizer.clone())
    sample(Settings(cfg=2, temperature=jnp.float32(0.5), top_k=3, top_p=np.float64(0.1)), labels=[3, 3, 3], sampler=equal)
    sample(Settings(), labels=jnp.array([1, 1, 1]), key=jax.random.key(1))
    assert NextScaleSampler._sample._cache_size() == before
    sample(labels=[1, 2], known=None)
    assert NextScaleSampler._sample._cache_size() == before + 1


def test_a_row_does_not_depend_on_its_batch(sample, usual):
    """Row i depends on the key, i, its label and the settings: not on how many rows there are or what they ask for."""
    _, tokens = usual
    np.testing.assert_array_equal(sample(labels=LABELS[:2], known=None)[1], tokens[:2])
    _, permuted = sample(labels=LABELS[[0, 2, 1]])
    np.testing.assert_array_equal(permuted[0], tokens[0])
    _, others = sample(labels=np.array([3, 2, 3]))
    np.testing.assert_array_equal(others[1], tokens[1])
    _, same = sample(Settings(cfg=0.0), labels=np.array([1, 1, 1]))
    assert np.any(same[0] != same[1]) and np.any(same[1] != same[2])  # rows have their own noise


def test_known_tokens_are_forced(model, sample, usual):
    rng = np.random.default_rng(0)
    given = rng.integers(0, 16, (3, 14)).astype(np.int32)

    def forced(keep):
        return sample(known=Known(jnp.asarray(given), jnp.asarray(keep)))

    keep = rng.random((3, 14)) < 0.5
    images, tokens = forced(keep)
    np.testing.assert_array_equal(tokens[keep], given[keep])
    want, _ = python_loop(model, SETTINGS, known=Known(given, keep))  # and what is free sees what is forced
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_allclose(images, model.decode(tokens), atol=1e-5)

    images, tokens = forced(np.ones((3, 14), bool))
    np.testing.assert_array_equal(tokens, given)
    np.testing.assert_allclose(images, model.decode(given), atol=1e-5)
    np.testing.assert_array_equal(forced(np.zeros((3, 14), bool))[1], usual[1])  # whatever the tokens


def test_errors(tiny, sample):
    for labels, message in (
        ([0, 4, 1], r"label 4 is out of range 0\.\.3 \(3 = unconditional\)"),
        ([-1, 0, 1], "label -1 is out of range"),
        (np.zeros((3, 1), np.int32), r"labels must be integers \[b\]; got int32 \(3, 1\)"),
        ([0.0, 1.0, 2.0], "labels must be integers"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(labels=labels)
    for settings, message in (
        (Settings(temperature=0), "temperature=0"),
        (Settings(top_k=17), "top_k=17"),
        (Settings(top_p=1.1), "top_p=1.1"),
        (Settings(cfg=math.nan), "cfg=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(settings)
    with pytest.raises(ValueError, match=r"known tokens \(1, 14\) and keep \(3, 14\): expected \(3, 14\)"):
        sample(known=Known(np.zeros((1, 14), int), np.zeros((3, 14), bool)))
    with pytest.raises(ValueError, match=r"generator \(patch_nums=\(1, 3\), vocab=16\) does not fit tokenizer"):
        NextScaleSampler(generator=tiny.generator.clone(patch_nums=(1, 3)), tokenizer=tiny.tokenizer)
    with pytest.raises(ValueError, match="vocab=16"):
        NextScaleSampler(generator=tiny.generator, tokenizer=tiny.tokenizer.clone(vocab=17))


def test_labels_inside_a_larger_program_are_not_read():
    assert check_labels(np.array([0, 5], np.int64), 5).dtype == jnp.int32
    assert jax.jit(lambda x: check_labels(x, 5))(jnp.array([9])) == 9


# Editing.


def bilinear(mask, n):
    """At the centre of each of n x n cells, from the four pixels around it, the border repeated."""
    h, w = mask.shape
    out = np.zeros((n, n))
    for i, j in np.ndindex(n, n):
        y, x = (i + 0.5) * h / n - 0.5, (j + 0.5) * w / n - 0.5
        for a, b in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            weight = (1 - abs(y - a)) * (1 - abs(x - b))
            out[i, j] += weight * mask[np.clip(a, 0, h - 1), np.clip(b, 0, w - 1)]
    return out


def test_keep_tokens():
    order = scales((1, 2, 3, 5))
    masks = np.random.default_rng(2).random((2, 7, 12)) < 0.6
    keep = keep_tokens(order, masks, batch=2)
    assert keep.shape == (2, 39) and keep.dtype == bool
    for b in range(2):
        assert keep[b, 0]  # a scale of up to three cells holds the layout and stays
        want = np.concatenate([bilinear(masks[b], n).reshape(-1) > 0.5 for n in (2, 3, 5)])
        np.testing.assert_array_equal(keep[b, 1:], want)
    one = keep_tokens(order, masks[0], batch=3)
    np.testing.assert_array_equal(one, np.broadcast_to(keep[0], (3, 39)))
    oblong = keep_tokens(scales(((1, 3), (2, 3))), np.zeros((4, 4), bool), batch=1)
    np.testing.assert_array_equal(oblong[0], [True] * 3 + [False] * 6)


def test_box_mask():
    inside = np.zeros((8, 8), bool)
    for i, j in np.ndindex(8, 8):
        inside[i, j] = 0.25 <= (i + 0.5) / 8 < 0.75 and 0.5 <= (j + 0.5) / 8 < 1
    np.testing.assert_array_equal(box_mask((0.25, 0.5, 0.75, 1.0), size=8), ~inside)
    np.testing.assert_array_equal(box_mask((0.25, 0.5, 0.75, 1.0), outpaint=True, size=8), inside)
    assert box_mask((0, 0, 0.5, 0.5)).shape == (64, 64)


@pytest.mark.parametrize("box", [(0.5, 0, 0.5, 1), (0, 0, 1.1, 1), (-0.1, 0, 1, 1), (0, 0.9, 1, 0.1), (0, 0, 1)])
def test_bad_boxes(box):
    with pytest.raises(ValueError, match=re.escape(f"box={box}: expected 0 <= top < bottom <= 1")):
        box_mask(box)


# The law of the samples.


def test_samples_follow_the_product_of_conditionals(randomize):
    """All 3^5 token maps of a tiny model: their frequencies against their probabilities, and against wrong ones."""
    tokenizer = MultiScaleTokenizer(
        ch=4, ch_mult=(1,), res_blocks=1, groups=2, vocab=3, width=3, patch_nums=(1, 2), phis=1, attention=False
    )
    generator = NextScaleTransformer(vocab=3, num_classes=2, patch_nums=(1, 2), width=8, heads=2, depth=1)
    params = {
        "tokenizer": randomize(jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 2, 2, 3))), seed=1),
        "generator": randomize(generator.param_shapes(3), seed=2),
    }
    settings = Settings(cfg=1.0, temperature=0.8, top_k=0, top_p=0.0)
    n = 20_000
    sampler = NextScaleSampler(generator=generator, tokenizer=tokenizer)
    _, tokens = sampler(params, jax.random.key(3), np.ones(n, np.int32), settings)
    counts = np.bincount(np.asarray(tokens) @ 3 ** np.arange(5), minlength=243)

    def law(cfg):
        first = np.zeros((3, 5), np.int32)
        first[:, 0] = range(3)
        features = jax.jit(lambda p, t: tokenizer.apply(p, t, method="inputs"))(params["tokenizer"], first)
        run = jax.jit(generator.apply)
        conditional, unconditional = (np.float64(run(params["generator"], np.full(3, c), features)) for c in (1, 2))
        t = cfg * np.array([0, 1, 1, 1, 1])[:, None]
        scores = np.exp(((1 + t) * conditional - t * unconditional) / 0.8)
        probs = scores / scores.sum(-1, keepdims=True)  # [first token, position, token]
        return np.array(
            [
                probs[0, 0, ids[0]] * np.prod([probs[ids[0], i, ids[i]] for i in range(1, 5)])
                for ids in (tuple(j // 3**i % 3 for i in range(5)) for j in range(243))
            ]
        )

    def z_score(law):
        order = np.argsort(law)
        expected, got = n * law[order], counts[order]
        few = np.searchsorted(np.cumsum(expected) >= 10, True) + 1  # rare maps are counted as one
        expected = np.append(expected[:few].sum(), expected[few:])
        got = np.append(got[:few].sum(), got[few:])
        df = len(got) - 1
        return (np.sum((got - expected) ** 2 / expected) - df) / math.sqrt(2 * df)

    right = law(1.0)
    np.testing.assert_allclose(right.sum(), 1)
    assert abs(z_score(right)) < 4, z_score(right)
    unguided = law(0.0)
    marginals = np.zeros((5, 3))  # the right marginals, the positions independent
    for j, p in enumerate(right):
        for i in range(5):
            marginals[i, j // 3**i % 3] += p
    independent = np.array([np.prod([marginals[i, j // 3**i % 3] for i in range(5)]) for j in range(243)])
    assert z_score(unguided) > 10 and z_score(independent) > 10, (z_score(unguided), z_score(independent))


# The compiled program.


def compiled(generator, tiny):
    sampler = NextScaleSampler(generator=generator, tokenizer=tiny.tokenizer)
    settings = Settings(*[jax.ShapeDtypeStruct((), jnp.float32)] * 4)
    labels = jax.ShapeDtypeStruct((3,), jnp.int32)
    return NextScaleSampler._sample.lower(sampler, tiny.params, KEY, labels, settings, NOTHING).compile()


def shapes_in(program) -> set[tuple[int, ...]]:
    return {tuple(map(int, s.split(","))) for s in re.findall(r"\[(\d+(?:,\d+)*)\]", program.as_text())}


def test_no_array_of_length_by_length(tiny, usual):
    """14 is the length and nothing else: a full mask or full attention weights would show as a shape with two of them."""
    shapes = shapes_in(compiled(tiny.generator, tiny))
    assert (2, 6, 14, 2, 16) in shapes  # the cache
    assert not [s for s in shapes if s.count(14) > 1]
    forward = jax.jit(tiny.generator.apply).lower(tiny.params["generator"], tiny.labels, np.zeros((4, 13, 6), np.float32))
    assert [s for s in shapes_in(forward.compile()) if s.count(14) > 1]  # the training pass has them, so the test sees them


class Roomy(NextScaleTransformer):
    """A cache with a great deal of room that nobody asked for."""

    def init_cache(self, batch):
        cache = super().init_cache(batch)
        return type(cache).zeros(layers=self.depth, batch=batch, capacity=self.order.length + 5000, heads=2, head_size=16)


def test_the_cache_is_written_in_place(tiny):
    """Memory grows by as much as the cache does: no scale and no layer has a copy of it."""
    fields = {f.name: getattr(tiny.generator, f.name) for f in dataclasses.fields(tiny.generator)}
    fields = {name: value for name, value in fields.items() if name not in ("parent", "name")}
    small = compiled(tiny.generator, tiny).memory_analysis()
    large = compiled(Roomy(**fields), tiny).memory_analysis()
    more = 2 * (2 * 6 * 5000 * 2 * 16) * 4  # keys and values, layers, rows, positions, heads, head size, bytes
    growth = large.temp_size_in_bytes - small.temp_size_in_bytes
    assert more * 0.99 < growth < more * 1.1, growth / more
