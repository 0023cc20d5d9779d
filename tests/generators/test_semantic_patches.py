"""SemAIM: what a patch is predicted from, what teaches the encoder, and completion against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.generators.semantic_patches import SemanticPatchModel, SemanticPatchSampler
from jaxgen.tokenizers.latents import LatentTokenizer

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

B, N, C = 2, 9, 4
MODEL = SemanticPatchModel(length=N, channels=C, targets=5, width=8, depth=2, heads=2, query_depth=1, mlp_ratio=2.0)
RNG = np.random.default_rng(0)
PATCHES = RNG.uniform(-1, 1, (B, N, C)).astype(np.float32)
ORDERS = np.stack([RNG.permutation(N) for _ in range(B)]).astype(np.int32)


@pytest.fixture(scope="module")
def params(randomize):
    return jax.device_put(randomize(MODEL.param_shapes()))


@pytest.fixture(scope="module")
def run(params):
    apply = jax.jit(MODEL.apply)
    return lambda patches, orders=ORDERS: [np.asarray(x) for x in apply(params, patches, orders)]


def test_a_patch_is_predicted_from_those_before_it(run):
    predicted, pixels = run(PATCHES)
    assert predicted.shape == (B, N, 5) and pixels.shape == (B, N, C) and predicted.dtype == np.float32
    place = np.argsort(ORDERS, axis=1)  # of each patch in its image's order
    for patch in range(N):
        changed = PATCHES.copy()
        changed[:, patch] += 1.0
        for before, after in zip((predicted, pixels), run(changed)):
            moved = np.abs(after - before).max(-1) > 1e-5
            np.testing.assert_array_equal(moved, place > place[:, [patch]])
    # The order of what came before does not matter to what both orders know: the last patch.
    other = ORDERS.copy()
    other[:, [0, 3]] = other[:, [3, 0]]
    last = np.arange(B), ORDERS[:, -1]
    assert np.abs(run(PATCHES, other)[0][last] - predicted[last]).max() > 1e-5  # its neighbours were read by others


def test_features_see_everything(params):
    encode = jax.jit(lambda x: MODEL.apply(params, x, method="encode"))
    tokens = encode(PATCHES)
    assert tokens.shape == (B, 1 + N, 8)
    changed = PATCHES.copy()
    changed[:, 4] += 1.0
    assert (np.abs(np.asarray(encode(changed) - tokens)).max(-1) > 1e-5).all()


def test_pixels_teach_nothing(params):
    def loss(params):
        return jnp.square(MODEL.apply(params, PATCHES, ORDERS)[1]).mean()

    gradients = jax.jit(jax.grad(loss))(params)["params"]
    for name, leaves in gradients.items():
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(leaves)) == (name == "pixels"), name


def test_completion_is_the_python_loop_and_traces_once(params, run, monkeypatch):
    traces = []
    monkeypatch.setattr(SemanticPatchModel, "__call__", _counted(SemanticPatchModel.__call__, traces))
    tokenizer = LatentTokenizer(image_size=6, channels=1, patch=2)
    sampler = SemanticPatchSampler(generator=MODEL, tokenizer=tokenizer)
    images = tokenizer.apply({}, PATCHES, method="decode")
    for orders, known in ((ORDERS, 3), (ORDERS[:, ::-1], 8)):
        patches = np.zeros_like(PATCHES)
        for i in range(N):
            chosen = np.arange(B), orders[:, i]
            patches[chosen] = PATCHES[chosen] if i < known else run(patches, orders)[1][chosen]
        want = tokenizer.apply({}, patches, method="decode")
        np.testing.assert_allclose(sampler(params, images, orders, known), want, atol=1e-5)
    np.testing.assert_allclose(sampler(params, images, ORDERS, N), images, atol=1e-6)
    assert len(traces) <= 1 + 1  # the sampler's, and none or one of `run`


def _counted(fn, calls):
    def wrapped(self, *args, **kwargs):
        calls.append(1)
        return fn(self, *args, **kwargs)

    return wrapped


def test_bad_input(params):
    for fields, message in (
        (dict(length=8), "length=8: patches of a square"),
        (dict(query_depth=3), "query_depth=3 must divide depth=2"),
        (dict(width=10), "width=10: expected a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL.clone(**fields)
    with pytest.raises(ValueError, match="9 patches of 4 numbers does not fit 4 of 4"):
        SemanticPatchSampler(generator=MODEL, tokenizer=LatentTokenizer(image_size=4, channels=1, patch=2))
    sampler = SemanticPatchSampler(generator=MODEL, tokenizer=LatentTokenizer(image_size=6, channels=1, patch=2))
    with pytest.raises(ValueError, match=r"known=10: expected 0\.\.9 patches"):
        sampler(params, jnp.zeros((1, 6, 6, 1)), ORDERS[:1], 10)
