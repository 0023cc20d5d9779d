"""The binary autoencoder: bits and numbers, what is drawn and when, gradients, and a tiny overfit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.quantizers import bernoulli_bits, codes_of, entropy_penalty, joined_bits, parted_bits
from jaxgen.tokenizers import BinaryTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SIZES = dict(channels=1, ch=4, ch_mult=(1, 2), res_blocks=1, attention=False, groups=2, z_channels=4, bits=6, grid=2)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1)).astype(np.float32)


def test_bits_and_numbers():
    bits = np.array([[1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 1]])
    np.testing.assert_array_equal(joined_bits(bits, 2), [[5, 3], [2, 4]])  # the first bit counts 1
    np.testing.assert_array_equal(joined_bits(bits, 1), [[29], [34]])
    for parts in (1, 2, 3, 6):
        np.testing.assert_array_equal(parted_bits(joined_bits(bits, parts), 6), bits)


def test_drawn_bits_have_their_probability_and_its_gradient():
    features = jnp.array([-2.0, 0.1, 1.5])
    drawn = jax.jit(lambda key: bernoulli_bits(jnp.broadcast_to(features, (4000, 3)), key))(jax.random.key(0))
    p = 1 / (1 + np.exp(-np.asarray(features, np.float64)))
    assert set(np.unique(np.round(np.asarray(drawn), 6))) == {0, 1}
    assert np.all(np.abs(np.asarray(drawn).mean(0) - p) < 5 * np.sqrt(p * (1 - p) / 4000))
    np.testing.assert_array_equal(np.asarray(bernoulli_bits(features)), [0, 1, 1])
    grads = jax.grad(lambda x: (bernoulli_bits(x) * jnp.array([1.0, 2, 3])).sum())(features)
    np.testing.assert_allclose(grads, np.array([1, 2, 3]) * p * (1 - p), rtol=1e-5)


@pytest.fixture(scope="module", params=["bernoulli", "spherical"])
def case(request, randomize):
    model = BinaryTokenizer(**SIZES, code=request.param, parts=2, penalty=0.5)
    return model, jax.device_put(randomize(jax.eval_shape(model.init, jax.random.key(0), IMAGES)))


def test_tokens_are_the_signs_and_decode_to_what_training_sees(case):
    model, params = case
    tokens = np.asarray(jax.jit(lambda x: model.apply(params, x, method="encode"))(IMAGES))
    assert tokens.shape == (3, 8) and model.vocab == 8 and model.order.length == 8 and model.order.steps == 4
    features = np.asarray(jax.jit(lambda x: model.apply(params, x, method="features"))(IMAGES))
    bits = (features > 0).reshape(3, 8, 3)
    np.testing.assert_array_equal(tokens, (bits * [1, 2, 4]).sum(-1))

    out = jax.jit(model.apply)(params, IMAGES)
    decoded = jax.jit(lambda ids: model.apply(params, ids, method="decode"))(tokens)
    np.testing.assert_allclose(decoded, np.clip(out.images, -1, 1), atol=1e-5)
    np.testing.assert_array_equal(out.quantized.tokens, tokens)
    np.testing.assert_array_equal(out.quantized.counts, np.bincount(tokens.reshape(-1), minlength=8))
    codes = np.asarray(codes_of(bits.reshape(3, 2, 2, 6))) if model.code == "spherical" else bits.reshape(3, 2, 2, 6)
    np.testing.assert_allclose(out.quantized.features, codes, atol=1e-6)
    p = 1 / (1 + np.exp(-features))
    loss = (p * (1 - p)).mean() if model.code == "bernoulli" else float(entropy_penalty(features))
    assert out.quantized.loss == pytest.approx(0.5 * float(loss), rel=1e-4)


def test_only_bernoulli_training_draws(case):
    model, params = case
    for stochastic in (True, False):
        other = model.clone(stochastic=stochastic)
        train = jax.jit(lambda key, other=other: other.apply(params, IMAGES, True, rngs={"dropout": key}))
        same = np.array_equal(train(jax.random.key(0)).quantized.tokens, train(jax.random.key(1)).quantized.tokens)
        assert same == (not stochastic or model.code == "spherical")


def test_parts_share_parameters(case):
    model, params = case
    whole = model.clone(parts=1)
    one, two = (jax.jit(lambda x, m=m: m.apply(params, x, method="encode"))(IMAGES) for m in (whole, model))
    np.testing.assert_array_equal(parted_bits(one.reshape(3, 4, 1), 6), parted_bits(two.reshape(3, 4, 2), 6))


def test_it_learns_to_tell_images_apart():
    model = BinaryTokenizer(**SIZES, stochastic=False)
    params, optimizer = jax.jit(model.init)(jax.random.key(0), IMAGES), optax.adam(1e-2)

    @jax.jit
    def train(params):
        def update(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(lambda p: jnp.square(model.apply(p, IMAGES).images - IMAGES).mean())(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(update, (params, optimizer.init(params)), length=300)[1]

    losses = train(params)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(parts=4), "bits=6, parts=4: expected a number of parts that divides the bits"),
        (dict(parts=0), "bits=6, parts=0"),
        (dict(bits=25, parts=1), "bits=25, parts=1: .*at most 24 a part"),
        (dict(code="plain"), "code='plain' is not one of bernoulli, spherical"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        BinaryTokenizer(**SIZES | change)


def test_bad_images(case):
    model, params = case
    for images in (IMAGES[:, :3], np.zeros((1, 4, 4, 1), np.int32)):
        with pytest.raises(ValueError, match=r"expected floating-point \[b, 4, 4, 1\]"):
            model.apply(params, images, method="encode")
