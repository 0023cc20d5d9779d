"""The tokenizer without residuals: scales that do not depend on one another, at any size."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.resample import resize
from jaxgen.scale_lists import Cells
from jaxgen.tokenizers import FlexibleTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SIZES = dict(channels=1, ch=4, ch_mult=(1, 2), res_blocks=1, attention=False, groups=2, z_channels=4, vocab=24, width=3)


@pytest.fixture(scope="module")
def own(randomize):
    tokenizer = FlexibleTokenizer(**SIZES, patch_nums=(1, 2, 3))
    params = jax.device_put(randomize(jax.eval_shape(tokenizer.init, jax.random.key(0), jnp.zeros((1, 6, 6, 1)))))
    # Features that differ from place to place, so that many codes occur.
    params["params"]["quant_conv"]["bias"] *= 0
    params["params"]["encoder"]["conv_out"]["bias"] *= 0
    images = np.random.default_rng(0).uniform(-1, 1, (2, 6, 6, 1)).astype(np.float32)

    def apply(*args, tokenizer=tokenizer, method):
        return jax.jit(lambda *args: tokenizer.apply(params, *args, method=method))(*args)

    tokens = apply(images, method="encode")
    return types.SimpleNamespace(tokenizer=tokenizer, params=params, images=images, apply=apply, tokens=tokens)


def test_each_scale_is_the_whole_picture(own):
    features = own.apply(own.images, method="features")
    codes = np.float64(own.params["params"]["quantizer"]["codebook"])
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    parts = own.tokenizer.order.split(own.tokens)
    for ids, n in zip(parts, (1, 2, 3)):
        z = np.asarray(resize(features, (n, n), "area"), np.float64).reshape(2, n * n, 3)
        np.testing.assert_array_equal(ids, (z / np.linalg.norm(z, axis=-1, keepdims=True) @ codes.T).argmax(-1))
    assert len(np.unique(own.tokens)) > 4
    # Coarse tokens play no part in the image.
    changed = jnp.concatenate([(own.tokens[:, :5] + 1) % 24, own.tokens[:, 5:]], axis=1)
    decode = own.apply(own.tokens, method="decode")
    np.testing.assert_array_equal(own.apply(changed, method="decode"), decode)
    pictures = own.apply(own.tokens, method="decode_scales")
    assert pictures.shape == (3, 2, 6, 6, 1)
    np.testing.assert_allclose(pictures[-1], decode, atol=1e-6)
    single = own.tokenizer.clone(patch_nums=(2,))
    want = resize(own.apply(parts[1], tokenizer=single, method="decode"), (6, 6), "bicubic")
    np.testing.assert_allclose(pictures[1], want, atol=1e-5)


def test_inputs_are_the_scale_before_enlarged(own):
    inputs = own.apply(own.tokens, method="inputs")
    assert inputs.shape == (2, 13, 3)
    codes = [own.apply(ids, method=lambda m, t: m.quantizer.lookup(t)) for ids in own.tokenizer.order.split(own.tokens)]
    np.testing.assert_allclose(inputs[:, :4], np.repeat(codes[0], 4, axis=1), atol=1e-6)
    second = resize(codes[1].reshape(2, 2, 2, 3), (3, 3), "bicubic").reshape(2, 9, 3)
    np.testing.assert_allclose(inputs[:, 4:], second, atol=1e-6)
    carry, following = own.tokenizer.apply(own.params, None, 1, own.tokens[:, 1:5], method="feed")
    np.testing.assert_allclose(following, inputs[:, 4:], atol=1e-6)
    np.testing.assert_allclose(carry.reshape(2, 4, 3), codes[1], atol=1e-6)
    assert own.tokenizer.apply(own.params, None, 2, own.tokens[:, 5:], method="feed")[1] is None


def test_other_lists_and_shapes_with_the_same_parameters(own):
    wide = own.tokenizer.clone(patch_nums=(1, (2, 3), (3, 5)))
    images = np.random.default_rng(1).uniform(-1, 1, (1, 6, 10, 1)).astype(np.float32)
    tokens = own.apply(images, tokenizer=wide, method="encode")
    assert tokens.shape == (1, 22) and wide.image_size == (6, 10)
    assert own.apply(tokens, tokenizer=wide, method="decode").shape == (1, 6, 10, 1)
    shapes = [jax.eval_shape(t.init, jax.random.key(0), jnp.zeros((1, *t.image_size, 1))) for t in (own.tokenizer, wide)]
    assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, *shapes))


def test_a_traced_list(own):
    """Tokens and inputs of another list than the tokenizer's own, from arrays."""
    other = own.tokenizer.clone(patch_nums=(1, 3))
    sizes = np.array([[1, 1], [3, 3], [0, 0]], np.int32)
    run = jax.jit(lambda x, sizes: own.tokenizer.apply(own.params, x, Cells.of(sizes, 14), method="encode"))
    tokens = run(own.images, sizes)
    np.testing.assert_array_equal(tokens[:, :10], own.apply(own.images, tokenizer=other, method="encode"))
    read = jax.jit(lambda t, sizes: own.tokenizer.apply(own.params, t, Cells.of(sizes, 14), method="inputs"))
    want = own.apply(tokens[:, :10], tokenizer=other, method="inputs")
    np.testing.assert_allclose(read(tokens, sizes)[:, :9], want, atol=1e-6)


def test_training_output(own):
    run = jax.jit(lambda t, p, x: t.apply(p, x), static_argnums=0)
    out = run(own.tokenizer, own.params, own.images)
    np.testing.assert_array_equal(out.quantized.tokens, own.tokens)
    assert [x.shape for x in out.smaller] == [(2, 2, 2, 1), (2, 4, 4, 1)] and out.images.shape == (2, 6, 6, 1)
    np.testing.assert_allclose(np.clip(out.images, -1, 1), own.apply(own.tokens, method="decode"), atol=1e-5)
    np.testing.assert_allclose(own.tokenizer.apply(own.params, out.hidden, method="to_pixels"), out.images, atol=1e-5)
    np.testing.assert_array_equal(out.quantized.counts, np.bincount(np.ravel(own.tokens), minlength=24))
    assert out.quantized.vectors.shape == (28, 3)
    fewer = run(own.tokenizer.clone(decoded=2), own.params, own.images)
    assert len(fewer.smaller) == 1
    np.testing.assert_allclose(fewer.smaller[0], out.smaller[1], atol=1e-5)


def test_bad_input(own):
    for change, message in (
        (dict(patch_nums=(1, 2, 2)), r"patch_nums \(1, 2, 2\) must increase"),
        (dict(patch_nums=(1, 3, 2)), "must not decrease"),
        (dict(decoded=4), "decoded=4: expected a number of the 3 scales"),
    ):
        with pytest.raises(ValueError, match=message):
            own.tokenizer.clone(**change)
    for images, message in (
        (np.zeros((1, 8, 8, 1), np.float32), r"images \(1, 8, 8, 1\): scales that end at \(3, 3\) take \[b, 6, 6, 1\]"),
        (np.zeros((1, 6, 6, 1), np.uint8), "dtype uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            own.tokenizer.apply(own.params, images, method="encode")
