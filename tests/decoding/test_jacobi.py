"""Speculative Jacobi decoding: exact whatever enters the window, inexact when drafts are checked against another law."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, Jacobi, Out, Rejection, Sequences, Sequential, speculate, truncate
from jaxgen.decoding.conformance import chi_square, sequence_law, total_variation
from jaxgen.decoding.jacobi import INITIAL

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

V, L, B, WIDTH, N = 3, 6, 2048, 3, 3
TEMPERATURES = (0.6, 1.3)


class Reused(Jacobi):
    """The control: rejected drafts stay in the window, but are checked against the new law."""

    def update(self, state, seq, verdict, taken, log_p, out):
        new = super().update(state, seq, verdict, taken, log_p, out)
        slot = taken[:, None] + jnp.arange(self.length)
        old = jnp.take_along_axis(state.tokens, jnp.minimum(slot, self.length - 1), axis=1)
        return new._replace(tokens=jnp.where(slot < self.length, old, new.tokens))


@pytest.fixture(scope="module")
def world(table_model):
    model = table_model(vocab=V)
    table = model.params(0)

    def transform(temperature):
        return lambda logits, context: truncate(logits, temperature=temperature, top_p=0.95)

    def sampler(proposer, rule):
        traces = []

        @jax.jit
        def sample(key, temperature):
            traces.append(1)
            prompt = jnp.ones((B, 1), jnp.int32)
            kwargs = dict(params=table, cache=model.cache(B), cond=None, prompt=prompt, max_length=1 + L, key=key)
            return speculate(model.step, proposer, rule, **kwargs, transform=transform(temperature))

        sample.traces = traces
        return sample

    def law(temperature):
        kwargs = dict(params=table, cache=model.cache(V**L), cond=None, prompt=[1], vocab=V, length=L)
        return sequence_law(model.step, **kwargs, transform=transform(temperature))

    world = type("World", (), {})()
    world.sampler, world.laws = sampler, {t: law(t) for t in TEMPERATURES}
    world.plain = sampler(Sequential(), Coupled())
    return world


def counted(sample, temperature, batches=3):
    counts, calls = collections.Counter(), []
    for i in range(batches):
        result = sample(jax.random.key(i), temperature)
        counts.update(map(tuple, np.asarray(result.tokens[:, 1:]).tolist()))
        calls.append(np.asarray(result.row_calls))
    return counts, np.concatenate(calls)


def window(initial, **fields):
    return Jacobi(N, initial=initial, width=0 if initial == "uniform" else WIDTH, **fields)


def test_every_initialisation_keeps_the_law_in_fewer_passes(world):
    passes = {}
    for initial in INITIAL:
        sample = world.sampler(window(initial), Rejection())
        for temperature, law in world.laws.items():
            counts, calls = counted(sample, temperature)
            assert abs(chi_square(counts, law)) < 4, initial
            assert calls.max() <= L and calls.mean() < 0.95 * L
        passes[initial] = calls.mean()
        assert len(sample.traces) == 1
    assert len({round(float(n), 4) for n in passes.values()}) == len(INITIAL)  # they do change the number of passes


def test_drafts_checked_against_another_law_are_not_exact(world):
    sample = world.sampler(Reused(N), Rejection())
    for temperature, law in world.laws.items():
        counts, _ = counted(sample, temperature)
        assert chi_square(counts, law) > 10
        exact, _ = counted(world.plain, temperature)
        assert total_variation(counts, law) > 1.3 * total_variation(exact, law)


def test_the_coupled_fixed_point_is_sequential_sampling(world):
    for initial in ("repeat_left", "sample_above"):
        sample = world.sampler(window(initial, coupled=True), Coupled())
        want, got = world.plain(jax.random.key(5), 1.3), sample(jax.random.key(5), 1.3)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        assert (np.asarray(got.row_calls) <= L).all() and got.row_calls.mean() < 0.9 * L


@pytest.mark.parametrize("taken", [1, 4])
@pytest.mark.parametrize("initial", INITIAL)
def test_what_enters_the_window(initial, taken):
    """A row of 4 tokens; 5 were certain, 3 drafted. Sources are written down by hand."""
    width, before, vocab = 4, 5, 7
    window = dataclasses.replace(Jacobi(3), initial=initial, width=width)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, vocab, (1, 16)), jnp.int32)
    history = [jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, 4, vocab)), jnp.float32)) for _ in range(2)]

    def certain(length):
        return Sequences(tokens, jnp.array([length]), jnp.array([0]))

    def passed(state, taken, length, log_p):
        return window.update(state, certain(length), None, jnp.array([taken]), log_p, Out(None))

    # The laws of positions 1..4 come from a pass before, so that "above" has something to look at.
    state = window.start(certain(1), jax.random.key(0), vocab, None)
    state = passed(state, before - 1, before, history[0])
    state = passed(state, taken, before + taken, history[1])
    law_of = {1 + i: history[0][0, i] for i in range(4)} | {before + i: history[1][0, i] for i in range(4)}
    last, length = before + 3, before + taken
    line = {i: int(tokens[0, i]) for i in range(length)} | {length + j: int(state.tokens[0, j]) for j in range(3)}
    for j in range(3):
        pos = length + j
        got = np.asarray(state.log_q[0, j])
        if pos <= last:
            want = law_of[pos]  # drafted anew from this pass
        else:
            column = (pos - 1) % width
            left = min(last, pos - 1) if (min(last, pos - 1) - 1) // width == (pos - 1) // width and column else None
            source = {"left": left, "above": pos - width}.get(initial.split("_")[-1])
            if source is None:
                want = np.full(vocab, -np.log(vocab))
            elif initial.startswith("repeat"):
                want = np.where(np.arange(vocab) == line[source], 0.0, -np.inf)
            else:
                want = law_of[source]
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=f"slot {j}")
        assert np.isfinite(got[line[pos]])


def test_bad_input():
    for fields, message in (
        (dict(length=0), "length=0 must be at least 1"),
        (dict(length=2, initial="left"), "initial='left': expected one of uniform, repeat_left"),
        (dict(length=2, initial="repeat_left"), "width=0: initial='repeat_left' needs the tokens in a row"),
    ):
        with pytest.raises(ValueError, match=message):
            Jacobi(**fields)
