import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.adapters import init_low_rank, linear_layers, low_rank_layers

pytestmark = pytest.mark.numeric


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((2, 4), name="split")(x)
        return nn.DenseGeneral(3, axis=(-2, -1), name="join")(nn.relu(q))


@pytest.fixture(scope="module")
def made():
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    model = Heads()
    variables = model.init(jax.random.key(1), x)
    adapters = init_low_rank(jax.random.key(2), linear_layers(model, variables, x), rank=2)
    return model, variables, x, adapters


def test_nothing_changes_before_training(made):
    model, variables, x, adapters = made
    assert {path: a["a"].shape for path, a in adapters.items()} == {"split": (6, 2), "join": (8, 2)}
    with low_rank_layers(adapters):
        np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x))


def test_adapters_are_added_where_the_gate_is_on(made):
    model, variables, x, adapters = made
    adapters = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), adapters)
    gate = jnp.array([[True, False, True, True, False], [False, False, True, False, True]])
    with low_rank_layers(adapters, gate, scale=0.5):
        got = model.apply(variables, x)
    merged = jax.tree.map(lambda p: p, variables)
    for path in adapters:
        kernel = variables["params"][path]["kernel"]
        merged["params"][path]["kernel"] = kernel + 0.5 * (adapters[path]["a"] @ adapters[path]["b"]).reshape(kernel.shape)
    off, on = np.asarray(model.apply(variables, x)), np.asarray(model.apply(merged, x))
    np.testing.assert_allclose(got, np.where(gate[..., None], on, off), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(got)[~gate], off[~gate])  # bit for bit


def test_choosing_layers_and_bad_input(made):
    model, variables, x, _ = made
    layers = linear_layers(model, variables, x)
    assert list(init_low_rank(jax.random.key(0), layers, rank=1, where=lambda path: path == "join")) == ["join"]
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        init_low_rank(jax.random.key(0), layers, rank=0)
    with pytest.raises(ValueError, match="where has to pick some of split, join"):
        init_low_rank(jax.random.key(0), layers, rank=1, where=lambda path: False)
