"""Visual-token compressors: what each way leaves, that each part matters, and the choice between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.compression import WAYS, ElasticCompressor

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

GRID, D = (4, 6), 8
RNG = np.random.default_rng(0)
X, QUESTION = RNG.standard_normal((3, 24, D)).astype(np.float32), RNG.standard_normal((3, D)).astype(np.float32)
ALL = ElasticCompressor(grid=GRID, ways=WAYS)


@pytest.fixture(scope="module")
def variables(randomize):
    return randomize(jax.eval_shape(ALL.init, jax.random.key(0), X, QUESTION), 3)


@pytest.fixture(scope="module")
def compressed(variables):
    """What each way alone leaves, of a picture."""

    def alone(way):
        module = ElasticCompressor(grid=GRID, ways=(way,))
        gate = {"kernel": jnp.zeros((2 * D, 1)), "bias": jnp.zeros(1)}
        params = {"params": variables["params"] | {"gate": gate}}
        return jax.jit(lambda x: module.apply(params, x, QUESTION))

    return {way: alone(way) for way in WAYS}


def test_what_each_way_leaves(compressed, variables):
    left = {way: compress(X) for way, compress in compressed.items()}
    few = {way: 6 for way in WAYS} | {"keep": 24, "drop": 0}
    for way in WAYS:
        assert left[way].tokens.shape == (3, few[way], D) and (left[way].count == few[way]).all()
    np.testing.assert_allclose(left["keep"].tokens, X, rtol=1e-6)
    blocks = X.reshape(3, 2, 2, 3, 2, D)
    np.testing.assert_allclose(left["pool"].tokens, blocks.mean((2, 4)).reshape(3, 6, D), rtol=1e-5, atol=1e-6)
    conv = variables["params"]["conv"]
    kernel = jnp.reshape(conv["kernel"], (2, 2, D, D))
    want = jax.lax.conv_general_dilated(
        X.reshape(3, 4, 6, D), kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    np.testing.assert_allclose(left["conv"].tokens, want.reshape(3, 6, D) + conv["bias"], rtol=1e-4, atol=1e-4)
    score = (X @ variables["params"]["score"]["kernel"] + variables["params"]["score"]["bias"])[..., 0]
    for row in range(3):
        kept = np.sort(np.argsort(-score[row])[:6])
        want = X[row, kept] * (2 / (1 + np.exp(-score[row, kept])))[:, None]
        np.testing.assert_allclose(left["prune"].tokens[row], want, rtol=1e-4, atol=1e-5)
    # The resampler is the only way in which every output reads every token.
    moved = compressed["resample"](X + np.eye(24)[5][:, None])
    assert (np.abs(moved.tokens - left["resample"].tokens).max(-1) > 1e-4).all()


def test_the_gate_chooses_by_picture_and_question(variables, compressed):
    apply = jax.jit(lambda variables, x, question: ALL.apply(variables, x, question))
    left = apply(variables, X, QUESTION)
    gate = variables["params"]["gate"]
    logits = np.concatenate([X.mean(1), QUESTION], axis=-1) @ gate["kernel"] + gate["bias"]
    chosen = logits.argmax(-1)
    np.testing.assert_array_equal(left.gates, np.eye(len(WAYS))[chosen])
    for row, way in enumerate(WAYS[i] for i in chosen):
        n = int(left.count[row])
        np.testing.assert_allclose(left.tokens[row, :n], compressed[way](X).tokens[row], rtol=1e-4, atol=1e-5)
    # Each way can be chosen, by the question alone.
    for i, way in enumerate(WAYS):
        steered = {"params": variables["params"] | {"gate": {"kernel": gate["kernel"], "bias": 50 * jnp.eye(len(WAYS))[i]}}}
        out = apply(steered, X, QUESTION)
        np.testing.assert_allclose(out.tokens[:, : int(out.count[0])], compressed[way](X).tokens, rtol=1e-4, atol=1e-5)


def test_training_draws_ways_and_gives_the_gate_gradients(variables):
    @jax.jit
    def gradient(key):
        def total(variables):
            left = ALL.apply(variables, X, QUESTION, key)
            return (left.tokens**2).sum(), left.gates

        (_, gates), grads = jax.value_and_grad(total, has_aux=True)(variables)
        return gates, grads["params"]["gate"]["kernel"]

    drawn = [gradient(jax.random.key(i)) for i in range(8)]
    assert all(np.allclose(np.sort(gates, axis=1)[:, -1], 1, atol=1e-5) for gates, _ in drawn)
    assert len({tuple(np.asarray(gates).argmax(1)) for gates, _ in drawn}) > 1
    assert all(np.abs(grads).max() > 1e-4 for _, grads in drawn)


def test_bad_input():
    with pytest.raises(ValueError, match="ways=.*expected some of keep"):
        ElasticCompressor(grid=GRID, ways=("shrink",))
    with pytest.raises(ValueError, match="stride=4 must divide the grid"):
        ElasticCompressor(grid=GRID, stride=4)
    with pytest.raises(ValueError, match="23 visual tokens"):
        ALL.init(jax.random.key(0), X[:, 1:], QUESTION)
