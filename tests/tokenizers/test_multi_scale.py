import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.tokenizers import ConvDecoder, ConvEncoder, MultiScaleTokenizer

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def run(tiny):
    """What the tokenizer makes of the images, all in one program."""

    @jax.jit
    def everything(params, images):
        def call(method, *args):
            return tiny.tokenizer.apply(params, *args, method=method)

        tokens = call("encode", images)
        return {
            "features": call("features", images),
            "train": call("__call__", images),
            "tokens": tokens,
            "decode": call("decode", tokens),
            "scales": call("decode_scales", tokens),
            "inputs": call("inputs", tokens),
            "pixels": call("to_pixels", call("__call__", images).hidden),
        }

    return everything(tiny.params["tokenizer"], tiny.images)


def test_shapes(tiny, run):
    assert tiny.tokenizer.image_size == (6, 6) and tiny.tokenizer.order.length == 14
    assert run["features"].shape == (4, 3, 3, 6)
    assert run["tokens"].shape == (4, 14) and jnp.issubdtype(run["tokens"].dtype, jnp.integer)
    assert run["decode"].shape == (4, 6, 6, 3) and run["scales"].shape == (3, 4, 6, 6, 3)
    assert run["inputs"].shape == (4, 13, 6)
    assert len(np.unique(run["tokens"])) > 5


def test_training_and_coding_agree(run):
    train = run["train"]
    np.testing.assert_array_equal(train.quantized.tokens, run["tokens"])
    assert np.abs(train.images).max() > 1  # so that the clipping of `decode` is seen
    np.testing.assert_allclose(run["decode"], np.clip(train.images, -1, 1), atol=1e-5)
    np.testing.assert_allclose(run["pixels"], train.images, atol=1e-5)
    np.testing.assert_allclose(run["scales"][-1], run["decode"], atol=1e-5)
    assert np.abs(run["scales"][0] - run["decode"]).max() > 0.1


def test_images_of_a_batch_do_not_meet(tiny, run):
    encode = jax.jit(lambda p, x: tiny.tokenizer.apply(p, x, method="encode"))
    np.testing.assert_array_equal(encode(tiny.params["tokenizer"], tiny.images[1:2]), run["tokens"][1:2])


def test_feeding_scale_by_scale_gives_inputs_and_image(tiny, run):
    order = tiny.tokenizer.order

    @jax.jit
    def feed_all(params, tokens):
        picture, inputs = jnp.zeros((4, 3, 3, 6)), []
        for scale, ids in enumerate(order.split(tokens)):
            picture, following = tiny.tokenizer.apply(params, picture, scale, ids, method="feed")
            inputs.append(following)
        return tiny.tokenizer.apply(params, picture, method="decode_features"), jnp.concatenate(inputs[:-1], axis=1)

    image, inputs = feed_all(tiny.params["tokenizer"], run["tokens"])
    np.testing.assert_allclose(image, run["decode"], atol=1e-5)
    np.testing.assert_allclose(inputs, run["inputs"], atol=1e-5)


def test_grey_oblong_images_and_gradients_of_all_parts(randomize):
    tokenizer = MultiScaleTokenizer(
        channels=1, ch=4, ch_mult=(1, 1), res_blocks=1, groups=2, vocab=8, width=3, patch_nums=((1, 1), (1, 3)), phis=1
    )
    assert tokenizer.image_size == (2, 6)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 2, 6, 1)).astype(np.float32)
    params = randomize(jax.eval_shape(tokenizer.init, jax.random.key(0), images))

    def loss(params):
        out = tokenizer.apply(params, images)
        return jnp.mean(jnp.square(out.images - images)) + out.quantized.loss, out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert out.quantized.tokens.shape == (2, 4) and out.images.shape == images.shape
    dead = [jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if np.abs(g).max() < 1e-7]
    assert not dead


def test_dropout_needs_its_stream_and_is_for_training_only(tiny, run):
    tokenizer = tiny.tokenizer.clone(dropout=0.5)

    @functools.partial(jax.jit, static_argnums=3)
    def features(params, images, key, train):
        return tokenizer.apply(params, images, train, method="features", rngs={"dropout": key})

    args = tiny.params["tokenizer"], tiny.images
    one, two = features(*args, jax.random.key(0), True), features(*args, jax.random.key(1), True)
    assert np.abs(one - two).max() > 1e-2
    np.testing.assert_allclose(features(*args, jax.random.key(0), False), run["features"], atol=1e-5)
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda p, x: tokenizer.apply(p, x, train=True), *args)


def test_half_precision_is_close(tiny, run):
    half = tiny.tokenizer.clone(dtype=jnp.bfloat16)
    got = jax.jit(lambda p, x: half.apply(p, x, method="features"))(tiny.params["tokenizer"], tiny.images)
    assert got.dtype == jnp.float32
    error = np.abs(got - run["features"]).max() / np.abs(run["features"]).max()
    assert 1e-5 < error < 0.05, error


def test_attention_at_the_lowest_resolution_is_optional():
    sizes = dict(ch=4, ch_mult=(1, 2), res_blocks=2, groups=2)
    encoder, decoder = ConvEncoder(**sizes, z_channels=3), ConvDecoder(**sizes)
    for module, x in ((encoder, jnp.zeros((1, 4, 4, 3))), (decoder, jnp.zeros((1, 2, 2, 3)))):
        with_attention = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
        without = jax.eval_shape(module.clone(attention=False).init, jax.random.key(0), x)["params"]
        gone = {name for name in with_attention if "attention" in name}
        assert gone == set(with_attention) - set(without) and len(gone) == (2 if isinstance(module, ConvEncoder) else 3)
        assert all("_1_attention_" in name for name in gone)  # of the lowest level
        assert "attention" in without["mid"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"images \(2, 8, 8, 3\): this tokenizer takes \[b, 6, 6, 3\]"),
        (np.zeros((2, 6, 6, 1), np.float32), r"takes \[b, 6, 6, 3\]"),
        (np.zeros((6, 6, 3), np.float32), r"images \(6, 6, 3\)"),
        (np.zeros((2, 6, 6, 3), np.uint8), "dtype uint8: expected floating-point values in"),
    ],
)
def test_bad_images(tiny, images, message):
    for method in ("encode", "__call__"):
        with pytest.raises(ValueError, match=message):
            tiny.tokenizer.apply(tiny.params["tokenizer"], images, method=method)


def test_groups_must_divide_the_channels():
    for module in (ConvEncoder(ch=6, ch_mult=(1,), groups=4), ConvDecoder(ch=6, ch_mult=(1,), groups=4)):
        with pytest.raises(ValueError, match=r"groups=4 does not divide 6 channels \(ch \* 1\)"):
            module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
