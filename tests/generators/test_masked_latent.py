"""The masked model of continuous tokens: what it reads, the released order, and its sampler against a plain loop."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.density import path_noise
from jaxgen.decoding.speculate_latents import random_order
from jaxgen.generators.masked_latent import MaskedLatentTransformer, cosine_steps, random_known
from jaxgen.generators.masked_latent_sampler import MaskedLatentSampler
from jaxgen.paths_vp import VPPath
from jaxgen.tokenizers.latents import LatentTokenizer

pytestmark = pytest.mark.usefixtures("quick_compiles")

L, C, PATH = 9, 4, VPPath("cosine", 30)


@pytest.fixture(scope="module")
def model(randomize):
    module = MaskedLatentTransformer(
        channels=C,
        length=L,
        num_classes=3,
        width=16,
        depth=1,
        heads=2,
        decoder_width=12,
        decoder_depth=2,
        decoder_heads=3,
        buffer=2,
        head_width=8,
        head_depth=1,
        prediction="velocity",
        path=PATH,
    )
    inputs = jnp.zeros((1,), jnp.int32), jnp.zeros((1, L, C)), jnp.zeros((1, L), bool), jax.random.key(0)
    variables = jax.tree.map(jnp.asarray, randomize(jax.eval_shape(module.init, jax.random.key(0), *inputs), seed=1))
    return module, variables, jax.jit(module.apply, static_argnames=("method", "repeats"))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, L, C)), jnp.float32)


KNOWN = np.array([[1, 0, 0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 0, 0]], bool)


def test_unknown_tokens_are_not_read(model, tokens):
    module, variables, apply = model
    labels = jnp.array([2, 0])
    want = apply(variables, labels, tokens, KNOWN, method="features")
    other = jnp.where(KNOWN[..., None], tokens, jnp.nan)
    np.testing.assert_array_equal(apply(variables, labels, other, KNOWN, method="features"), want)
    changes = (labels + 1, tokens, KNOWN), (labels, tokens + 0.3, KNOWN), (labels, tokens, ~KNOWN)
    for change in changes:
        assert (np.abs(np.asarray(apply(variables, *change, method="features") - want)).max((1, 2)) > 1e-3).all()


@pytest.mark.slow
def test_hidden_tokens_are_as_good_as_left_out(model, tokens):
    """As published: the encoder reads the known tokens only, the decoder puts its outputs back where they belong."""
    module, variables, apply = model
    labels = jnp.array([2, 0])
    want = apply(variables, labels, tokens, KNOWN, method="features")

    @jax.jit
    def both(variables):
        bound, rows = module.bind(variables), []
        for row in range(2):
            at = np.flatnonzero(KNOWN[row])
            places = np.append([0, 1], 2 + at)
            x = jnp.concatenate([jnp.tile(bound.class_embed(labels[row])[None], (2, 1)), bound.token_embed(tokens[row, at])])
            x = bound.encoder(bound.token_norm(x + bound.encoder_position[places])[None])
            full = jnp.tile(bound.mask_token, (2 + L, 1)).at[places].set(bound.decoder_embed(x)[0])
            rows.append(bound.decoder((full + bound.decoder_position)[None])[0, 2:] + bound.head_position)
        return jnp.stack(rows)

    np.testing.assert_allclose(want, both(variables), atol=1e-5)


def test_the_loss_counts_unknown_tokens(model, tokens):
    module, variables, apply = model
    labels = jnp.array([2, 0])
    got = apply(variables, labels, tokens, KNOWN, jax.random.key(1), repeats=3)
    z = apply(variables, labels, tokens, KNOWN, method="features")
    three = jnp.stack([tokens] * 3, axis=1)
    losses = jax.jit(lambda z: module.bind(variables).head.loss(z[:, None], three, jax.random.key(1)))(z)
    np.testing.assert_allclose(got, np.asarray(losses).swapaxes(0, 1)[:, ~KNOWN].mean(), rtol=1e-5)
    assert np.isfinite(apply(variables, labels, tokens, np.ones_like(KNOWN), jax.random.key(1), repeats=3))


@pytest.mark.slow
@pytest.mark.parametrize("length, steps", [(256, 64), (256, 256), (256, 10), (16, 16), (16, 6), (64, 50), (5, 1)])
def test_the_counts_are_the_released_ones(length, steps):
    """Li et al.'s loop: the number of masked tokens after each step, at least one fewer, at least one until the last."""
    masked, sizes = length, []
    for k in range(steps):
        after = max(1, min(masked - 1, math.floor(length * math.cos(math.pi / 2 * (k + 1) / steps))))
        after = 0 if k == steps - 1 else after
        sizes.append(masked - after)
        masked = after
    assert cosine_steps(length, steps).sizes == tuple(sizes) and sum(sizes) == length


