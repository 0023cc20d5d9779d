"""Two streams: what the fast one reads, and that it changes nothing of the slow one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import View, check_step
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.multi_rate import MultiRateModel
from jaxgen.generators.sequence_sampler import SequenceSampler, stepper
from jaxgen.recipes.multi_rate import EarlyExit, FastStream

pytestmark = pytest.mark.usefixtures("quick_compiles")

BASE = LanguageModel(vocab=7, width=8, heads=2, depth=4, kv_heads=1)
MODEL = MultiRateModel(BASE, rate=2, rank=2)


@pytest.fixture(scope="module")
def variables():
    base = jax.eval_shape(BASE.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    base = jax.tree.map(lambda x: 0.6 * jax.random.normal(jax.random.key(x.size), x.shape), base)
    return {"base": base, **MODEL.init(jax.random.key(1), base)}


def trained(variables):
    return variables | {"adapters": jax.tree.map(lambda x: x + 0.3, variables["adapters"])}


@pytest.mark.slow
def test_adapters_are_on_what_asks_and_computes(variables):
    paths = {path.removeprefix("transformer/blocks_") for path in variables["adapters"]}
    assert paths == {f"{i}/{part}" for i in (0, 1) for part in ("attention/qkv", "attention/o", "mlp/w13", "mlp/w2")}


@pytest.mark.slow
def test_before_training_it_is_an_early_exit(variables):
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, 7)
    view = View(tokens, jnp.arange(5), jnp.tril(jnp.ones((5, 5), bool)))
    out, _ = jax.jit(lambda v, c: MODEL.apply(v, c, view))(variables, MODEL.init_cache(2, 5))
    early = jax.jit(lambda v, c: BASE.apply(v, c, view, layers=(0, 2), method="step"))
    want, _ = early(variables["base"], BASE.init_cache(2, 5))
    np.testing.assert_allclose(out.params, want.params, atol=1e-5)


@pytest.mark.slow
def test_the_fast_stream_asks_the_slow_one(variables):
    """The slow stream and its cache are the base model's, whatever the adapters are; the fast one keeps a step's contract."""
    changed = trained(variables)
    tokens = jax.random.randint(jax.random.key(2), (2, 5), 0, 7)
    view = View(tokens, jnp.arange(5), jnp.tril(jnp.ones((5, 5), bool)))
    read = jax.jit(lambda v, c: MODEL.apply(v, c, view))
    (out, cache), (before, untouched) = (read(v, MODEL.init_cache(2, 5)) for v in (changed, variables))
    np.testing.assert_array_equal(cache.k, untouched.k)
    slow = jax.jit(lambda v: BASE.apply(v, tokens, layers=(0, 2), method="features"))(variables["base"])
    np.testing.assert_allclose(out.aux[0][-1], slow, atol=1e-5)
    assert np.abs(out.params - before.params).max() > 0.05
    check_step(stepper(MODEL), params=changed, cache=MODEL.init_cache(2, 13), cond=None, batch=2, vocab=7, trees=False)


@pytest.mark.slow
def test_both_draft_for_the_whole_model(variables):
    params = {"generator": variables["base"], "fast": {"adapters": trained(variables)["adapters"]}}
    for method in (FastStream(MODEL, 2), EarlyExit(BASE, 2, 2)):
        result = SequenceSampler(model=BASE, method=method)(params, jax.random.key(0), [[1], [2]], max_length=12, top_k=1)
        greedy = SequenceSampler(model=BASE)(params, jax.random.key(0), [[1], [2]], max_length=12, top_k=1)
        np.testing.assert_array_equal(result.tokens, greedy.tokens)


def test_bad_input():
    with pytest.raises(ValueError, match="rate=3: must be at least 2 and divide the depth 4"):
        MultiRateModel(BASE, rate=3)
    with pytest.raises(ValueError, match="rank=0"):
        MultiRateModel(BASE, rank=0)
