"""The recurrence against Flax's own cell, step by step, with its gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.lstm import LSTM


@pytest.mark.usefixtures("quick_compiles")
def test_values_and_gradients_are_those_of_flax_cells(randomize):
    b, l, n, d = 2, 5, 3, 4
    module, cell = LSTM(d), nn.OptimizedLSTMCell(d)
    rng = np.random.default_rng(0)
    x, state = rng.standard_normal((b, l, n)), tuple(rng.standard_normal((2, b, d)))
    weights = rng.standard_normal((2, b, l, d))
    variables = randomize(jax.eval_shape(module.init, jax.random.key(0), x, state))
    assert {tuple(leaf.shape) for leaf in jax.tree.leaves(variables)} == {(d, 4, d), (4, d), (n, 4, d)}

    def ours(variables, x, state):
        return sum((w * y).sum() for w, y in zip(weights, module.apply(variables, x, state)))

    def theirs(variables, x, state):
        p = variables["params"]
        gates = {f"i{g}": {"kernel": p["input"]["kernel"][:, i]} for i, g in enumerate("ifgo")}
        gates |= {f"h{g}": {"kernel": p["kernel"][:, i], "bias": p["bias"][i]} for i, g in enumerate("ifgo")}
        total = 0
        for t in range(l):
            state, _ = cell.apply({"params": gates}, state, x[:, t])
            total += sum((w[:, t] * y).sum() for w, y in zip(weights, state))
        return total

    found, wanted = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(variables, jnp.asarray(x), state) for f in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_pieces_are_the_whole():
    module = LSTM(4, jnp.bfloat16)
    x, state = jax.random.normal(jax.random.key(0), (2, 6, 3)), (jnp.zeros((2, 4)), jnp.zeros((2, 4)))
    variables = jax.jit(module.init)(jax.random.key(1), x, state)
    gate = variables["params"]["kernel"][:, 2]
    np.testing.assert_allclose(gate @ gate.T, np.eye(4), atol=1e-5)
    apply = jax.jit(module.apply)
    cs, hs = apply(variables, x, state)
    assert cs.dtype == hs.dtype == jnp.bfloat16
    first = apply(variables, x[:, :2], state)
    rest = apply(variables, x[:, 2:], tuple(y[:, -1] for y in first))
    for whole, pieces in zip((cs, hs), zip(first, rest)):
        np.testing.assert_array_equal(whole, jnp.concatenate(pieces, axis=1))
