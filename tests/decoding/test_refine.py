"""Refinement against the law that each order has on a model without structure, computed by going through all that can happen."""

import collections
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Guided, Known, Out, guide, truncate
from jaxgen.decoding.block_cache import Blocks, FreeCache, Whole
from jaxgen.decoding.conformance import chi_square
from jaxgen.decoding.kernels import Unmask
from jaxgen.decoding.refine import refine
from jaxgen.decoding.reveal import (
    Ancestral,
    ByConfidence,
    Each,
    EntropyBound,
    FirstHitting,
    LeftToRight,
    RandomOrder,
    Scheduled,
    Threshold,
)
from jaxgen.decoding.speculate import BROKEN, FULL, STOPPED
from jaxgen.decoding.step import View

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

V, L, B = 3, 4, 2048
MASK = V
TEMPERATURES = (0.6, 1.2)


def log_laws(model, table, temperature, *, window=None):
    """For each pattern of tokens and masks, the log-law of every place; with a window, places see no block behind their own."""
    states = np.array(list(itertools.product(range(V + 1), repeat=L)), np.int32)
    laws = np.zeros((len(states), L, V))
    for end in range(window or L, L + 1, window or L):
        seen = jnp.asarray(np.tile((np.arange(L) < end)[None], (L, 1)))
        logits = _laws(model, table, states, seen, temperature)
        block = slice(end - (window or L), end)
        laws[:, block] = np.asarray(logits, np.float64)[:, block]
    return {tuple(state): law for state, law in zip(states.tolist(), laws)}


@functools.partial(jax.jit, static_argnums=0)
def _laws(model, table, states, seen, temperature):
    out, _ = model.step(table, (), View(states, jnp.arange(L), seen), None)
    return jax.nn.log_softmax(truncate(out.params, temperature=temperature, top_p=0.95), axis=-1)


def exact_law(laws, rule, *, start=(MASK,) * L, window=L):
    """Probability of every outcome. `rule(open, step, total, values, law)` gives (probability, slots to reveal) pairs."""
    alive, done = {start: 1.0}, collections.Counter()
    for first in range(0, L, window):
        block, step = range(first, first + window), 0
        totals = {state: sum(state[i] == MASK for i in block) for state in alive}
        alive = {(state, totals[state]): p for state, p in alive.items()}
        finished = collections.Counter()
        while alive:
            after = collections.Counter()
            for (state, total), p in alive.items():
                open_ = [i for i in block if state[i] == MASK]
                if not open_:
                    finished[state] += p
                    continue
                for values in itertools.product(range(V), repeat=len(open_)):
                    drawn = p * math.exp(sum(laws[state][i][v] for i, v in zip(open_, values)))
                    if drawn == 0:
                        continue
                    for q, chosen in rule(open_, step, total, dict(zip(open_, values)), laws[state]):
                        new = list(state)
                        for i in chosen:
                            new[i] = dict(zip(open_, values))[i]
                        after[tuple(new), total] += drawn * q
            alive, step = after, step + 1
        alive = finished
    done.update(alive)
    return dict(done)


def without_replacement(weights, count):
    """(probability, set) of `count` draws, one after another, in proportion to the weights of those that are left."""
    found = collections.Counter()
    for picks in itertools.permutations(weights, count):
        p, left = 1.0, sum(weights.values())
        for i in picks:
            p, left = p * weights[i] / left, left - weights[i]
        found[frozenset(picks)] += p
    return [(p, chosen) for chosen, p in found.items()]


def cosine(steps):
    def count(open_, step, total):
        if step + 1 >= steps:
            return len(open_)
        stay = max(1, math.floor(total * math.cos(math.pi / 2 * (step + 1) / steps) + 1e-9))
        return len(open_) - min(stay, len(open_) - 1)

    return count


def by_confidence(count, temperature):
    def rule(open_, step, total, values, law):
        n, tau = count(open_, step, total), temperature(step)
        scores = {i: law[i][v] for i, v in values.items()}
        if n == len(open_):
            return [(1.0, open_)]
        if tau == 0:
            return [(1.0, sorted(open_, key=lambda i: -scores[i])[:n])]
        return without_replacement({i: math.exp(score / tau) for i, score in scores.items()}, n)

    return rule


