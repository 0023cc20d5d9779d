"""Any-subset speculative decoding against the enumerated joint law of a model without structure, for any order."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import KVCache, Out, branches, speculate, truncate
from jaxgen.decoding.any_subset import Bigrams, ParallelDrafts, in_order, infill, reading_order
from jaxgen.decoding.conformance import chi_square
from jaxgen.decoding.speculate import BROKEN, FULL, Sequences, Sequential
from jaxgen.decoding.verify import Coupled, Rejection

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, S, B = 3, 5, 2048
TEXT = np.array([1, 2, 0, 1, 0], np.int32)
# Two orders, and how many of their first places are known: the subsets, and the rest, are in no order of their own.
ORDERS = {(3, 1, 4, 0, 2): 1, (2, 0, 4, 3, 1): 2}


class World:
    """A law of its own for each place asked for and each pattern of tokens and unknown places before."""

    def __init__(self, masked_table):
        self.model = masked_table(vocab=V, length=S, spread=1.5)
        self.table = self.model.params(0)

    def ask(self, table, cache, view, queries):
        base, n = self.model.base, view.tokens.shape[1]
        digits = (view.tokens + 1) * jnp.int32(base) ** view.pos
        seen = jnp.broadcast_to(view.mask, (len(digits), n, n))
        code = cache.code[:, None] + jnp.where(seen, digits[:, None], 0).sum(-1)
        staged = jnp.cumsum(jnp.pad(digits, ((0, 0), (1, 0))), axis=1)
        law = table[(code[:, queries.behind] * S + queries.places) % len(table)]
        return Out(law), dataclasses.replace(cache, staged=staged)

    def law(self, order, known, temperature):
        """Of all tokens by place, filled in one after another."""
        table, law = np.asarray(self.table, np.float64), {}
        for hidden in itertools.product(range(V), repeat=S - known):
            text, code, p = TEXT.copy(), 0, 1.0
            text[list(order[known:])] = hidden
            for j, place in enumerate(order):
                if j >= known:
                    e = np.exp(table[code * S + place] / temperature)
                    p *= e[text[place]] / e.sum()
                code += (text[place] + 1) * self.model.base**place
            law[tuple(text.tolist())] = p
        return law

    def sampler(self, drafter, rule):
        traces = []

        @jax.jit
        def sample(key, order, known, temperature, rows, table):
            traces.append(1)
            return infill(
                self.ask,
                lambda cache: drafter(self, table, cache, order),
                rule,
                params=table,
                cache=self.model.cache(len(order)),
                tokens=jnp.broadcast_to(TEXT, order.shape),
                order=order,
                known=known,
                key=key,
                transform=lambda logits, context: truncate(logits, temperature=temperature, top_k=0, top_p=0.0),
                rows=rows,
            )

        def call(key, order=(3, 1, 4, 0, 2), temperature=1.0, rows=range(B), table=self.table):
            known = np.full((B,), ORDERS[order], np.int32)
            order = np.broadcast_to(np.array(order, np.int32), (B, S))
            return sample(jax.random.key(key), order, known, np.float32(temperature), np.array(rows), table)

        call.traces = traces
        return call


@pytest.fixture(scope="module")
def world(masked_table):
    return World(masked_table)


def parallel(length, coupled=False):
    return lambda world, table, cache, order: ParallelDrafts(world.ask, table, cache, order, length, coupled)


def bigrams(length):
    return lambda world, table, cache, order: Bigrams(order, V, length)


@pytest.fixture(scope="module")
def plain(world):
    return world.sampler(parallel(0), Coupled())


@pytest.fixture(scope="module")
def coupled(world):
    return world.sampler(parallel(3, coupled=True), Coupled())


def counted(sample, order, temperature, batches=2):
    counts = collections.Counter()
    for i in range(batches):
        result = sample(i, order, temperature)
        counts.update(map(tuple, np.asarray(result.tokens).tolist()))
    assert (np.asarray(result.status) == FULL).all()
    return counts, result


@pytest.mark.parametrize("drafter", [parallel(3), bigrams(3)], ids=["parallel", "bigrams"])
def test_the_joint_law_of_any_order(world, drafter):
    """At two temperatures, one trace; calls of both passes never exceed tokens. Another order's law is the control."""
    sample, laws = world.sampler(drafter, Rejection()), {}
    for (order, known), temperature in zip(ORDERS.items(), (0.7, 1.3)):
        for t in (temperature, 2.0 - temperature):
            laws[order, t] = world.law(order, known, t)
            counts, result = counted(sample, order, t)
            assert abs(chi_square(counts, laws[order, t])) < 4
            calls = np.asarray(result.target_calls + result.draft_calls)
            assert (calls <= S - known).all() and calls.mean() < S - known
            assert (result.draft_calls > 0).any() == (drafter(world, None, None, jnp.zeros((1, S))).__class__ is ParallelDrafts)
    assert len(sample.traces) == 1
    counts, _ = counted(sample, (3, 1, 4, 0, 2), 0.7)
    assert chi_square(counts, laws[(3, 1, 4, 0, 2), 1.3]) > 10
    other = world.law((3, 0, 1, 2, 4), 1, 0.7)
    assert chi_square(counts, other) > 10


