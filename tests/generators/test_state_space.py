"""Mamba-2 language models: trees of drafts against every path alone, and speculation against plain sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, View, branches, check_step
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.sequence_sampler import Draft, SequenceSampler, stepper
from jaxgen.generators.state_space import StateSpaceModel
from jaxgen.nn.tree_scan import tree_read, tree_windows

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

PLAIN = StateSpaceModel(vocab=7, width=8, depth=2, state_size=4, head_size=4)
HYBRID = StateSpaceModel(vocab=7, width=8, depth=3, attention_every=2, heads=2, state_size=4, head_size=4, conv_size=3)
DRAFT = LanguageModel(vocab=7, width=8, heads=1, depth=1)


def random_variables(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    leaves, tree = jax.tree.flatten(shapes)
    # Rates are kept small, so that memories reach back over many tokens.
    return jax.tree.unflatten(
        tree, [0.5 * jax.random.normal(jax.random.key(i), x.shape) - 0.5 * (x.ndim == 1) for i, x in enumerate(leaves)]
    )


@pytest.mark.parametrize("model", [pytest.param(PLAIN, marks=pytest.mark.slow), HYBRID], ids=["mamba", "hybrid"])
def test_the_step_keeps_the_contract_on_chains_and_trees(model):
    params = random_variables(model)
    cache = model.init_cache(2, 13)
    check_step(stepper(model), params=params, cache=cache, cond=None, batch=2, vocab=7)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 7)
    view = View(tokens, jnp.arange(6), jnp.tril(jnp.ones((6, 6), bool)))
    out, _ = stepper(model)(params, cache.commit(jnp.zeros((2,), jnp.int32)), view, None)
    np.testing.assert_allclose(out.params, model.apply(params, tokens), atol=1e-4)


def test_tree_windows_by_hand():
    x, before = jnp.arange(1.0, 5)[None, :, None], jnp.array([[[-2.0], [-1.0]]])
    parents = [None, 0, 0, 1]
    mask = np.zeros((4, 4), bool)
    for node in range(4):
        at = node
        while at is not None:
            mask[node, at] = True
            at = parents[at]
    want = [[-2, -1, 1], [-1, 1, 2], [-1, 1, 3], [1, 2, 4]]
    np.testing.assert_array_equal(tree_windows(x, before, jnp.asarray(mask))[0, :, :, 0], want)


def test_reading_a_tree_is_the_recurrence_along_every_path():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 5, 2, 3))
    v, a, memory = rng.normal(size=(1, 5, 2, 4)), -rng.uniform(0.1, 2, (1, 5, 2)), rng.normal(size=(1, 2, 3, 4))
    parents, mask, want = [None, 0, 0, 2, 2], np.zeros((5, 5), bool), np.zeros((1, 5, 2, 4))
    for node in range(5):
        path = [node]
        while parents[path[-1]] is not None:
            path.append(parents[path[-1]])
        mask[node, path] = True
        state = memory.copy()
        for at in path[::-1]:
            state = np.exp(a[:, at])[..., None, None] * state + np.einsum("bhn,bhp->bhnp", k[:, at], v[:, at])
        want[:, node] = np.einsum("bhn,bhnp->bhp", q[:, node], state)
    got = tree_read(*(jnp.float32(x) for x in (q, k, v, a, memory)), jnp.asarray(mask))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_trees_of_drafts_give_the_tokens_of_plain_sampling():
    params = {"generator": random_variables(HYBRID), "draft": random_variables(DRAFT)}
    prompt = np.random.default_rng(0).integers(0, 7, (32, 3))
    lengths = np.arange(32) % 3 + 1
    method = Draft(DRAFT, branches((3, 2)), Coupled(), coupled=True)
    plain, tree = (SequenceSampler(model=HYBRID, method=m) for m in (SequenceSampler.method, method))
    want, got = (s(params, jax.random.key(0), prompt, lengths, max_length=12) for s in (plain, tree))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert int(got.row_calls.sum()) < int(want.row_calls.sum())