def at_random(count):
    return lambda open_, step, total, values, law: without_replacement(dict.fromkeys(open_, 1.0), count(open_, step, total))


def one(open_, step, total):
    return 1


def left_to_right(open_, step, total, values, law):
    return [(1.0, open_[:1])]


def threshold(open_, step, total, values, law):
    sure = [i for i, v in values.items() if math.exp(law[i][v]) > 0.6]
    return [(1.0, sure or [max(open_, key=lambda i: law[i][values[i]])])]


def entropy_bound(open_, step, total, values, law):
    entropy = {i: -sum(math.exp(x) * x for x in law[i] if x > -np.inf) for i in open_}
    ranked = sorted(open_, key=entropy.get)
    fits = [u for u in range(1, len(ranked) + 1) if sum(entropy[i] for i in ranked[:u]) - entropy[ranked[u - 1]] <= 0.8]
    return [(1.0, ranked[: max(fits)])]


def ancestral(steps):
    def rule(open_, step, total, values, law):
        reveal = 1 / (steps - step)  # 1 - s / t with t = 1 - step / steps
        sets = itertools.chain.from_iterable(itertools.combinations(open_, k) for k in range(len(open_) + 1))
        return [(reveal ** len(s) * (1 - reveal) ** (len(open_) - len(s)), s) for s in sets]

    return rule


ORDERS = {
    "MaskGIT": (ByConfidence(Scheduled(3), 1.5), by_confidence(cosine(3), lambda i: 1.5 * (1 - (i + 1) / 3))),
    "MAR": (RandomOrder(Scheduled(3)), at_random(cosine(3))),
    "random, one a pass": (RandomOrder(Each(1)), at_random(one)),
    "first hitting": (FirstHitting(), at_random(one)),
    "ancestral": (Ancestral(3), ancestral(3)),
    "left to right": (LeftToRight(Each(1)), left_to_right),
    "threshold": (Threshold(0.6), threshold),
    "entropy bound": (EntropyBound(0.8), entropy_bound),
}


@pytest.fixture(scope="module")
def world(masked_table):
    world = type("World", (), {})()
    world.model = masked_table(vocab=V, length=L, spread=1.5)
    world.table = world.model.params(0)

    @functools.cache
    def sampler(order, *, b=B, layout=None, step=world.model.step, **options):
        """A compiled sampler; an order may be a function of a traced number."""
        traces = []

        @jax.jit
        def sample(key, temperature=1.0, rows=None, known=None, params=world.table, number=0.0, cond=None):
            traces.append(1)
            kernel = Unmask(MASK, lambda logits, context: truncate(logits, temperature=temperature, top_p=0.95))
            return refine(
                step,
                order(number) if callable(order) else order,
                kernel,
                params=params,
                cache=world.model.cache(b) if isinstance(layout, Blocks) else (),
                batch=b,
                length=L,
                key=key,
                layout=layout,
                known=known,
                rows=rows,
                **({"cond": cond} | options),
            )

        sample.traces = traces
        return sample

    world.sampler = sampler
    world.laws = {temperature: log_laws(world.model, world.table, temperature) for temperature in TEMPERATURES}
    return world


def given(tokens, keep, b=B):
    return Known(*(jnp.broadcast_to(jnp.asarray(x), (b, L)) for x in (tokens, keep)))


def counted(sample, temperature, batches=4, **options):
    counts = collections.Counter()
    for i in range(batches):
        result = sample(jax.random.key(i), temperature, **options)
        counts.update(map(tuple, np.asarray(result.tokens).tolist()))
    assert (np.asarray(result.status) == FULL).all() and (np.asarray(result.length) == L).all()
    return counts, result


