import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Guided, Out, View, cosine_ramp, guide, scale_ramp

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)


def model(params, cache, view, cond):
    """Logits that tell rows, positions, masks and times apart."""
    rows = view.tokens.shape[0]
    pos = np.broadcast_to(view.pos, (rows, view.tokens.shape[1]))
    logits = params[view.tokens] * cond[:, None, None] + pos[..., None]
    if view.mask is not None:
        logits = logits + np.broadcast_to(view.mask, (rows, *view.mask.shape[-2:])).sum(-1)[..., None]
    if view.time is not None:
        logits = logits + np.broadcast_to(view.time, rows)[:, None, None]
    return Out(logits, logits * 2), cache + 1


PARAMS = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
COND = jnp.array([1.0, 2.0, 3.0, -1.0, -2.0, -3.0])  # conditional, then unconditional
TOKENS = jnp.asarray(RNG.integers(0, 5, (3, 2)))


def halves(view):
    conditional, _ = model(PARAMS, 0, view, COND[:3])
    unconditional, _ = model(PARAMS, 0, view, COND[3:])
    return conditional, unconditional


@pytest.mark.parametrize(
    "extra",
    [
        {"pos": jnp.arange(2)},
        {"pos": jnp.array([[0, 1], [4, 7], [2, 3]])},
        {"pos": jnp.arange(2), "mask": jnp.tril(jnp.ones((2, 2), bool))},
        {"pos": jnp.arange(2), "mask": jnp.asarray(RNG.random((3, 2, 2)) < 0.5), "time": jnp.array([0.1, 0.5, 0.9])},
        {"pos": jnp.arange(2), "time": 3},
    ],
    ids=["positions", "positions a row", "mask", "mask and time a row", "time"],
)
def test_guided_is_the_formula(extra):
    view = View(TOKENS, **extra)
    conditional, unconditional = halves(view)
    for t in (0.0, 1.5, -0.5):
        out, cache = guide(model)(PARAMS, 0, view, Guided(COND, t))
        np.testing.assert_allclose(out.params, (1 + t) * conditional.params - t * unconditional.params, atol=1e-5)
        np.testing.assert_array_equal(out.feats, conditional.feats)
        assert cache == 1


def test_a_weight_for_each_row_and_laws_that_are_trees():
    def step(params, cache, view, cond):
        out, cache = model(params, cache, view, cond)
        return Out({"a": out.params, "b": (out.params**2,)}, None), cache

    t = jnp.array([0.0, 1.0, 2.0])[:, None, None]
    view = View(TOKENS, jnp.arange(2))
    conditional, unconditional = (x.params for x in halves(view))
    out, _ = guide(step)(PARAMS, 0, view, Guided(COND, t))
    np.testing.assert_allclose(out.params["a"], (1 + t) * conditional - t * unconditional, atol=1e-5)
    np.testing.assert_allclose(out.params["b"][0], (1 + t) * conditional**2 - t * unconditional**2, atol=1e-5)
    assert out.feats is None


def test_the_published_ramp():
    np.testing.assert_allclose([scale_ramp(1.5, k, 4) for k in range(4)], [0.0, 0.5, 1.0, 1.5])
    assert scale_ramp(1.5, 0, 1) == 0.0
    assert jax.jit(lambda cfg: scale_ramp(cfg, 2, 3))(4.0) == 4.0


def test_the_cosine_ramp():
    np.testing.assert_allclose(cosine_ramp(2.0, 1.0, 4), [0.0, 1 - 0.5**0.5, 1.0, 1 + 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(cosine_ramp(2.0, 0.5, 4)[1], 1.0, atol=1e-6)
