"""Masks: what the frozen model says does not change, training sees what decoding sees, and the law is the target's."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, Rejection, View
from jaxgen.decoding.conformance import chi_square, sequence_law
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.multi_token import MultiTokenModel
from jaxgen.generators.sequence_sampler import SequenceSampler, stepper
from jaxgen.recipes.multi_token import MaskMethod, masked_inputs

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, K, L = 4, 2, 4
BASE = LanguageModel(vocab=V, width=8, heads=2, depth=2)
MODEL = MultiTokenModel(BASE, masks=K, rank=2)


@pytest.fixture(scope="module")
def variables():
    start = jnp.zeros((1, 4), jnp.int32)
    base = jax.eval_shape(BASE.init, jax.random.key(0), start)
    base = jax.tree.map(lambda x: 0.6 * jax.random.normal(jax.random.key(x.size), x.shape), base)
    trained = MODEL.init(jax.random.key(1), base)
    return {"base": base, **jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), trained)}


def test_the_layout_of_training():
    tokens, anchors = jnp.arange(10).reshape(2, 5), jnp.array([[0, 2], [1, 1]])
    inputs, pos, visible = masked_inputs(tokens, anchors, (V, V + 1))
    assert inputs[0].tolist() == [0, 1, 2, 3, 4, 4, 5, 4, 5] and pos[0].tolist() == [0, 1, 2, 3, 4, 1, 2, 3, 4]
    want = np.zeros((2, 9, 9), bool)
    for row in range(2):
        want[row, :5, :5] = np.tril(np.ones((5, 5)))
        for group, anchor in enumerate(anchors[row].tolist()):
            for j in range(K):
                at = 5 + 2 * group + j
                want[row, at, : anchor + 1] = want[row, at, 5 + 2 * group : at + 1] = True
    np.testing.assert_array_equal(visible, want)


def test_masks_change_nothing_for_tokens_and_see_the_same_as_in_training(variables):
    tokens = jnp.array([[1, 3, 0, 2, 1]])
    base = jax.jit(BASE.apply)(variables["base"], tokens)
    inputs, pos, visible = masked_inputs(tokens, jnp.array([[1, 4]]), MODEL.probes)
    features = jax.jit(MODEL.features)(variables, inputs, pos, visible)
    np.testing.assert_allclose(jax.jit(MODEL.logits)(variables, features[:, :5]), base, atol=1e-5)
    # As decoding reads it: a prefix in the cache, then the root with its masks behind it.
    read, cache = jax.jit(lambda *args: MODEL.apply(*args)), MODEL.init_cache(1, 9)
    view = View(tokens[:, :4], jnp.arange(4), jnp.tril(jnp.ones((4, 4), bool)))
    cache = read(variables, cache, view)[1].commit(jnp.array([4]))
    query = View(jnp.array([[1, V, V + 1]]), jnp.array([4, 5, 6]), jnp.tril(jnp.ones((3, 3), bool)))
    out, _ = read(variables, cache, query)
    # Features of a scale of 80, by attention in two parts.
    np.testing.assert_allclose(out.feats[0, 1:], features[0, 7:], rtol=2e-6, atol=1e-5)
    # The gate is exact: with and without adapters the token's own law is the same number.
    off = variables | {"adapters": jax.tree.map(jnp.zeros_like, variables["adapters"])}
    other, _ = read(off, cache, query)
    np.testing.assert_array_equal(out.params[:, 0], other.params[:, 0])
    assert np.abs(out.params[:, 1:] - other.params[:, 1:]).max() > 0.01


@pytest.fixture(scope="module")
def law(variables):
    return sequence_law(
        stepper(BASE),
        params=variables["base"],
        cache=BASE.init_cache(V**L, 1 + L).commit(jnp.zeros((V**L,), jnp.int32)),
        cond=None,
        prompt=[1],
        vocab=V,
        length=L,
        transform=lambda logits, context: logits / 0.7,
    )


def test_decoding_keeps_the_law_and_the_tokens(variables, law):
    prompt = np.ones((1024, 1), np.int32)
    options = dict(max_length=1 + L, temperature=0.7)
    plain = SequenceSampler(model=BASE)({"generator": variables["base"]}, jax.random.key(0), prompt, **options)
    params = {"generator": variables}
    coupled = SequenceSampler(model=MODEL, method=MaskMethod(MODEL, Coupled()))
    got = coupled(params, jax.random.key(0), prompt, **options)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    assert float(got.row_calls.mean()) < L
    sampler, counts = SequenceSampler(model=MODEL, method=MaskMethod(MODEL, Rejection())), collections.Counter()
    for i in range(4):
        result = sampler(params, jax.random.key(i), prompt, **options)
        counts.update(map(tuple, np.asarray(result.tokens[:, 1:]).tolist()))
    assert abs(chi_square(counts, law)) < 4
    drafts = collections.Counter(map(tuple, np.asarray(plain.tokens[:, :0:-1]).tolist()))
    assert chi_square(drafts, law) > 10  # the control: sequences backwards


def test_bad_input():
    with pytest.raises(ValueError, match="masks=0 and rank=16"):
        MultiTokenModel(BASE, masks=0)