@pytest.mark.parametrize("name", ORDERS)
def test_orders_have_the_law_of_their_rule(world, name):
    order, rule = ORDERS[name]
    sample = world.sampler(order)
    for temperature, laws in world.laws.items():
        law = exact_law(laws, rule)
        assert sum(law.values()) == pytest.approx(1, abs=1e-6)
        counts, result = counted(sample, temperature)
        assert abs(chi_square(counts, law)) < 4
    assert len(sample.traces) == 1
    calls = np.asarray(result.row_calls)
    np.testing.assert_array_equal(calls, np.asarray(result.revealed).max(axis=1) + 1)
    most = {"MaskGIT": 3, "MAR": 3, "ancestral": 3}.get(name, L)
    assert calls.max() <= most and int(result.calls) == calls.max()


def test_the_controls_fail(world):
    """Every order has a law of its own: the samples of one are not those of another."""
    laws = {name: exact_law(world.laws[1.2], ORDERS[name][1]) for name in ("MaskGIT", "MAR", "random, one a pass")}
    counts, _ = counted(world.sampler(RandomOrder(Each(1))), 1.2)
    assert chi_square(counts, laws["MaskGIT"]) > 10 and chi_square(counts, laws["MAR"]) > 10
    counts, _ = counted(world.sampler(RandomOrder(Scheduled(3))), 1.2)
    assert chi_square(counts, laws["random, one a pass"]) > 10
    assert chi_square(counts, exact_law(world.laws[0.6], ORDERS["MAR"][1])) > 10


def test_known_tokens_are_kept_and_conditioned_on(world):
    start = (MASK, 2, MASK, 0)
    known = given([0, 2, 1, 0], [False, True, False, True])
    sample = world.sampler(RandomOrder(Each(1)))
    counts, result = counted(sample, 1.2, known=known)
    assert abs(chi_square(counts, exact_law(world.laws[1.2], at_random(one), start=start))) < 4
    assert set(np.unique(np.asarray(result.revealed)[:, [1, 3]])) == {-1} and int(result.row_calls.max()) == 2
    nothing = sample(jax.random.key(0), known=given(jnp.int32(1), True))
    assert int(nothing.calls) == 0 and (np.asarray(nothing.tokens) == 1).all() and (np.asarray(nothing.status) == FULL).all()


def test_blocks_with_a_cache_have_the_law_of_causal_blocks(world):
    laws = log_laws(world.model, world.table, 1.2, window=2)
    rule = by_confidence(one, lambda i: 1.0)
    sample = world.sampler(ByConfidence(Each(1), 1.0), layout=Blocks(2))
    counts, result = counted(sample, 1.2)
    assert abs(chi_square(counts, exact_law(laws, rule, window=2))) < 4
    assert chi_square(counts, exact_law(world.laws[1.2], rule)) > 10  # the law of a model that sees both blocks
    assert (np.asarray(result.row_calls) == 5).all()  # two passes a block, and one that keeps the first
    assert (np.asarray(result.row_reads) == 10).all()


def test_semi_autoregressive_blocks_see_the_masks_behind_them(world):
    rule = by_confidence(one, lambda i: 0)
    counts, _ = counted(world.sampler(ByConfidence(Each(1)), layout=Whole(2)), 1.2)
    assert abs(chi_square(counts, exact_law(world.laws[1.2], rule, window=2))) < 4
    assert chi_square(counts, exact_law(world.laws[1.2], rule)) > 10


def test_prompts_of_any_length(world):
    """Rows with prompts of 0 to 4 tokens, prefilled or not; one does not depend on another's prompt."""
    prompt = np.random.default_rng(0).integers(0, V, (5, L))
    keep = np.arange(L) < np.arange(5)[:, None]
    known = Known(jnp.asarray(prompt, jnp.int32), jnp.asarray(keep))
    order, key = RandomOrder(Scheduled(2)), jax.random.key(3)
    plain, prefilled = (world.sampler(order, layout=Blocks(2, prefill), b=5) for prefill in (0, 4))
    want, got = plain(key, known=known), prefilled(key, known=known)
    np.testing.assert_array_equal(np.asarray(want.tokens)[keep], prompt[keep])
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(want.row_calls - got.row_calls, [0, 0, 1, 1, 0])  # the block that prefilling has kept
    for i in range(5):
        others = Known(jnp.asarray(np.where(np.arange(5)[:, None] == i, prompt, 0)), known.keep & (jnp.arange(5) == i)[:, None])
        again = prefilled(key, known=others)
        for field in ("tokens", "row_calls", "row_reads", "revealed"):
            np.testing.assert_array_equal(getattr(again, field)[i], getattr(got, field)[i])


