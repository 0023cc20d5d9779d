"""Two streams: what a query sees, training as decoding, and the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import View, check_step
from jaxgen.decoding.any_subset import Queries
from jaxgen.decoding.speculate import FULL
from jaxgen.generators.any_subset import AnySubsetModel, AnySubsetSampler
from jaxgen.generators.sequence_sampler import stepper

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, S = 5, 7
MODEL = AnySubsetModel(vocab=V, width=8, heads=2, depth=2)


@pytest.fixture(scope="module")
def variables():
    start = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), start, start, start)
    return jax.tree.map(lambda x: 0.7 * jax.random.normal(jax.random.key(x.size), x.shape), shapes)


@pytest.fixture(scope="module")
def call(variables):
    return jax.jit(lambda *args: MODEL.apply(variables, *args))


@pytest.fixture(scope="module")
def text():
    rng = np.random.default_rng(0)
    visible = rng.random((64, S)) < 0.4
    visible[:, 2] = True
    return rng.integers(0, V, (64, S)).astype(np.int32), visible


@pytest.mark.slow
def test_a_query_sees_the_tokens_before_it_and_their_places(call):
    tokens, places = jnp.array([[1, 3, 0, 2, 2, 0]]), jnp.array([[4, 0, 6, 2, 5, 3]])
    targets = jnp.array([[0, 6, 2, 5, 3, 1]])
    want = call(tokens, places, targets)
    for name, changed in (("token", (tokens.at[0, 2].set(4), places)), ("place", (tokens, places.at[0, 2].set(1)))):
        got = call(*changed, targets)
        np.testing.assert_array_equal(got[:, :2], want[:, :2], err_msg=name)
        assert np.abs(got[:, 2:] - want[:, 2:]).max(axis=(0, 2)).min() > 1e-3
    # What one query asks for changes that query alone.
    got = call(tokens, places, targets.at[0, 1].set(3))
    np.testing.assert_array_equal(np.delete(got, 1, axis=1), np.delete(want, 1, axis=1))
    assert np.abs(got[:, 1] - want[:, 1]).max() > 1e-3
    # Places count relative to each other.
    np.testing.assert_allclose(call(tokens, places + 3, targets + 3), want, atol=1e-4)


@pytest.mark.slow
def test_training_sees_what_decoding_sees(variables, call):
    """The whole order at once, and in pieces with a cache: a part without queries, drafts from its end, then the rest."""
    tokens, order = jnp.array([[1, 3, 0, 2, 4, 1]]), jnp.array([[4, 0, 6, 2, 5, 1, 3]])
    want = call(tokens, order[:, :-1], order[:, 1:])

    @jax.jit
    def ask(cache, tokens, pos, mask, places, behind):
        return MODEL.apply(variables, cache, View(tokens, pos, mask), Queries(places, behind), method="ask")

    cache = MODEL.init_cache(1, 8).commit(jnp.array([0]))
    seen = jnp.tril(jnp.ones((4, 4), bool))
    _, cache = ask(cache, tokens[:, :4], order[:, :4], seen, order[:, :0], jnp.zeros((0,), jnp.int32))
    cache = cache.commit(jnp.array([2]))  # what lies behind is forgotten
    out, _ = ask(cache, tokens[:, 2:3], order[:, 2:3], seen[:1, :1], order[:, 3:7], jnp.zeros((4,), jnp.int32))
    for i in range(4):
        alone = call(tokens, order[:, :-1], jnp.full((1, 6), order[0, 3 + i]))
        np.testing.assert_allclose(out.params[:, i], alone[:, 2], atol=1e-5)
    out, _ = ask(cache, tokens[:, 2:], order[:, 2:6], seen, order[:, 3:], jnp.arange(4))
    np.testing.assert_allclose(out.params, want[:, 2:], atol=1e-5)


@pytest.mark.slow
def test_the_step_function_keeps_the_contract(variables):
    order = jnp.array([np.random.default_rng(i).permutation(16) for i in range(2)], jnp.int32)
    check_step(stepper(MODEL), params=variables, cache=MODEL.init_cache(2, 13), cond=order, batch=2, vocab=V)


@pytest.mark.slow
def test_drafts_change_no_token(variables, text):
    """Coupled, rows with different subsets, an order of their own, and one row alone."""
    tokens, visible = text
    params, settings = {"generator": variables}, dict(temperature=0.8, top_k=4)
    plain = AnySubsetSampler(model=MODEL, drafts=0)
    coupled = AnySubsetSampler(model=MODEL, drafts=3, rule="coupled")
    order = np.argsort(np.where(visible, -1.0, np.random.default_rng(1).random(visible.shape)), axis=1, kind="stable")
    for way in (None, order):
        want, got = (sampler(params, jax.random.key(1), tokens, visible, order=way, **settings) for sampler in (plain, coupled))
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_array_equal(np.asarray(got.tokens)[visible], tokens[visible])
        np.testing.assert_array_equal(want.target_calls, (~visible).sum(axis=1))
        assert (np.asarray(got.target_calls + got.draft_calls) <= (~visible).sum(axis=1)).all()
        assert (np.asarray(got.status) == FULL).all()
    assert coupled._sample._cache_size() == 2  # one for each sampler, whatever the order
    left_to_right = plain(params, jax.random.key(1), tokens, visible, **settings)
    assert (np.asarray(left_to_right.tokens) != np.asarray(want.tokens)).any()


def test_bad_input(text):
    tokens, visible = text
    sampler = AnySubsetSampler(model=MODEL)
    for message, change in {
        r"tokens \(64, 7\) and visible \(64, 6\)": dict(visible=visible[:, 1:]),
        r"numbers in 0\.\.4": dict(tokens=tokens + 4),
        "row 1 has no visible token": dict(visible=visible & (np.arange(64) != 1)[:, None]),
        r"order \(1, 7\): expected a permutation": dict(order=np.arange(S)[None]),
        "the visible places have to come first": dict(order=np.broadcast_to(np.arange(S), (64, S))),
        "temperature": dict(temperature=-1.0),
    }.items():
        options = dict(tokens=tokens, visible=visible) | change
        with pytest.raises(ValueError, match=message):
            sampler({}, jax.random.key(0), **options)
    with pytest.raises(ValueError, match="drafter='ngram'"):
        AnySubsetSampler(model=MODEL, drafter="ngram")
    with pytest.raises(ValueError, match="rule='none'"):
        AnySubsetSampler(model=MODEL, rule="none")
    with pytest.raises(ValueError, match="drafts=0 with drafter='bigrams'"):
        AnySubsetSampler(model=MODEL, drafter="bigrams", drafts=0)
