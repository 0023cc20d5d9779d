"""LANTERN's and GSD's rules against loops over the definitions in float64, and the exact law that they emit."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import DraftModel, View, chain, speculate
from jaxgen.decoding.conformance import chi_square
from jaxgen.decoding.relaxed import Grouped, Lantern, chain_law, nearest_codes, step_law
from jaxgen.decoding.verify import Level, Rejection

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, ROWS = 9, 40
RNG = np.random.default_rng(0)
CODEBOOK = RNG.normal(size=(V, 2))
P, Q = (RNG.dirichlet(np.ones(V), ROWS) for _ in range(2))
P[:5, :4] = 0  # as top-k leaves it
P /= P.sum(-1, keepdims=True)
K = 4


def neighbours():
    distance = np.square(CODEBOOK[:, None] - CODEBOOK[None]).sum(-1)
    return np.array([[y for y in np.argsort(distance[x]) if y != x][:K] for x in range(V)])


def lantern(p, q, x, delta, relative):
    """(acceptance, law after a rejection) of the draft x, from the definition."""
    bound, moved, total, mass = delta * p[x] if relative else delta, p.copy(), p[x], 0.0
    for y in neighbours()[x]:
        mass += p[y]
        if mass > bound:
            break
        total, moved[y] = total + p[y], 0.0
    moved[x] = total
    left = np.maximum(moved - q, 0)
    return min(1.0, total / q[x]), left / left.sum() if left.sum() else p


def grouped(p, q, x, below, above, p_radius, d_radius):
    order = sorted(range(V), key=lambda y: (p[y], y))
    rank = order.index(x)
    group = [x]
    for y in order[max(0, rank - below) : rank + above]:
        near = np.square(CODEBOOK[y] - CODEBOOK[x]).sum() < d_radius
        if y != x and near and abs(p[y] - p[x]) < p_radius:
            group.append(y)
    left = np.maximum(p - q, 0)
    return min(1.0, p[group].sum() / q[group].sum()), left / left.sum() if left.sum() else p


RULES = {
    "lantern": (lambda: Lantern(jnp.asarray(neighbours()), 0.2), lambda p, q, x: lantern(p, q, x, 0.2, False)),
    "relative": (lambda: Lantern(jnp.asarray(neighbours()), 2.0, relative=True), lambda p, q, x: lantern(p, q, x, 2.0, True)),
    "grouped": (lambda: Grouped(jnp.asarray(CODEBOOK), 2, 3, 0.15, 3.0), lambda p, q, x: grouped(p, q, x, 2, 3, 0.15, 3.0)),
    "wide": (lambda: Grouped(jnp.asarray(CODEBOOK), 7, 7, 0.5, 1.0), lambda p, q, x: grouped(p, q, x, 7, 7, 0.5, 1.0)),
}

laws = jax.jit(step_law)


def log(p):
    return jnp.log(jnp.asarray(p, jnp.float32))


@pytest.mark.slow
def test_nearest_codes_are_sorted_and_leave_out_the_code_itself():
    got = nearest_codes(jnp.asarray(CODEBOOK), K, block=4)
    np.testing.assert_array_equal(got, neighbours())
    twice = nearest_codes(jnp.zeros((5, 3)), 4)
    np.testing.assert_array_equal(twice, [[y for y in range(5) if y != x] for x in range(5)])
    for k in (0, V):
        with pytest.raises(ValueError, match=f"k={k}: a codebook of {V} has 1..{V - 1} neighbours"):
            nearest_codes(jnp.asarray(CODEBOOK), k)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_one_draft_is_accepted_and_replaced_as_defined(name):
    make, by_hand = RULES[name]
    got = laws(make(), log(P), log(Q))
    accepted, replaced = np.zeros((ROWS, V)), np.zeros((ROWS, V))
    for row, x in itertools.product(range(ROWS), range(V)):
        chance, residual = by_hand(P[row], Q[row], x)
        accepted[row, x] = Q[row, x] * chance
        replaced[row] += Q[row, x] * (1 - chance) * residual
    np.testing.assert_allclose(got.accepted, accepted, atol=2e-6)
    np.testing.assert_allclose(got.replaced, replaced, atol=2e-6)
    np.testing.assert_allclose(got.law.sum(-1), 1, atol=1e-5)
    plain = np.minimum(P, Q).sum(-1)
    assert (accepted.sum(-1) > plain - 1e-9).all() and accepted.sum() > 1.02 * plain.sum()
    assert np.abs(got.law - P).sum(-1).max() / 2 > 0.05


@pytest.mark.slow
def test_no_relaxation_is_rejection():
    """Bit for bit, for several candidates and for drafts without a law."""
    draws = np.stack([RNG.choice(V, 3, replace=False, p=q) for q in Q]).astype(np.int32)
    u = RNG.uniform(size=(ROWS, 3)).astype(np.float32)
    valid = RNG.uniform(size=(ROWS, 3)) < 0.8
    log_q = jnp.broadcast_to(log(Q)[:, None], (ROWS, 3, V))
    codebook = jnp.asarray(CODEBOOK)
    none = {
        "lantern": Lantern(jnp.asarray(neighbours()), 0.0),
        "relative": Lantern(jnp.asarray(neighbours()), 0.0, relative=True),
        "window": Grouped(codebook, 0, 1),
        "p_radius": Grouped(codebook, p_radius=0.0),
        "d_radius": Grouped(codebook, d_radius=0.0),
    }
    for q in (log_q, None):
        level = Level(log(P), jnp.asarray(draws), q, jnp.asarray(valid), jnp.asarray(u), jnp.zeros((ROWS, V)))
        want = Rejection()(level)
        assert len(np.unique(want[0])) > 2
        for name, rule in none.items():
            for a, b in zip(rule(level), want):
                np.testing.assert_array_equal(a, b, err_msg=name)
        some = Lantern(jnp.asarray(neighbours()), 0.3)(level)
        assert np.any(np.asarray(some[0]) != np.asarray(want[0]))


@pytest.mark.slow
def test_the_bound_does_not_bound_what_is_emitted():
    """delta = 0.1 and an emitted law farther than that from the target's; the exact rule emits the target's."""
    rule = Lantern(jnp.asarray(neighbours()), 0.1)
    distance = np.abs(laws(rule, log(P), log(Q)).law - P).sum(-1) / 2
    assert distance.max() > 0.2 and (distance > 0.1).mean() > 0.3
    exact = np.abs(step_law(Rejection(), log(P), log(Q)).law - P).sum(-1) / 2
    assert exact.max() < 1e-6


@pytest.mark.slow
def test_thresholds_are_traced():
    traces = []

    @jax.jit
    def run(rule, p, q):
        traces.append(1)
        return step_law(rule, p, q).law

    table, codebook = jnp.asarray(neighbours()), jnp.asarray(CODEBOOK)
    first = [run(rule, log(P), log(Q)) for rule in (Lantern(table, 0.1), Grouped(codebook, p_radius=0.1))]
    again = [run(rule, log(P), log(Q)) for rule in (Lantern(table, 0.3), Grouped(codebook, p_radius=0.3, d_radius=4.0))]
    assert len(traces) == 2
    assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(first, again))


@pytest.mark.slow
def test_tables_of_another_vocabulary():
    level = Level(log(P), jnp.zeros((ROWS, 1), jnp.int32), None, jnp.ones((ROWS, 1), bool), jnp.zeros((ROWS, 1)), log(P))
    with pytest.raises(ValueError, match=r"neighbours \(8, 4\): expected a row for each of 9 tokens"):
        Lantern(jnp.asarray(neighbours()[:-1]))(level)
    with pytest.raises(ValueError, match=r"codebook \(8, 2\): expected a row for each of 9 tokens"):
        Grouped(jnp.asarray(CODEBOOK[:-1]))(level)
    with pytest.raises(ValueError, match="below=-1, above=1"):
        Grouped(jnp.asarray(CODEBOOK), -1, 1)(level)


VOCAB, LENGTH, B = 4, 3, 4096


@pytest.fixture(scope="module")
def world(table_model):
    """Laws after every prefix, of a target and a draft; and counts of what `speculate` emits under a rule."""
    model = table_model(vocab=VOCAB)
    target = model.params(0)
    draft = 0.5 * target + 0.6 * model.params(1)

    def levels(params):
        found = []
        for i in range(LENGTH):
            tails = np.array(list(itertools.product(range(VOCAB), repeat=i)), np.int32).reshape(VOCAB**i, i)
            tokens = jnp.asarray(np.concatenate([np.ones((len(tails), 1), np.int32), tails], axis=1))
            view = View(tokens, jnp.arange(i + 1), jnp.tril(jnp.ones((i + 1, i + 1), bool)))
            out, _ = model.step(params, model.cache(len(tails)), view, None)
            found.append(jax.nn.log_softmax(out.params[:, -1], axis=-1))
        return found

    @jax.jit
    def sample(rule, key):
        prompt = jnp.ones((B, 1), jnp.int32)
        proposer = DraftModel(model.step, draft, model.cache(B), None, prompt, chain(2))
        length = 1 + LENGTH
        kwargs = dict(params=target, cache=model.cache(B), cond=None, prompt=prompt, max_length=length, key=key)
        return speculate(model.step, proposer, rule, **kwargs)

    world = type("World", (), {})()
    world.p, world.q, world.sample = levels(target), levels(draft), sample
    world.codebook = jnp.asarray(np.random.default_rng(1).normal(size=(VOCAB, 2)))
    return world


@pytest.mark.slow
def test_the_compiled_loop_emits_the_law_that_is_computed(world):
    """Whole sequences: chi-square against `chain_law` for the lossy rules, for which the target's law must fail."""
    cells = list(itertools.product(range(VOCAB), repeat=LENGTH))
    target = np.ones(1)
    for level in world.p:
        target = (target[:, None] * np.exp(np.asarray(level, np.float64))).reshape(-1)
    exact, calls = chain_law(Rejection(), world.p, world.q, 2)
    np.testing.assert_allclose(exact, target, atol=1e-6)
    distances, tokens_a_call = [0.0], [LENGTH / float(calls)]
    table = nearest_codes(world.codebook, VOCAB - 1)
    for rule in (Lantern(table, 0.15), Lantern(table, 0.4), Grouped(world.codebook, p_radius=0.4, d_radius=9.0)):
        law, calls = (np.asarray(x, np.float64) for x in jax.jit(chain_law, static_argnums=3)(rule, world.p, world.q, 2))
        counts, seen = collections.Counter(), 0.0
        for i in range(8):
            result = world.sample(rule, jax.random.key(i))
            counts.update(map(tuple, np.asarray(result.tokens[:, 1:]).tolist()))
            seen += float(result.row_calls.mean()) / 8
        assert abs(chi_square(counts, dict(zip(cells, law / law.sum())))) < 4
        assert chi_square(counts, dict(zip(cells, target))) > 10
        assert seen == pytest.approx(float(calls), rel=0.02)
        distances.append(np.abs(law - target).sum() / 2)
        tokens_a_call.append(LENGTH / float(calls))
    assert distances[0] < distances[1] < distances[2] and tokens_a_call[0] < tokens_a_call[1] < tokens_a_call[2]