@pytest.mark.parametrize("layout", [Blocks(2), FreeCache(2)], ids=["blocks", "windows"])
def test_rows_do_not_depend_on_their_batch(world, layout):
    order, rows, fields = Threshold(0.6), jnp.array([3, 0, 9, 4, 7, 1]), ("tokens", "row_calls", "row_reads", "revealed")
    sample = world.sampler(order, b=6, layout=layout)
    want = sample(jax.random.key(2), rows=rows)
    shuffle = jnp.array([5, 2, 0, 1, 4, 3])
    got = sample(jax.random.key(2), rows=rows[shuffle])
    for field in fields:
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field)[shuffle])
    assert len(set(np.asarray(want.row_calls).tolist())) > 1
    if layout == FreeCache(2):  # whose windows are as wide as the slowest row asks for
        for i in range(3):
            alone = world.sampler(order, b=1, layout=layout)(jax.random.key(2), rows=rows[i : i + 1])
            for field in fields:
                np.testing.assert_array_equal(getattr(alone, field)[0], getattr(want, field)[i])


def test_settings_are_traced(world):
    sample = world.sampler(Threshold, b=64)
    tokens = {}
    for tau in (2.0, 0.5, 0.0):
        result = sample(jax.random.key(0), number=tau)
        tokens[tau] = int(result.row_calls.min()), int(result.row_calls.max())
    assert tokens[2.0] == (L, L) and tokens[0.0] == (1, 1) and tokens[0.5][0] < L  # above 1, one reveal a pass
    assert len(sample.traces) == 1


def test_the_model_is_asked_at_the_noise_level_of_the_order(world):
    """A model that says 0 in the first half of time and 1 in the second."""

    def step(params, cache, view, cond):
        early = jnp.where(view.time > 0.5, 9.0, -9.0)[:, None, None]
        return Out(early * jnp.array([1.0, -1.0, 0.0]) + jnp.zeros((*view.pos.shape, 1))), cache

    result = world.sampler(LeftToRight(Each(2)), b=2, step=step)(jax.random.key(0))
    np.testing.assert_array_equal(result.tokens, [[0, 0, 1, 1]] * 2)


