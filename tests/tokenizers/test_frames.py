"""A tokenizer of images in the place of one of clips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.tokenizers import FlexibleTokenizer, FrameTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SIZES = dict(channels=1, ch=4, ch_mult=(1, 2), res_blocks=1, attention=False, groups=2, z_channels=4, vocab=24, width=3)
FRAME = FlexibleTokenizer(**SIZES, patch_nums=((2, 3),))


@pytest.fixture(scope="module")
def params(randomize):
    params = jax.device_put(randomize(jax.eval_shape(FRAME.init, jax.random.key(0), jnp.zeros((1, 4, 6, 1)))))
    # Features that differ from place to place, so that many codes occur.
    params["params"]["quant_conv"]["bias"] *= 0
    params["params"]["encoder"]["conv_out"]["bias"] *= 0
    return params


def test_frames_are_read_and_written_one_by_one(params):
    """With the variables of the tokenizer of images, frame after frame."""
    tokenizer = FrameTokenizer(FRAME, frames=4)
    clips = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 6, 1)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def apply(module, method, x):
        return module.apply(params, x, method=method)

    tokens = apply(tokenizer, "encode", clips)
    assert tokens.shape == (2, 24) and tokenizer.order.length == 24 and len(np.unique(tokens)) > 4
    assert tokenizer.grid == (4, 2, 3) and tokenizer.image_size == (4, 6) and tokenizer.vocab == 24
    again = apply(tokenizer, "decode", tokens)
    assert again.shape == clips.shape
    for i in range(4):
        one = apply(FRAME, "encode", clips[:, i])
        np.testing.assert_array_equal(tokens.reshape(2, 4, 6)[:, i], one)
        np.testing.assert_allclose(again[:, i], apply(FRAME, "decode", one), atol=1e-5)


def test_clips_that_do_not_fit(params):
    tokenizer = FrameTokenizer(FRAME, frames=4)
    for shape in ((2, 3, 4, 6, 1), (4, 4, 6, 1)):
        with pytest.raises(ValueError, match=r"clips \(.*\): expected \[b, 4, H, W, C\]"):
            tokenizer.apply(params, jnp.zeros(shape), method="encode")
    with pytest.raises(ValueError, match="frames=0: expected at least 1"):
        FrameTokenizer(FRAME, frames=0)
