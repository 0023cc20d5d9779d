import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.nn.moe import MixtureOfExperts

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

LAYER = MixtureOfExperts(hidden=6, experts=4, used=2, init_std=0.5, out_std=0.5)


@pytest.fixture(scope="module")
def made():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    return LAYER.init(jax.random.key(1), x), x


def by_hand(params, x):
    """Token by token in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    x = np.asarray(x, np.float64)
    out, chosen = np.zeros_like(x), []
    for place in np.ndindex(x.shape[:2]):
        logits = x[place] @ p["router"]["kernel"]
        best = np.argsort(-logits)[:2]
        weights = np.exp(logits[best]) / np.exp(logits[best]).sum()
        chosen.append(best)
        for i, w in zip(best, weights):
            gate = x[place] @ p["w1"][i]
            out[place] += w * ((gate / (1 + np.exp(-gate)) * (x[place] @ p["w3"][i])) @ p["w2"][i])
    return out, np.array(chosen).reshape(*x.shape[:2], 2)


def test_the_layer_is_its_equation(made):
    params, x = made
    want, chosen = by_hand(params, x)
    got, told = LAYER.apply(params, x, mutable=["balance"])
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(LAYER.apply(params, x, method="route")[1], chosen)
    logits = np.asarray(x, np.float64) @ np.asarray(params["params"]["router"]["kernel"], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    share = np.bincount(chosen.reshape(-1), minlength=4) / chosen.size
    np.testing.assert_allclose(told["balance"]["load"][0], 4 * (share * p.mean((0, 1))).sum(), rtol=1e-5)
    assert set(params) == {"params"}


def test_every_used_expert_and_the_router_learn(made):
    params, x = made
    grads = jax.grad(lambda p: jnp.square(LAYER.apply(p, x)).sum())(params)["params"]
    used = np.unique(by_hand(params, x)[1])
    for name in ("w1", "w2", "w3"):
        assert (np.abs(grads[name]).max((1, 2)) > 0).nonzero()[0].tolist() == used.tolist()
    assert np.abs(grads["router"]["kernel"]).max() > 0


def test_bad_input():
    with pytest.raises(ValueError, match="used=3: must be in 1..experts=2"):
        MixtureOfExperts(hidden=4, experts=2, used=3).init(jax.random.key(0), jnp.ones((1, 2, 4)))
