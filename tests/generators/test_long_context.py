"""TriForce on a small language model: the law, the tokens of plain sampling, and what its parts are given."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Sequences, View, truncate
from jaxgen.decoding.conformance import chi_square, sequence_law
from jaxgen.decoding.verify import Coupled, Rejection
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.long_context import Exposing, TriForce
from jaxgen.generators.sequence_sampler import SequenceSampler, stepper

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, L, P, B = 4, 4, 18, 1024
SIZES = dict(length=3, sink=1, window=4, budget=4, chunk=2, recent=8)


@pytest.fixture(scope="module")
def world(randomize):
    models = {"generator": LanguageModel(vocab=V, width=16, heads=4, kv_heads=2, depth=2, scan_layers=True)}
    models["draft"] = LanguageModel(vocab=V, width=8, heads=2, depth=1)
    params = {}
    for seed, (name, model) in enumerate(models.items()):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        params[name] = jax.device_put(randomize(shapes, seed))

    def sampler(**options):
        method = TriForce(draft=models["draft"], target=models["generator"], **SIZES | options)
        return SequenceSampler(model=Exposing(models["generator"]), method=method)

    world = type("World", (), {})()
    world.models, world.params, world.sampler = models, params, sampler
    world.plain = SequenceSampler(model=models["generator"])
    world.prompt = np.random.default_rng(0).integers(0, V, P)
    return world


@pytest.mark.slow
def test_the_output_has_the_targets_law(world):
    sampler, counts = world.sampler(), collections.Counter()
    prompt = np.broadcast_to(world.prompt, (B, P))
    for i in range(6):
        result = sampler(world.params, jax.random.key(i), prompt, max_length=P + L, temperature=0.8, top_p=0.95)
        counts.update(tuple(row[P:].tolist()) for row in np.asarray(result.tokens))
    model = world.models["generator"]
    settings = dict(cache=model.init_cache(V**L, P + L), cond=None, prompt=world.prompt.tolist(), vocab=V, length=L)
    laws = [
        sequence_law(
            stepper(model),
            params=world.params["generator"],
            **settings,
            transform=lambda logits, context, t=t: truncate(logits, temperature=t, top_p=0.95),
        )
        for t in (0.8, 1.3)
    ]
    assert abs(chi_square(counts, laws[0])) < 4 and chi_square(counts, laws[1]) > 10
    assert 1.2 * float(result.row_calls.mean()) < L


@pytest.mark.slow
def test_coupled_levels_give_the_tokens_of_plain_sampling(world):
    """With prompts of all lengths, some shorter than what the caches keep, and far past the ring's end."""
    rng = np.random.default_rng(1)
    prompt, lengths = rng.integers(0, V, (32, P)), rng.integers(1, P + 1, 32)
    settings = dict(max_length=P + 24, temperature=0.9)
    sampler = world.sampler(coupled=True)
    before = sampler._sample._cache_size()
    for key in (0, 1):
        want = world.plain(world.params, jax.random.key(key), prompt, lengths, **settings)
        got = sampler(world.params, jax.random.key(key), prompt, lengths, **settings)
        for field in ("tokens", "length", "status"):
            np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
        assert int(got.row_calls.sum()) < 0.9 * int(want.row_calls.sum())
    assert sampler._sample._cache_size() <= before + 2  # this sampler's, and the plain one's


@pytest.mark.slow
def test_prompts_of_one_token(world):
    """There is nothing to select from; the second level reads on as the target does."""

    @jax.jit
    def laws(params, prompt):
        proposer, _ = world.sampler().method(params, prompt, 6)
        start = proposer.middle.start(Sequences(prompt, jnp.ones((V,), jnp.int32), jnp.arange(V)), None)
        out, _ = proposer.middle.step(start, View(prompt, jnp.zeros((V, 1), jnp.int32), jnp.ones((1, 1), bool)))
        return start.length, out.params, world.models["generator"].apply(params["generator"], prompt)

    length, got, want = laws(world.params, jnp.arange(V)[:, None])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not length.any()


def test_sizes_reach_the_parts(world):
    """Equal methods are equal; every field changes a part."""
    assert world.sampler() == world.sampler() and world.sampler().method != world.sampler(budget=2).method
    for options, rule in ((dict(), Rejection()), (dict(coupled=True), Coupled())):
        proposer, got = world.sampler(**options).method(world.params, jnp.zeros((2, P), jnp.int32), P + L)
        assert got == proposer.rule == rule and proposer.coupled == proposer.proposer.coupled == (rule == Coupled())
    drafter, middle = proposer.proposer, proposer.middle
    assert drafter.cache.k.shape[2] == 1 + 4 + drafter.chunk and drafter.cache.recent == 4 and drafter.cache.sink == 1
    assert (proposer.length, middle.budget, middle.chunk, middle.recent) == (3, 4, 2, 8)
    assert middle.params is world.params["generator"]  # the target's own weights
    for name in ("budget", "recent"):
        with pytest.raises(ValueError, match=f"{name}=1"):
            world.sampler(**{name: 1})(world.params, jax.random.key(0), np.zeros((1, P)), max_length=P + 1)
