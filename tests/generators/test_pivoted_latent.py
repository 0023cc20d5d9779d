"""Pivots, then the dense grid: what each phase reads, the loss's parts, and the sampler against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.density import path_noise
from jaxgen.decoding.speculate_latents import random_order
from jaxgen.generators.pivoted_latent import PivotedLatentTransformer, cosine_known
from jaxgen.generators.pivoted_latent_sampler import PivotedLatentSampler
from jaxgen.paths_vp import VPPath
from jaxgen.tokenizers.latents import LatentTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

L, P, C, PATH = 9, 4, 4, VPPath("cosine", 30)
LABELS = jnp.array([2, 0])
KNOWN = np.array([[1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 0, 0]], bool)
KNOWN_PIVOTS = np.array([[1, 0, 0, 1], [0, 0, 1, 0]], bool)


@pytest.fixture(scope="module")
def model(randomize):
    module = PivotedLatentTransformer(
        channels=C,
        grid=3,
        pivot_grid=2,
        num_classes=3,
        width=16,
        depth=1,
        heads=2,
        decoder_width=12,
        decoder_depth=1,
        decoder_heads=3,
        buffer=2,
        head_width=8,
        head_depth=1,
        dense_width=8,
        dense_depth=1,
        dense_heads=2,
        prediction="velocity",
        path=PATH,
    )
    masks = jnp.zeros((1, L), bool), jnp.zeros((1, P), bool), jnp.zeros((1,), bool)
    inputs = jnp.zeros((1,), jnp.int32), jnp.zeros((1, L, C)), jnp.zeros((1, P, C)), *masks, jax.random.key(0)
    variables = jax.tree.map(jnp.asarray, randomize(jax.eval_shape(module.init, jax.random.key(0), *inputs), seed=1))
    return module, variables, jax.jit(module.apply, static_argnames=("method", "repeats"))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(2, n, c)), jnp.float32) for n, c in ((L, C), (P, C), (P, 12)))


def test_what_each_phase_reads(model, data):
    module, variables, apply = model
    tokens, pivots, z = data

    def first(labels, pivots, known):
        return np.asarray(apply(variables, labels, pivots, known, method="pivot_features"))

    def second(labels, tokens, known, z, shown):
        return np.asarray(apply(variables, labels, tokens, known, z, shown, method="dense_features"))

    want = first(LABELS, pivots, KNOWN_PIVOTS)
    np.testing.assert_array_equal(first(LABELS, jnp.where(KNOWN_PIVOTS[..., None], pivots, jnp.nan), KNOWN_PIVOTS), want)
    for change in ((LABELS + 1, pivots, KNOWN_PIVOTS), (LABELS, pivots + 0.3, KNOWN_PIVOTS), (LABELS, pivots, ~KNOWN_PIVOTS)):
        assert (np.abs(first(*change) - want).max((1, 2)) > 1e-3).all()
    shown = ~KNOWN_PIVOTS
    given = (LABELS, tokens, KNOWN, z, shown)
    want = second(*given)
    unread = (LABELS, jnp.where(KNOWN[..., None], tokens, jnp.nan), KNOWN, jnp.where(shown[..., None], z, jnp.nan), shown)
    np.testing.assert_array_equal(second(*unread), want)
    for i, change in enumerate((LABELS + 1, tokens + 0.3, ~KNOWN, z + 0.3, ~shown)):
        assert (np.abs(second(*given[:i], change, *given[i + 1 :]) - want).max((1, 2)) > 1e-3).all()


def test_tasks_are_told_apart_by_scales_and_gates(model, data):
    """With the second task's vectors in place of the first's the first phase changes, and in place of its own nothing does."""
    module, variables, apply = model
    _, pivots, _ = data

    def with_first(change):
        def swap(path, leaf):
            return change(leaf) if path[-1].key in ("task_factor", "task_offset") or path[-2].key == "task_embed" else leaf

        changed = jax.tree_util.tree_map_with_path(swap, variables)
        return np.asarray(apply(changed, LABELS, pivots, KNOWN_PIVOTS, method="pivot_features"))

    want = with_first(lambda leaf: leaf)
    assert np.abs(with_first(lambda leaf: leaf.at[0].set(leaf[1])) - want).max() > 1e-2
    np.testing.assert_array_equal(with_first(lambda leaf: leaf.at[1].set(leaf[0])), want)


def test_the_loss_is_of_unknown_pivots_and_all_dense_tokens(model, data):
    module, variables, apply = model
    tokens, pivots, _ = data
    shown = jnp.array([True, False])
    got = apply(variables, LABELS, tokens, pivots, KNOWN, KNOWN_PIVOTS, shown, jax.random.key(1), repeats=3)
    z = apply(variables, LABELS, pivots, KNOWN_PIVOTS, method="pivot_features")
    seen = np.array([[0, 1, 1, 0], [0, 0, 0, 0]], bool)
    dense = apply(variables, LABELS, tokens, KNOWN, z, seen, method="dense_features")

    @jax.jit
    def losses(variables):
        bound, (k1, k2) = module.bind(variables), jax.random.split(jax.random.key(1))
        first = bound.head.loss(z[:, None], jnp.stack([pivots] * 3, axis=1), k1)
        return first, bound.dense_head.loss(jnp.repeat(dense, 3, axis=0), jnp.repeat(tokens, 3, axis=0), k2)

    first, second = losses(variables)
    unknown = np.asarray(first).swapaxes(0, 1)[:, ~KNOWN_PIVOTS]
    want = 2.0 * P / (P + L) * unknown.mean() + 0.75 * L / (P + L) * np.asarray(second).mean()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_dense_loss_does_not_train_the_first_phase(model, data):
    """What only the first phase has gets the same gradient, whether the second is shown its features or not."""
    module, variables, _ = model
    tokens, pivots, _ = data

    @jax.jit
    def slope(direction, shown):
        """Along one direction, as forward differentiation is soon compiled."""

        def loss(variables):
            return module.apply(variables, LABELS, tokens, pivots, KNOWN, KNOWN_PIVOTS, shown, jax.random.key(1))

        return jax.jvp(loss, (variables,), (direction,))[1]

    def slopes(*names):
        params = {name: jax.tree.map(lambda x, n=name: x * (n in names), leaf) for name, leaf in variables["params"].items()}
        return [float(slope({"params": params}, jnp.full((2,), shown))) for shown in (True, False)]

    first = slopes("mask_token_pivots", "encoder_position_pivots", "head")
    assert first[0] == pytest.approx(first[1], rel=1e-4) and abs(first[0]) > 1e-3
    between = slopes("feature_embed")
    assert abs(between[0]) > 1e-3 and between[1] == 0


def test_known_dense_tokens():
    known = np.asarray(cosine_known(jax.random.key(0), 4000, 10))
    unknown = (~known).sum(1)
    assert unknown.min() == 1 and unknown.max() == 10
    # P(ceil(10 cos(pi u / 2)) > n) = P(u < 2 / pi arccos(n / 10)).
    for n in (2, 5, 8):
        p = 2 / np.pi * np.arccos(n / 10)
        assert abs((unknown > n).mean() - p) < 4 * np.sqrt(p * (1 - p) / 4000)
    assert np.abs(known.mean(0) - known.mean()).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.fixture(scope="module")
def sampler(model):
    module, variables, _ = model
    tokenizer = LatentTokenizer(image_size=6, channels=1, patch=2, shift=0.2, scale=1.5)
    steps = dict(pivot_steps=3, steps=2, pivot_chain_steps=5, chain_steps=4, pivot_guidance=0.5, variance=0.7)
    return PivotedLatentSampler(generator=module, tokenizer=tokenizer, **steps), {"generator": variables}


def test_the_sampler_is_a_loop_over_steps(sampler, model):
    """Compiled against a plain loop: both phases, orders, guidance that grows, temperature, the chains step by step."""
    made, params = sampler
    module, variables, apply = model
    labels, cfg, temperature = jnp.array([1, 2]), 1.5, 0.8
    images, drawn = made(params, jax.random.key(3), labels, cfg=cfg, temperature=temperature)
    null, rows, keys = jnp.full((2,), 3), jnp.arange(2), jax.random.split(jax.random.key(3))

    def noise(key, length, steps, step):
        return np.asarray(path_noise(key, rows, jnp.tile(jnp.arange(length), (2, 1)), steps, C, jnp.full((2, length), step)))

    def chain(path, predict, fresh, weight):
        x = fresh[:, :, path.length]
        for i in range(path.length, 0, -1):
            (prediction, share), (unconditional, _) = predict(x, path.times[i - 1])
            prediction = (1 + weight) * prediction - weight * unconditional
            a, before = path.alpha_bar[i], path.alpha_bar[i - 1]
            x0, beta = np.sqrt(a) * x - np.sqrt(1 - a) * prediction, 1 - a / before
            x = (np.sqrt(before) * beta * x0 + np.sqrt(a / before) * (1 - before) * x) / (1 - a)
            if i > 1:  # the last step has no noise
                least = beta * (1 - before) / (1 - a)
                x = x + temperature * np.sqrt(least ** (1 - share) * beta**share) * fresh[:, :, i - 1]
        return x

    def put(into, group, new):
        np.put_along_axis(into, group[..., None], np.take_along_axis(np.asarray(new), group[..., None], axis=1), axis=1)

    pivots, known, features = np.zeros((2, P, C), np.float32), np.zeros((2, P), bool), np.zeros((2, P, 12), np.float32)
    order = np.asarray(random_order(keys[0], rows, P))
    for start, end in ((0, 1), (1, 2), (2, 4)):
        z, z_null = (apply(variables, y, pivots, known, method="pivot_features") for y in (labels, null))

        def predict(x, time, both=(z, z_null)):
            times = np.full((2, P), time)
            return [map(np.asarray, apply(variables, z, x.astype(np.float32), times, method="predict")) for z in both]

        x = chain(PATH.respaced(5), predict, noise(keys[0], P, 5, 0), 0.5 * cfg * min(end, P - 1) / P)
        for into, new in ((pivots, x), (features, z)):
            put(into, order[:, start:end], new)
        np.put_along_axis(known, order[:, start:end], True, axis=1)
    np.testing.assert_allclose(drawn.pivots, pivots, atol=1e-4)

    tokens, known, shown = np.zeros((2, L, C), np.float32), np.zeros((2, L), bool), np.ones((2, P), bool)
    order = np.asarray(random_order(keys[1], rows, L))
    for step, (start, end) in enumerate(((0, 3), (3, 9))):
        both = [apply(variables, y, tokens, known, features, shown, method="dense_features") for y in (labels, null)]

        def predict(x, time, both=both):
            times = np.full((2,), time)
            return [(np.asarray(apply(variables, z, x.astype(np.float32), times, method="predict_dense")), 0.7) for z in both]

        x = chain(PATH.respaced(4), predict, noise(keys[1], L, 4, step), cfg * min(end, L - 1) / L)
        put(tokens, order[:, start:end], x)
        np.put_along_axis(known, order[:, start:end], True, axis=1)
    np.testing.assert_allclose(drawn.tokens, tokens, atol=2e-4)
    np.testing.assert_allclose(images, made.tokenizer.apply({}, tokens, method="decode"), atol=2e-4)


def test_settings_are_traced(sampler):
    made, params = sampler
    before = made._sample._cache_size()
    settings = (([0, 1], 1.5, 0.8), ([1, 1], 1.5, 0.8), ([0, 1], 2.0, 0.8), ([0, 1], 1.5, 0.5))
    tokens = [made(params, jax.random.key(0), np.array(y), cfg=c, temperature=t)[1].tokens for y, c, t in settings]
    assert made._sample._cache_size() - before <= 1
    assert all(np.abs(np.asarray(a - tokens[0])).max() > 1e-3 for a in tokens[1:])


def test_bad_input(sampler):
    made, params = sampler
    for change, match in (
        (dict(tokenizer=made.tokenizer.clone(image_size=8)), r"generator \(grid=3, channels=4\) does not fit"),
        (dict(pivot_steps=5), "steps=5: expected 1 to length=4"),
        (dict(steps=10), "steps=10: expected 1 to length=9"),
        (dict(chain_steps=31), "kept=31: expected 2 to steps=30"),
        (dict(pivot_chain_steps=31), "kept=31: expected 2 to steps=30"),
        (dict(pivot_guidance=-1.0), "pivot_guidance=-1.0: expected at least 0"),
        (dict(variance=1.5), "variance=1.5: expected a share"),
        (dict(generator=made.generator.clone(pivot_grid=3)), "pivot_grid=3: expected fewer than the grid=3"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(made, **change)
    with pytest.raises(ValueError, match="temperature=0"):
        made(params, jax.random.key(0), jnp.array([0]), temperature=0.0)
    with pytest.raises(ValueError, match="label 4"):
        made(params, jax.random.key(0), np.array([4]))