class KeepAll:
    """What diffusion models do: tokens drawn in parallel stay as they are."""

    def __call__(self, level):
        return jnp.where(level.valid[:, 0], 0, -1), level.log_p


def test_parallel_draws_alone_have_another_law(world):
    order, known = (3, 1, 4, 0, 2), 1
    counts, result = counted(world.sampler(parallel(3), KeepAll()), order, 0.7)
    assert chi_square(counts, world.law(order, known, 0.7)) > 10
    assert (np.asarray(result.target_calls) == 1).all()


def test_coupled_drafts_give_the_tokens_of_one_at_a_time(plain, coupled):
    for order, known in ORDERS.items():
        want, got = plain(5, order, 1.3), coupled(5, order, 1.3)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert (np.asarray(want.target_calls) == S - known).all() and not np.asarray(want.draft_calls).any()
        assert float((got.target_calls + got.draft_calls).mean()) < S - known
    # Rows depend on their number alone.
    turned = coupled(5, order, 1.3, rows=np.arange(B)[::-1])
    np.testing.assert_array_equal(turned.tokens[::-1], got.tokens)
    assert len(coupled.traces) == 1


def test_the_first_draft_always_stays(world):
    """With one draft a round, each makes two tokens from two calls, and the last of an odd number needs one call."""
    sample = world.sampler(parallel(1), Rejection())
    for order, known in ORDERS.items():
        hidden = S - known
        result = sample(3, order, 0.7)
        assert (np.asarray(result.target_calls) == -(-hidden // 2)).all()
        assert (np.asarray(result.draft_calls) == hidden // 2).all()


def test_it_is_speculate_along_the_order(world, plain):
    """The step function of the order, sampled by the engine itself."""
    order = (2, 0, 4, 3, 1)
    want = plain(5, order, 1.0)
    places = jnp.broadcast_to(jnp.array(order), (B, S))
    result = speculate(
        in_order(world.ask),
        Sequential(),
        Coupled(),
        params=world.table,
        cache=world.model.cache(B),
        cond=places,
        prompt=jnp.broadcast_to(TEXT[[2, 0]], (B, 2)),
        max_length=S,
        key=jax.random.key(5),
    )
    np.testing.assert_array_equal(jnp.zeros_like(places).at[:, jnp.array(order)].set(result.tokens), want.tokens)


def test_rows_whose_laws_are_not_numbers_are_given_up(world, coupled):
    """Those that go on are not touched."""
    want = coupled(5)
    # Behind the known token place 1 is asked for; if it becomes 0, no number is known for place 4.
    code = 2 * world.model.base**3 + 1 * world.model.base
    got = coupled(5, table=world.table.at[code * S + 4].set(jnp.nan))
    bad = np.asarray(want.tokens)[:, 1] == 0
    np.testing.assert_array_equal(np.asarray(got.status) == BROKEN, bad)
    np.testing.assert_array_equal(np.asarray(got.tokens)[~bad], np.asarray(want.tokens)[~bad])
    assert bad.any()


def test_bigrams_by_hand():
    """Places 0..4 hold 0 1 0 1 0, known; place 5 follows a 0 and place 6 what is drafted there; place 7 comes first."""
    order = jnp.array([[0, 1, 2, 3, 4, 5, 7, 6]])
    tokens = jnp.array([[0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    seq = Sequences(tokens, jnp.array([5]), jnp.array([0]))
    proposal = jax.jit(lambda seq: Bigrams(order, 3, 4).propose(None, seq, None, jax.random.key(0))[0])(seq)
    law = np.exp(proposal.log_q[0])
    np.testing.assert_allclose(law[0], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(law[1], [0.6, 0.4, 0], atol=1e-6)
    np.testing.assert_allclose(law[2], [1, 0, 0], atol=1e-6)
    assert proposal.tokens[0, [0, 2]].tolist() == [1, 0] and proposal.valid[0].tolist() == [True, True, True, False]


def test_reading_order():
    order, known = reading_order(jnp.array([[True, False, False, True], [False, True, True, True]]))
    assert order.tolist() == [[0, 3, 1, 2], [1, 2, 3, 0]] and known.tolist() == [2, 3]


def test_bad_input(world):
    order, known = jnp.zeros((1, S), jnp.int32), jnp.ones((1,), jnp.int32)
    options = dict(params=None, order=order, known=known, key=jax.random.key(0))
    cache = KVCache.zeros(layers=1, batch=1, capacity=S, heads=1, head_size=2)
    with pytest.raises(ValueError, match=r"tokens \(1, 4\) and order \(1, 5\)"):
        infill(None, None, Rejection(), cache=None, tokens=order[:, :4], **options)
    with pytest.raises(ValueError, match="the cache holds 5 positions; 5 tokens and 2 drafts need 7"):
        infill(None, lambda cache: Bigrams(order, V, 2), Rejection(), cache=cache, tokens=order, **options)
    with pytest.raises(ValueError, match="a chain"):
        proposer = type("Tree", (Sequential,), {"topology": branches((2,))})()
        infill(None, lambda cache: proposer, Rejection(), cache=cache, tokens=order, **options)
    with pytest.raises(ValueError, match="length=0"):
        Bigrams(order, V, 0)
