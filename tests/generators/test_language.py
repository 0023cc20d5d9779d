import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import KSeq, View, chain, chains, check_step
from jaxgen.decoding.speculate import FULL, STOPPED
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import Draft, Lookup, SequenceSampler

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

MODEL = LanguageModel(vocab=11, width=16, heads=2, depth=2, kv_heads=1)
SMALL = LanguageModel(vocab=11, width=8, heads=1, depth=1, tied=True)


def random_variables(model, seed):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(tree, [0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


@pytest.fixture(scope="module")
def params():
    return {"generator": random_variables(MODEL, 0), "draft": random_variables(SMALL, 1)}


def step_of(model):
    return lambda params, cache, view, cond: model.apply(params, cache, view, cond, method="step")


@pytest.mark.parametrize("model, name", [(MODEL, "generator"), (SMALL, "draft")])
def test_the_step_keeps_the_contract(params, model, name):
    check_step(step_of(model), params=params[name], cache=model.init_cache(2, 13), cond=None, batch=2, vocab=11)


def test_steps_are_the_full_forward_pass(params):
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 11)
    want = jax.jit(MODEL.apply)(params["generator"], tokens)
    view = View(tokens, jnp.arange(6), jnp.tril(jnp.ones((6, 6), bool)))
    out, _ = jax.jit(lambda p, c: step_of(MODEL)(p, c, view, None))(params["generator"], MODEL.init_cache(2, 6))
    np.testing.assert_allclose(out.params, want, atol=1e-5)
    assert out.feats.shape == (2, 6, 16)


def test_early_exit_reads_some_blocks_and_the_same_head(params):
    tokens = jnp.array([[1, 5, 3]])

    @jax.jit
    def exit_(variables):
        features = MODEL.apply(variables, tokens, layers=(0, 1), method="features")
        return MODEL.apply(variables, features, method="logits")

    want = exit_(params["generator"])
    view = View(tokens, jnp.arange(3), jnp.tril(jnp.ones((3, 3), bool)))
    cache = MODEL.init_cache(1, 3)
    early = jax.jit(lambda p, c: MODEL.apply(p, c, view, layers=(0, 1), method="step"))
    out, after = early(params["generator"], cache)
    np.testing.assert_allclose(out.params, want, atol=1e-5)
    np.testing.assert_array_equal(after.k[1], cache.k[1])


def test_a_tied_model_scores_with_its_embedding(params):
    variables = params["draft"]["params"]
    features = jax.random.normal(jax.random.key(5), (1, 2, 8))
    normed = features / jnp.sqrt(jnp.square(features).mean(-1, keepdims=True) + 1e-5) * variables["norm"]["scale"]
    want = normed @ variables["embed"]["embedding"].T
    np.testing.assert_allclose(SMALL.apply(params["draft"], features, method="logits"), want, atol=1e-5)
    assert "head" not in variables


METHODS = {
    "n-gram": Lookup(3, 1),
    "draft": Draft(SMALL, chain(3)),
    "K-SEQ": Draft(SMALL, chains(2, 2), KSeq(), replacement=True),
}


def test_the_sampler_continues_prompts_of_any_length(params):
    sampler = SequenceSampler(model=MODEL, stop=(4,))
    prompt, length = np.array([[1, 2, 3], [5, 0, 0]]), np.array([3, 1])
    result = sampler(params, jax.random.key(0), prompt, length, max_length=12, temperature=0.9, top_k=8)
    np.testing.assert_array_equal(result.tokens[0, :3], prompt[0])
    for i in range(2):
        alone = sampler(params, jax.random.key(0), prompt[i : i + 1, : length[i]], max_length=12, temperature=0.9, top_k=8)
        if i == 0:  # row 0's noise is that of row 0
            np.testing.assert_array_equal(alone.tokens[0], result.tokens[0])
        row, n = np.asarray(result.tokens[i]), int(result.length[i])
        assert (int(result.status[i]) == STOPPED) == (row[n - 1] == 4) and (row[: n - 1] != 4)[length[i] :].all()
        assert int(result.status[i]) == STOPPED or n == 12


@pytest.mark.parametrize("name", METHODS)
def test_methods_share_the_sampler(params, name):
    sampler = SequenceSampler(model=MODEL, method=METHODS[name])
    result = sampler(params, jax.random.key(0), [[1, 2], [1, 2]], max_length=14)
    assert (np.asarray(result.status) == FULL).all() and int(result.calls) <= 12
    assert result.tokens.shape == (2, 14) and int(result.tokens.max()) < 11


def test_settings_do_not_compile_again(params):
    sampler = SequenceSampler(model=MODEL)
    before = SequenceSampler._sample._cache_size()
    for temperature, top_k, top_p in ((1.0, 0, 0.0), (0.5, 3, 0.9)):
        sampler(params, jax.random.key(1), [[1, 2, 1, 2]], max_length=9, temperature=temperature, top_k=top_k, top_p=top_p)
    assert SequenceSampler._sample._cache_size() == before + 1
    greedy = [sampler(params, jax.random.key(i), [[1, 2, 1, 2]], max_length=9, top_k=1).tokens for i in range(2)]
    np.testing.assert_array_equal(*greedy)


@pytest.mark.parametrize(
    "prompt, length, options, error",
    [
        ([[1, 11]], None, {}, "expected rows of tokens in 0..10"),
        ([1, 2], None, {}, "expected rows of tokens"),
        ([[1, 2]], [3], {}, r"prompt_length \[3\]: expected a length in 1..2"),
        ([[1, 2]], [0], {}, r"prompt_length \[0\]"),
        ([[1, 2]], None, {"temperature": 0.0}, "temperature=0.0"),
        ([[1, 2]], None, {"top_p": 1.5}, "top_p=1.5"),
        ([[1, 2] * 5], None, {}, "max_length=9"),
    ],
)
def test_bad_input(params, prompt, length, options, error):
    with pytest.raises(ValueError, match=error):
        SequenceSampler(model=MODEL)(params, jax.random.key(0), prompt, length, max_length=9, **options)
