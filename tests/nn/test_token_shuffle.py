"""Windows of tokens, and the parts that join and part them."""

import jax
import numpy as np
import pytest

from jaxgen.nn import TokenShuffle, TokenUnshuffle, window_order

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("grid, window", [((2, 4), 2), ((6, 3), 3), ((4, 4), 4), ((2, 3), 1)])
def test_windows_hold_neighbours(grid, window):
    cells = np.indices(grid).reshape(2, -1).T[window_order(grid, window)].reshape(-1, window**2, 2)
    corners = cells[:, 0]
    assert corners.tolist() == [[i, j] for i in range(0, grid[0], window) for j in range(0, grid[1], window)]
    inside = [[i, j] for i in range(window) for j in range(window)]
    assert all((cell - corner).tolist() == inside for cell, corner in zip(cells, corners))


@pytest.mark.parametrize("grid, window", [((4, 6), 4), ((5, 5), 2), ((4, 4), 0)])
def test_windows_that_do_not_fill_the_grid(grid, window):
    with pytest.raises(ValueError, match=f"window={window}: must divide both sides of the grid, {grid[0]} x {grid[1]}"):
        window_order(grid, window)


@pytest.mark.parametrize("part", [TokenShuffle, TokenUnshuffle])
def test_widths_that_do_not_divide(part):
    with pytest.raises(ValueError, match="window=3: its square must divide the width, 12"):
        part(12, 3)


@pytest.mark.numeric
@pytest.mark.usefixtures("quick_compiles")
def test_the_equations(randomize):
    """In float64: compress each token, join, x + mlp(norm(x)); and x + mlp(norm(x)), cut, widen each."""

    def mixed(x, p):
        for i in range(2):
            h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            h = h @ p[f"mlp_{i}"]["fc1"]["kernel"] + p[f"mlp_{i}"]["fc1"]["bias"]
            h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
            x = x + h @ p[f"mlp_{i}"]["fc2"]["kernel"] + p[f"mlp_{i}"]["fc2"]["bias"]
        return x

    tokens, vectors = (RNG.normal(size=(2, n, 8)).astype(np.float32) for n in (12, 3))
    results = []
    for module, x in ((TokenShuffle(8, 2), tokens), (TokenUnshuffle(8, 2), vectors)):
        params = randomize(jax.eval_shape(module.init, jax.random.key(0), x))
        results.append((np.asarray(jax.jit(module.apply)(params, x)), jax.tree.map(np.float64, params["params"])))
    (got, p), (back, r) = results
    small = tokens @ p["compress"]["kernel"] + p["compress"]["bias"]
    np.testing.assert_allclose(got, mixed(small.reshape(2, 3, 8), p["mix"]), atol=1e-5)
    parts = mixed(np.float64(vectors), r["mix"]).reshape(2, 12, 2)
    np.testing.assert_allclose(back, parts @ r["expand"]["kernel"] + r["expand"]["bias"], atol=1e-5)
