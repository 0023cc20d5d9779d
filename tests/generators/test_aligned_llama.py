"""ARRA's model: the Llama that it is, what it says of the whole image, and from where the alignment teaches it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.generators.aligned_llama import AlignedLlama
from jaxgen.generators.image_llama import ImageLlama

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

SIZES = dict(vocab=9, grid=2, num_classes=3, width=16, heads=2, depth=2)
MODEL = AlignedLlama(**SIZES, align_width=5, align_after=1)
LABELS, TOKENS = np.array([0, 2]), np.random.default_rng(0).integers(0, 9, (2, 4)).astype(np.int32)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(MODEL.param_shapes()))


def test_it_is_the_llama(params):
    """Sampling needs none of what alignment adds."""
    plain = ImageLlama(**SIZES)
    shapes = plain.param_shapes()["params"]
    added = {name for name in params["params"] if name not in shapes}
    assert added == {"align_fc1", "align_fc2"}
    assert jax.tree.map(jnp.shape, {name: params["params"][name] for name in shapes}) == jax.tree.map(jnp.shape, shapes)
    want = jax.jit(plain.apply)({"params": {name: params["params"][name] for name in shapes}}, LABELS, TOKENS)
    np.testing.assert_allclose(jax.jit(MODEL.apply)(params, LABELS, TOKENS), want, atol=1e-5)


def test_every_position_says_and_learns(params):
    """From what it has seen; blocks behind the hidden states that are compared learn nothing from it."""

    def aligning(model):
        return jax.jit(lambda params, tokens: model.apply(params, LABELS, tokens, method="aligned"))

    aligned = aligning(MODEL)
    _, told = aligned(params, TOKENS)
    assert told.shape == (2, 4, 5) and told.dtype == jnp.float32
    for place in range(4):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % 9
        moved = np.abs(np.asarray(aligned(params, changed)[1] - told)).max(axis=(0, 2)) > 1e-5
        np.testing.assert_array_equal(moved, np.arange(4) > place)

    gradients = jax.jit(jax.grad(lambda params: jnp.square(aligned(params, TOKENS)[1]).sum()))(params)["params"]
    blocks = gradients["transformer"].items()
    largest = {name: max(float(np.abs(x).max()) for x in jax.tree.leaves(tree)) for name, tree in blocks}
    assert largest["blocks_0"] > 1e-3 and largest["blocks_1"] == 0
    assert np.abs(gradients["align_fc1"]["kernel"]).max() > 0 and np.abs(gradients["head"]["kernel"]).max() == 0
    behind = aligning(MODEL.clone(align_after=2))(params, TOKENS)[1]
    assert np.abs(np.asarray(behind - told)).max() > 1e-3


def test_bad_input():
    with pytest.raises(ValueError, match=r"align_after=3: expected 1\.\.2 blocks"):
        MODEL.clone(align_after=3)
    with pytest.raises(ValueError, match="scan_layers=True: hidden states between blocks"):
        MODEL.clone(scan_layers=True)
