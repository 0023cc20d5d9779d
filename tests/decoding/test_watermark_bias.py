"""Green lists, and the tilted law through plain and speculative sampling."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, DraftModel, Jacobi, Rejection, Sequential, speculate, truncate
from jaxgen.decoding.conformance import chi_square, sequence_law
from jaxgen.decoding.topology import branches, chain
from jaxgen.decoding.watermark import detect
from jaxgen.decoding.watermark_bias import LexicalBias, bias_logits, choose_list, green_lists

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, L, B = 4, 4, 2048
LISTS = green_lists(jax.random.key(3), pool=2, vocab=V, gamma=0.5, positions=3)
KEY = jax.random.key(11)


@pytest.mark.slow
def test_lists_have_their_share_and_differ():
    lists = np.asarray(green_lists(jax.random.key(0), pool=50, vocab=20, gamma=0.25, positions=4))
    assert (lists.sum(-1) == 5).all()
    assert len(np.unique(lists.reshape(200, 20), axis=0)) > 190
    share = lists.mean((0, 1))
    assert np.abs(share - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 200)
    counts = np.bincount(choose_list(KEY, jnp.arange(3000), 3), minlength=3)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(3000 * 2 / 9)
    np.testing.assert_array_equal(choose_list(KEY, jnp.array([7, 2]), 3), choose_list(KEY, jnp.arange(8), 3)[jnp.array([7, 2])])


def test_the_bias_is_the_published_one():
    logits = np.random.default_rng(0).normal(size=(50, V)).astype(np.float32)
    green = np.random.default_rng(1).random((50, V)) < 0.5
    for delta in (0.0, 1.5):
        want = np.exp(logits + delta * green)
        np.testing.assert_allclose(
            jax.nn.softmax(bias_logits(logits, green, delta)), want / want.sum(-1, keepdims=True), rtol=1e-5
        )
    np.testing.assert_array_equal(bias_logits(logits, green, 0.0), logits)
    hard = np.asarray(bias_logits(logits, green, jnp.inf))
    some = green.any(-1)
    np.testing.assert_array_equal(np.isfinite(hard)[some], green[some])
    np.testing.assert_array_equal(hard[~some], logits[~some])
    # No green token is possible: the law stays.
    logits = jnp.array([[0.0, 1.0, -jnp.inf, -jnp.inf]])
    np.testing.assert_array_equal(bias_logits(logits, jnp.array([[False, False, True, True]]), jnp.inf), logits)


@pytest.fixture(scope="module")
def world(table_model):
    model = table_model(vocab=V)
    target = model.params(0)
    draft = 0.5 * target + 0.6 * model.params(1)

    def marked(delta, lists=LISTS):
        mark = LexicalBias(lists, KEY, delta)
        return lambda logits, context: truncate(mark(logits, context), top_k=3, temperature=0.9)

    def sampler(proposer, rule, transform=marked):
        traces = []

        @jax.jit
        def sample(key, delta, rows):
            traces.append(1)
            prompt = jnp.ones((rows.shape[0], 1), jnp.int32)
            shared = dict(params=target, cache=model.cache(prompt.shape[0]), cond=None, prompt=prompt)
            made = proposer(prompt) if callable(proposer) else proposer
            return speculate(model.step, made, rule, **shared, max_length=1 + L, key=key, transform=transform(delta), rows=rows)

        sample.traces = traces
        return sample

    def drafter(topology, **options):
        return lambda prompt: DraftModel(model.step, draft, model.cache(prompt.shape[0]), None, prompt, topology, **options)

    def law(delta, lists):
        read = dict(params=target, cache=model.cache(V**L), cond=None)
        return sequence_law(model.step, **read, prompt=[1], vocab=V, length=L, transform=marked(delta, lists))

    world = type("World", (), {})()
    world.law, world.sampler, world.drafter = law, sampler, drafter
    world.plain = sampler(Sequential(), Coupled())
    return world


ROWS = jnp.arange(B)


@pytest.mark.slow
def test_without_bias_the_tokens_are_the_unmarked_ones(world):
    unmarked = world.sampler(Sequential(), Coupled(), lambda delta: lambda logits, c: truncate(logits, top_k=3, temperature=0.9))
    want, got = unmarked(jax.random.key(0), 0.0, ROWS), world.plain(jax.random.key(0), 0.0, ROWS)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert (np.asarray(world.plain(jax.random.key(0), 2.0, ROWS).tokens) != np.asarray(want.tokens)).any()
    assert len(world.plain.traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tree", "Jacobi"])
def test_coupled_verification_gives_the_tokens_of_plain_marked_sampling(world, name):
    proposer = {"tree": world.drafter(branches((2, 2)), coupled=True), "Jacobi": Jacobi(3, coupled=True)}[name]
    sample = world.sampler(proposer, Coupled())
    for delta in (1.5, jnp.inf):
        want, got = world.plain(jax.random.key(5), delta, ROWS), sample(jax.random.key(5), delta, ROWS)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert int(got.calls) <= int(want.calls)


@pytest.mark.slow
def test_rejection_keeps_the_marked_law(world):
    """Both lists of the pool have a law of their own; the unmarked law is the control that must fail."""
    lists_of = np.asarray(choose_list(KEY, jnp.arange(4 * B), 2))
    sample = world.sampler(world.drafter(chain(3)), Rejection())

    for which in range(2):
        rows = jnp.asarray(np.flatnonzero(lists_of == which)[:B])
        counts = collections.Counter()
        for i in range(2):
            tokens = np.asarray(sample(jax.random.key(i), 1.5, rows).tokens)
            counts.update(tuple(row[1:].tolist()) for row in tokens)
        assert abs(chi_square(counts, world.law(1.5, LISTS[which : which + 1]))) < 4
        assert chi_square(counts, world.law(0.0, LISTS[which : which + 1])) > 10


@pytest.mark.slow
def test_every_row_keeps_to_its_own_list(world):
    """The hard mark: all tokens are green under the list of the row's number, whatever the batch."""
    rows = jnp.array([9, 4, 0, 7])
    result = world.plain(jax.random.key(1), jnp.inf, rows)
    index = np.asarray(choose_list(KEY, rows, 2))
    for row, which in zip(np.asarray(result.tokens), index):
        assert all(LISTS[which, i % 3, token] for i, token in enumerate(row[1:]))
    assert (np.asarray(detect(result.tokens[:, 1:], LISTS).green) == L).all()


def test_bad_input(world):
    for kwargs, message in (
        (dict(pool=0, vocab=4, gamma=0.5), "pool=0"),
        (dict(pool=1, vocab=4, gamma=0.5, positions=0), "positions=0"),
        (dict(pool=1, vocab=4, gamma=0.01), "gamma=0.01: 0 of 4"),
        (dict(pool=1, vocab=4, gamma=1.0), "gamma=1.0: 4 of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            green_lists(jax.random.key(0), **kwargs)
    with pytest.raises(ValueError, match="delta=-1.0: must be >= 0"):
        LexicalBias(LISTS, KEY, -1.0)
    wide = green_lists(jax.random.key(0), pool=1, vocab=8, gamma=0.5)
    with pytest.raises(ValueError, match="lists of 8 tokens do not fit logits of 4"):
        world.sampler(Sequential(), Coupled(), lambda delta: LexicalBias(wide, KEY, delta))(jax.random.key(0), 1.0, ROWS)