@pytest.mark.slow
def test_known_sets():
    known = np.asarray(random_known(jax.random.key(0), 20_000, 10))
    unknown = (~known).sum(1)
    assert unknown.min() == 8 and unknown.max() == 10  # ceil(10 r) for r in (0.7, 1]
    # ceil(10 r) is 10 for r > 0.9, and the density of r is that of a normal law folded at 1.
    area = [math.erf((1 - r) / 0.25 / math.sqrt(2)) for r in (0.9, 0.7)]
    share = area[0] / area[1]
    assert abs((unknown == 10).mean() - share) < 4 * math.sqrt(share * (1 - share) / 20_000)
    assert np.abs(known.mean(0) - known.mean()).max() < 4 * math.sqrt(known.mean() / 20_000)
    assert (~np.asarray(random_known(jax.random.key(1), 1000, 10, 0.0))).sum(1).min() < 6


@pytest.fixture(scope="module")
def sampler(model):
    module, variables, _ = model
    tokenizer = LatentTokenizer(image_size=6, channels=1, patch=2, shift=0.2, scale=1.5)
    made = MaskedLatentSampler(generator=module, tokenizer=tokenizer, steps=4, chain_steps=5)
    return made, {"generator": variables}


@pytest.mark.slow
def test_the_sampler_is_a_loop_over_steps(sampler, model):
    """Compiled against a plain loop: order, groups, guidance that grows, temperature, the chain step by step."""
    made, params = sampler
    module, variables, apply = model
    labels, cfg, temperature = jnp.array([1, 2]), 1.5, 0.8
    images, result = made(params, jax.random.key(3), labels, cfg=cfg, temperature=temperature)
    rows, path = jnp.arange(2), PATH.respaced(5)
    order = np.asarray(random_order(jax.random.key(3), rows, L))
    noise = np.asarray(path_noise(jax.random.key(3), rows, jnp.tile(jnp.arange(L), (2, 1)), 5, C))
    tokens, known = np.zeros((2, L, C), np.float32), np.zeros((2, L), bool)
    for start, end in (made.order.span(k) for k in range(4)):
        z, z_null = (apply(variables, y, tokens, known, method="features") for y in (labels, jnp.full((2,), 3)))
        x, t = noise[:, :, 5], cfg * min(end, L - 1) / L
        for i in range(5, 0, -1):
            times = jnp.full((2, L), path.times[i - 1])
            prediction, share = apply(variables, z, x, times, method="predict")
            prediction = (1 + t) * prediction - t * apply(variables, z_null, x, times, method="predict")[0]
            mean, log_std = path.moments("velocity", prediction, share, x, jnp.full((2, L), i))
            x = mean + temperature * jnp.exp(log_std) * noise[:, :, i - 1]
        group = order[:, start:end]
        np.put_along_axis(known, group, True, axis=1)
        np.put_along_axis(tokens, group[..., None], np.take_along_axis(np.asarray(x), group[..., None], axis=1), axis=1)
    np.testing.assert_allclose(result.tokens, tokens, atol=1e-4)
    np.testing.assert_allclose(images, made.tokenizer.apply({}, tokens, method="decode"), atol=1e-4)
    assert int(result.calls) == 4


@pytest.mark.slow
def test_a_draft_of_the_same_weights_changes_nothing_but_the_calls(sampler, model):
    made, params = sampler
    labels = jnp.array([1, 2])
    want = made(params, jax.random.key(3), labels, cfg=1.5, temperature=0.8)[1]
    fast = dataclasses.replace(made, draft=made.generator, drafts=2, prefill=0.0)
    got = fast(params | {"draft": params["generator"]}, jax.random.key(3), labels, cfg=1.5, temperature=0.8)[1]
    np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-4)
    assert int(got.calls) == 2 and int(got.paths.sum()) == 0
    assert (dataclasses.replace(fast, prefill=0.5).prefill_steps, fast.prefill_steps) == (3, 0)


@pytest.mark.slow
def test_settings_are_traced(sampler):
    made, params = sampler
    labels, key = np.array([0, 1]), jax.random.key(0)
    before = made._sample._cache_size()
    tokens = [made(params, key, labels, cfg=c, temperature=t)[1].tokens for c, t in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.5))]
    assert made._sample._cache_size() - before <= 1
    assert all(np.abs(np.asarray(a - b)).max() > 1e-3 for a, b in zip(tokens, tokens[1:]))


def test_bad_input(sampler, model):
    made, params = sampler
    key, labels = jax.random.key(0), jnp.array([0])
    for change, match in (
        (dict(tokenizer=made.tokenizer.clone(image_size=8)), r"generator \(length=9, channels=4\) does not fit"),
        (dict(prefill=1.5), "prefill=1.5: expected a share"),
        (dict(drafts=2), "drafts=2: there is no draft"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(made, **change)
    with pytest.raises(ValueError, match="steps=10: expected 1 to length=9"):
        dataclasses.replace(made, steps=10)(params, key, labels)
    with pytest.raises(ValueError, match="temperature=0"):
        made(params, key, labels, temperature=0.0)
    with pytest.raises(ValueError, match="image_size=7: patches of 2 pixels"):
        made.tokenizer.clone(image_size=7).length  # noqa: B018