def test_guidance_and_conditions_that_change(world):
    """A guided step has the law of combined logits; a condition may be a function of the pass."""
    weight = 0.7
    tables = [world.model.step(world.table, (), View(*_all_states()), jnp.full((4**L,), c))[0].params for c in (0, 1)]
    logits = (1 + weight) * tables[0] - weight * tables[1]
    log_p = np.asarray(jax.nn.log_softmax(truncate(logits, temperature=1.2, top_p=0.95), axis=-1), np.float64)
    laws = {tuple(state): law for state, law in zip(np.asarray(_all_states()[0]).tolist(), log_p)}
    both = jnp.repeat(jnp.array([0, 1]), B)
    order, rule = ORDERS["random, one a pass"]
    sample = world.sampler(order, step=guide(world.model.step))
    counts = collections.Counter()
    for i in range(4):
        result = sample(jax.random.key(i), 1.2, cond=Guided(both, weight))
        counts.update(map(tuple, np.asarray(result.tokens).tolist()))
    assert abs(chi_square(counts, exact_law(laws, rule))) < 4
    assert chi_square(counts, exact_law(world.laws[1.2], rule)) > 10
    # Guidance that is off until half of the slots are known.
    both = jnp.repeat(jnp.array([0, 1]), 256)
    ramp = lambda slots: Guided(both, jnp.where(slots.left <= L // 2, 5.0, 0.0)[:, None, None])  # noqa: E731
    ramped = world.sampler(LeftToRight(Each(1)), b=256, pad=9, step=guide(world.model.step), cond=ramp)(jax.random.key(0))
    plain = world.sampler(LeftToRight(Each(1)), b=256, pad=9)(jax.random.key(0))
    same = np.asarray(ramped.tokens == plain.tokens)
    assert same[:, :2].all() and not same[:, 2:].all()


@functools.cache
def _all_states():
    states = jnp.array(list(itertools.product(range(V + 1), repeat=L)), jnp.int32)
    return states, jnp.arange(L)


def test_a_stop_token_ends_a_row(world):
    """It ends where it is first certain; what comes before is as without stopping."""
    order = LeftToRight(Each(1))
    plain = world.sampler(order, b=256, pad=9)(jax.random.key(1))
    sample = world.sampler(order, b=256, pad=9, stop=(1,))
    stopped, tokens = sample(jax.random.key(1)), np.asarray(plain.tokens)
    ends = np.where((tokens == 1).any(1), (tokens == 1).argmax(1) + 1, L)
    np.testing.assert_array_equal(stopped.length, ends)
    np.testing.assert_array_equal(stopped.row_calls, ends)
    np.testing.assert_array_equal(stopped.tokens, np.where(np.arange(L) < ends[:, None], tokens, 9))
    np.testing.assert_array_equal(np.asarray(stopped.status) == STOPPED, (tokens == 1).any(1))
    # A stop token that was given ends nothing.
    known = given(jnp.int32(1), [True, False, False, False], b=256)
    assert (np.asarray(sample(jax.random.key(1), known=known).length) > 1).all()


def test_a_row_without_numbers_stops_alone(world):
    """The law of the third place is NaN once the first two are (1, 0)."""
    digits = np.array([2, 1, MASK + 1, MASK + 1])
    code = int((digits * world.model.base ** np.arange(L)).sum()) * L + 2
    bad = world.table.at[code].set(jnp.nan)
    sample = world.sampler(LeftToRight(Each(1)), b=256, pad=9)
    want, got = sample(jax.random.key(3)), sample(jax.random.key(3), params=bad)
    hit = np.asarray((want.tokens[:, 0] == 1) & (want.tokens[:, 1] == 0))
    assert hit.any() and not hit.all()
    assert (np.asarray(got.status)[hit] == BROKEN).all() and (np.asarray(got.length)[hit] == 2).all()
    assert (np.asarray(got.tokens)[hit][:, 2:] == 9).all()
    np.testing.assert_array_equal(np.asarray(got.tokens)[~hit], np.asarray(want.tokens)[~hit])


def test_an_order_that_reveals_nothing_ends_nevertheless(world):
    class Stubborn:
        def time(self, slots):
            return jnp.ones(slots.total.shape)

        def reveal(self, slots, drawn):
            return jnp.zeros_like(slots.open)

    def run(layout=None, **options):
        return refine(
            world.model.step,
            Stubborn(),
            Unmask(MASK),
            params=world.table,
            cache=world.model.cache(3),
            batch=3,
            length=L,
            key=jax.random.key(0),
            layout=layout,
            **options,
        )

    results = jax.jit(lambda steps: (run(), run(Blocks(2), n_steps=steps)))(3)
    assert [int(result.calls) for result in results] == [L, 3 + 1 + 3]
    assert all((np.asarray(result.tokens) < V).all() for result in results)


def test_bad_input(world):
    def run(cache=(), batch=2, length=L, **options):
        refine(
            world.model.step,
            LeftToRight(Each(1)),
            Unmask(MASK),
            params=world.table,
            cache=cache,
            batch=batch,
            length=length,
            key=jax.random.key(0),
            **options,
        )

    for options, message in (
        ({"batch": 0}, "batch=0 and length=4 must be at least 1"),
        ({"n_steps": 0}, "n_steps=0 must be at least 1"),
        ({"layout": Blocks(3)}, "length=4 is not whole blocks of 3"),
        ({"layout": Whole(3)}, "length=4 is not whole blocks of 3"),
        ({"layout": FreeCache(3)}, "length=4 is not whole blocks of 3"),
        ({"layout": Blocks(2, 6)}, "prefill=6 exceeds the length 4"),
        ({"known": Known(jnp.zeros((2, 3), int), jnp.ones((2, 3), bool))}, r"known tokens \(2, 3\).*expected \(2, 4\)"),
        ({"cache": type("Small", (), {"capacity": 3})()}, "the cache holds 3 positions; length=4"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
