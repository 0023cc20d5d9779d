"""Grammars against a search of the automaton by hand, and transforms that look at history in every exact sampler."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding.conformance import chi_square, sequence_law
from jaxgen.decoding.grammar import FORBIDDEN, check_automaton, constrain, states_after
from jaxgen.decoding.jacobi import Jacobi
from jaxgen.decoding.proposers import DraftModel, NGram
from jaxgen.decoding.speculate import BROKEN, FULL, STOPPED, Context, Sequences, Sequential, speculate
from jaxgen.decoding.topology import branches, chains
from jaxgen.decoding.transforms import penalise, truncate
from jaxgen.decoding.verify import Coupled, KSeq, Rejection

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, L, B, STOP = 4, 4, 2048, 2
# Tokens 0 and 1 alternate, beginning with either; 3 may come once; the stop token only after an even number of tokens.
TABLE = np.array(
    # 0           1           2 (stop)    3
    [
        [1, 2, FORBIDDEN, FORBIDDEN],
        [FORBIDDEN, 3, FORBIDDEN, 4],
        [4, FORBIDDEN, FORBIDDEN, 3],
        [1, FORBIDDEN, 5, 1],
        [FORBIDDEN, 2, 5, FORBIDDEN],
        [FORBIDDEN, FORBIDDEN, 5, FORBIDDEN],
    ],
    np.int32,
)


def walk(table, state, tokens):
    for token in tokens:
        state = table[state][token] if state >= 0 else FORBIDDEN
    return state


def test_each_query_is_in_the_state_of_its_own_path():
    rng = np.random.default_rng(0)
    table = rng.integers(-1, 5, (5, V))
    tokens, lengths, begin = rng.integers(0, V, (8, 7)), rng.integers(1, 8, 8), rng.integers(0, 4, 8)
    start = rng.integers(0, 5, 8)
    drafts = rng.integers(-1, V, (8, 6, 2))
    drafts[..., 1] = np.where(drafts[..., 0] < 0, -1, drafts[..., 1])
    root = np.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
    path = np.concatenate([np.broadcast_to(root[:, None], (8, 6, 1)), drafts], axis=-1)
    context = Context(Sequences(jnp.asarray(tokens), jnp.asarray(lengths), jnp.arange(8)), jnp.asarray(path), None)
    got = jax.jit(states_after)(context, table, begin=begin, start=start)
    for b in range(8):
        for q in range(6):
            read = [*tokens[b, begin[b] : lengths[b]], *(x for x in drafts[b, q] if x >= 0)]
            assert got[b, q] == walk(table, start[b], read)
    logits = jnp.asarray(rng.normal(size=(8, 6, V)), jnp.float32)
    masked = np.asarray(constrain(logits, context, table=np.maximum(table, [[0, -1, -1, -1]]), begin=begin, start=start))
    table = np.maximum(table, [[0, -1, -1, -1]])
    for b in range(8):
        for q in range(6):
            state = walk(table, start[b], [*tokens[b, begin[b] : lengths[b]], *(x for x in drafts[b, q] if x >= 0)])
            allowed = table[state] >= 0 if state >= 0 else np.ones(V, bool)
            np.testing.assert_array_equal(masked[b, q], np.where(allowed, logits[b, q], -np.inf))


@pytest.mark.parametrize(
    ("table", "start", "message"),
    [
        (np.zeros((2,), int), 0, r"table \(2,\): expected integers"),
        (np.zeros((2, 2)), 0, "expected integers"),
        (np.array([[0, 2], [0, 1]]), 0, r"table\[0, 1\]=2: must be a state in 0..1"),
        (np.array([[0, -2]]), 0, r"table\[0, 1\]=-2"),
        (np.array([[0, 1], [-1, -1]]), 0, "state 1 of the table allows no token"),
        (np.array([[0, 0]]), 1, r"start=1: must be a state in 0\.\.0"),
        (np.array([[0, 0]]), np.array([0, -1]), r"start=\[ 0 -1\]"),
    ],
)
def test_bad_automata(table, start, message):
    with pytest.raises(ValueError, match=message):
        check_automaton(table, start)
    context = Context(Sequences(jnp.ones((1, 1), int), jnp.ones(1, int), jnp.zeros(1, int)), jnp.ones((1, 1, 1), int), None)
    with pytest.raises(ValueError, match=message):
        constrain(jnp.zeros((1, 1, 2)), context, table=table, start=start, begin=1)
    with pytest.raises(ValueError, match=r"table \(6, 4\): expected a column for each of the 3 tokens"):
        constrain(jnp.zeros((1, 1, 3)), context, table=TABLE, begin=1)


@pytest.fixture(scope="module")
def world(table_model):
    """Target and draft, sampled with a penalty, a grammar and a truncation at once."""
    model = table_model(vocab=V)
    target = model.params(0)
    draft = 0.5 * target + 0.6 * model.params(1)

    def transform(logits, context, repetition, table, starts, forgets):
        """`forgets` is the mistake that the controls make: to look at the certain tokens only."""
        seen = context.path[..., 1:]
        path = jnp.concatenate([context.path[..., :1], jnp.where(forgets, -1, seen)], axis=-1)
        context = context._replace(path=path)
        logits = penalise(logits, context, repetition=repetition, presence=0.3, frequency=0.4)
        logits = constrain(logits, context, table=table, begin=1, start=starts[context.seq.rows])
        return truncate(logits, temperature=0.9, top_p=0.97)

    def sampler(proposer, rule, *, b=B):
        prompt, traces = jnp.ones((b, 1), jnp.int32), []
        made = proposer(prompt) if callable(proposer) else proposer

        @jax.jit
        def compiled(key, *settings):
            traces.append(1)
            return speculate(
                model.step,
                made,
                rule,
                params=target,
                cache=model.cache(b),
                cond=None,
                prompt=prompt,
                max_length=1 + L,
                key=key,
                transform=lambda logits, context: transform(logits, context, *settings),
                stop=(STOP,),
            )

        begin = np.zeros(b, np.int32)

        def sample(key, repetition, table=TABLE, starts=begin, forgets=False):
            return compiled(key, repetition, table, starts, forgets)

        sample.traces = traces
        return sample

    jitted = jax.jit(transform)

    def law(repetition):
        return sequence_law(
            model.step,
            params=target,
            cache=model.cache(V**L),
            cond=None,
            prompt=[1],
            vocab=V,
            length=L,
            transform=lambda logits, context: jitted(logits, context, repetition, TABLE, np.zeros(V**L, np.int32), False),
            stop=(STOP,),
        )

    def drafter(topology, **options):
        return lambda prompt: DraftModel(model.step, draft, model.cache(prompt.shape[0]), None, prompt, topology, **options)

    world = type("World", (), {})()
    world.drafter, world.sampler = drafter, sampler
    world.laws = {repetition: law(repetition) for repetition in (1.4, 0.5)}
    world.plain = sampler(Sequential(), Coupled())
    return world


def counted(sample, repetition, batches=3, **options):
    counts = collections.Counter()
    for i in range(batches):
        result = sample(jax.random.key(i), repetition, **options)
        counts.update(tuple(row[1:n].tolist()) for row, n in zip(np.asarray(result.tokens), np.asarray(result.length)))
    assert set(np.unique(result.status)) <= {STOPPED, FULL}
    return counts


EXACT = {
    "plain": lambda w: (Sequential(), Rejection()),
    "tree without replacement": lambda w: (w.drafter(branches((2, 2))), Rejection()),
    "tree of independent draws": lambda w: (w.drafter(branches((2, 2)), replacement=True), Rejection()),
    "K-SEQ": lambda w: (w.drafter(chains(2, 2), replacement=True), KSeq()),
    "n-gram": lambda w: (NGram(3, 1), Rejection()),
    "Jacobi": lambda w: (Jacobi(3), Rejection()),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_keep_the_law_of_the_transformed_target(world, name):
    sample = world.sampler(*EXACT[name](world))
    for repetition, law in world.laws.items():
        counts = counted(sample, repetition)
        assert abs(chi_square(counts, law)) < 4
        assert all(walk(TABLE, 0, cell) != FORBIDDEN for cell in counts)
    # The control: a transform that forgets the drafts on a path asks another law wherever drafts are accepted.
    wrong = chi_square(counted(sample, 1.4, batches=1, forgets=True), world.laws[1.4])
    assert abs(wrong) < 4 if name == "plain" else wrong > 10
    assert len(sample.traces) == 1


def test_another_penalty_is_another_law(world):
    assert chi_square(counted(world.plain, 1.4), world.laws[0.5]) > 10


# State 4 leads nowhere.
STUCK = np.where(np.arange(6)[:, None] == 4, FORBIDDEN, TABLE)


def test_coupled_verification_gives_the_tokens_of_plain_sampling(world):
    """Also where rows break on the way: those that come to the broken place, after all tokens before it, and no others."""
    sample = world.sampler(world.drafter(branches((2, 2)), coupled=True), Coupled())
    for table in (TABLE, STUCK):
        want, got = (s(jax.random.key(7), 1.4, table) for s in (world.plain, sample))
        for field in ("tokens", "length", "status"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        assert int(got.calls) <= int(want.calls)


def test_several_grammars_in_one_table(world):
    """Rows that start in other states obey other grammars, in one program."""
    table = np.concatenate([TABLE, [[6, FORBIDDEN, FORBIDDEN, 6]]])  # state 6: nothing but 0 and 3
    result = world.plain(jax.random.key(3), 1.4, table, np.arange(B, dtype=np.int32) % 2 * 6)
    for i, (row, n) in enumerate(zip(np.asarray(result.tokens[:200]), np.asarray(result.length))):
        assert set(row[1:n]) <= {0, 3} if i % 2 else walk(TABLE, 0, row[1:n]) != FORBIDDEN
    assert all((np.asarray(result.tokens[1::2, 1:]) == x).any() for x in (0, 3))


def test_a_traced_automaton_that_gets_stuck_breaks_its_rows_alone(world):
    want, got = (world.plain(jax.random.key(5), 1.4, table) for table in (TABLE, STUCK))
    hit = np.array([walk(TABLE, 0, row[1:3]) == 4 for row in np.asarray(want.tokens)])
    assert hit.any() and not hit.all()
    assert (np.asarray(got.status)[hit] == BROKEN).all() and (np.asarray(got.length)[hit] == 3).all()
    np.testing.assert_array_equal(np.asarray(got.tokens)[hit, :3], np.asarray(want.tokens)[hit, :3])
