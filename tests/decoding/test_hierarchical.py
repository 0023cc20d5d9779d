"""Hierarchical drafts against the enumerated law of a model without structure; the authors' wrong resampling is the control."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Out, truncate
from jaxgen.decoding.conformance import chi_square, sequence_law
from jaxgen.decoding.hierarchical import Hierarchical, Reread
from jaxgen.decoding.proposers import DraftModel
from jaxgen.decoding.speculate import BROKEN, FULL, STOPPED, Sequences, Sequential, speculate
from jaxgen.decoding.topology import branches, chain
from jaxgen.decoding.verify import Coupled, Rejection

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, L, B, STOP, GAMMA = 4, 4, 2048, 2, 3
EXACT = Rejection()
PROMPT = np.ones((B, 2), np.int32)
TEMPERATURES = (0.7, 1.3)


@dataclasses.dataclass(frozen=True)
class Resampling(Rejection):
    """Where it is wrong, what the authors' code does: after a rejection it draws from the middle model's law."""

    wrong: jax.Array = dataclasses.field(default=False)

    def __call__(self, level):
        choice, residual = super().__call__(level)
        return choice, jnp.where(self.wrong, level.log_p, residual)


def transform(temperature):
    return lambda logits, context: truncate(logits, temperature=temperature, top_k=3, top_p=0.95)


@pytest.fixture(scope="module")
def world(table_model):
    """Target, middle and draft: each is related to the one before. All that changes nothing in a trace is an argument."""
    model = table_model(vocab=V)
    target = model.params(0)
    middle = 0.7 * target + 0.6 * model.params(1)
    draft = 0.5 * middle + 0.6 * model.params(2)

    def hierarchy(prompt, middle, draft, rule, *, inner=1, step=model.step, coupled=False):
        cache = model.cache(prompt.shape[0])
        drafter = DraftModel(step, draft, cache, None, prompt, chain(inner), coupled=coupled, reach=GAMMA + 1)
        return Hierarchical(drafter, Reread(model.step, middle, cache, None, prompt, GAMMA), GAMMA, rule, coupled)

    def sampler(proposer, rule=EXACT):
        traces = []

        @jax.jit
        def sample(key, temperature, prompt, prompt_length, rows, middle, draft, wrong):
            traces.append(1)
            return speculate(
                model.step,
                proposer(prompt, middle, draft, wrong),
                rule,
                params=target,
                cache=model.cache(prompt.shape[0]),
                cond=None,
                prompt=prompt,
                prompt_length=prompt_length,
                max_length=prompt.shape[1] + L,
                key=key,
                transform=transform(temperature),
                stop=(STOP,),
                rows=rows,
            )

        def call(key, temperature, *, prompt=PROMPT, prompt_length=2, rows=None, middle=middle, draft=draft, wrong=False):
            b = len(prompt)
            rows = jnp.arange(b) if rows is None else rows
            return sample(key, temperature, prompt, jnp.broadcast_to(prompt_length, (b,)), rows, middle, draft, wrong)

        call.traces = traces
        return call

    def law(params, temperature, length=L, stop=(STOP,)):
        settings = dict(params=params, cache=model.cache(V**length), cond=None, prompt=[1, 1], vocab=V, length=length)
        return sequence_law(model.step, **settings, transform=transform(temperature), stop=stop)

    world = type("World", (), {})()
    world.model, world.target, world.middle, world.draft, world.law = model, target, middle, draft, law
    world.hierarchy, world.sampler = hierarchy, sampler
    world.plain = sampler(lambda *_: Sequential(), Coupled())
    world.sample = sampler(lambda prompt, middle, draft, wrong: hierarchy(prompt, middle, draft, Resampling(wrong=wrong)))
    return world


def counted(sample, temperature, batches=4, **settings):
    counts = collections.Counter()
    for i in range(batches):
        result = sample(jax.random.key(i), temperature, **settings)
        counts.update(tuple(row[2:n].tolist()) for row, n in zip(np.asarray(result.tokens), np.asarray(result.length)))
    return counts, result


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_output_has_the_targets_law(world, temperature):
    counts, result = counted(world.sample, temperature)
    assert abs(chi_square(counts, world.law(world.target, temperature))) < 4
    assert set(np.unique(result.status)) <= {STOPPED, FULL}
    assert int((result.length - 2).sum()) > 1.2 * int(result.row_calls.sum())
    assert len(world.sample.traces) == 1


def test_the_released_resampling_is_biased(world):
    counts, _ = counted(world.sample, 0.7, wrong=True)
    assert chi_square(counts, world.law(world.target, 0.7)) > 10


def test_the_inner_law_is_the_middle_models(world):
    """The tokens of one proposal follow the law that is reported for them; the released ones do not."""

    @jax.jit
    def proposed(key, wrong):
        proposer = world.hierarchy(PROMPT, world.middle, world.draft, Resampling(wrong=wrong))
        seq = Sequences(jnp.pad(PROMPT, ((0, 0), (0, L + GAMMA))), jnp.full((B,), 2, jnp.int32), jnp.arange(B))
        return proposer.propose(proposer.start(seq, key, V, None), seq, transform(1.3), key)[0]

    law, z = world.law(world.middle, 1.3, GAMMA, ()), []
    for wrong in (False, True):
        counts = collections.Counter()
        for i in range(4):
            proposal = proposed(jax.random.key(i), wrong)
            counts.update(map(tuple, np.asarray(proposal.tokens).tolist()))
        z.append(chi_square(counts, law))
    assert abs(z[0]) < 4 and z[1] > 10
    picked = jnp.take_along_axis(proposal.log_q, proposal.tokens[..., None], axis=2)[..., 0].sum(axis=1)
    want = [law[tuple(row)] for row in np.asarray(proposal.tokens[:64]).tolist()]
    np.testing.assert_allclose(np.exp(picked[:64]), want, rtol=1e-4)
    assert proposal.valid.all()


def test_coupled_hierarchies_give_the_tokens_of_plain_sampling(world):
    sample = world.sampler(
        lambda prompt, middle, draft, _: world.hierarchy(prompt, middle, draft, Coupled(), inner=2, coupled=True), Coupled()
    )
    for temperature in TEMPERATURES:
        want, got = (s(jax.random.key(5), temperature) for s in (world.plain, sample))
        for field in ("tokens", "length", "status"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        assert int(got.row_calls.sum()) < 0.8 * int(want.row_calls.sum())


def test_rows_do_not_depend_on_their_batch(world):
    """Other order, other neighbours, prompts of other lengths."""
    rng = np.random.default_rng(0)
    settings = dict(prompt=rng.choice([0, 1, 3], (B, 2)), prompt_length=rng.integers(1, 3, B), rows=rng.integers(0, 99, B))
    want = world.sample(jax.random.key(2), 1.0, **settings)
    order = rng.permutation(B)
    got = world.sample(jax.random.key(2), 1.0, **{name: value[order] for name, value in settings.items()})
    for field in ("tokens", "length", "status", "row_calls"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field)[order])


def test_perfect_drafts_are_always_accepted(world):
    result = world.sample(jax.random.key(0), 1.0, middle=world.target, draft=world.target)
    full = np.asarray(result.status) == FULL
    assert full.any() and (np.asarray(result.row_calls)[full] == 1).all()


def test_a_middle_model_without_numbers_proposes_nothing(world):
    counts, result = counted(world.sample, 0.7, middle=jnp.nan * world.middle)
    assert abs(chi_square(counts, world.law(world.target, 0.7))) < 4
    np.testing.assert_array_equal(result.row_calls, result.length - 2)
    assert not (result.status == BROKEN).any()


def test_bad_input(world):
    good = world.hierarchy(PROMPT, world.middle, world.draft, EXACT)
    with pytest.raises(ValueError, match="length=0"):
        dataclasses.replace(good, length=0)
    with pytest.raises(ValueError, match="reach=4 must exceed length=4"):
        dataclasses.replace(good, length=4)
    with pytest.raises(ValueError, match="a chain of at least one token"):
        dataclasses.replace(good, proposer=dataclasses.replace(good.proposer, topology=branches((2, 1))))

    def wider(params, cache, view, cond):
        out, cache = world.model.step(params, cache, view, cond)
        return Out(jnp.pad(out.params, ((0, 0), (0, 0), (0, 1)))), cache

    wide = world.sampler(lambda prompt, middle, draft, _: world.hierarchy(prompt, middle, draft, EXACT, step=wider))
    with pytest.raises(ValueError, match="laws over 5 tokens; the middle model has 4"):
        wide(jax.random.key(0), 1.0)
