import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives.distillation import forward_kl, policy_gradient, total_variation, tvd_plus_plus

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)
N, V = 6, 5
DRAFT, TARGET = (RNG.normal(0, 1.5, (N, V)).astype(np.float32) for _ in range(2))


def law(logits):
    x = np.exp(logits.astype(np.float64))
    return x / x.sum(-1, keepdims=True)


Q, P = law(DRAFT), law(TARGET)


def test_divergences():
    np.testing.assert_allclose(forward_kl(DRAFT, TARGET), (P * np.log(P / Q)).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(total_variation(DRAFT, TARGET), 1 - np.minimum(P, Q).sum(-1), rtol=1e-5)
    cut = np.where(np.arange(V) < 2, -np.inf, TARGET)
    kept = law(TARGET[:, 2:])
    np.testing.assert_allclose(forward_kl(DRAFT, cut), (kept * np.log(kept / Q[:, 2:])).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("loss", [forward_kl, total_variation, tvd_plus_plus])
def test_the_target_gets_no_gradient_and_a_perfect_draft_none_either(loss):
    assert not np.asarray(jax.grad(lambda t: loss(DRAFT, t).sum())(TARGET)).any()
    assert np.abs(jax.grad(lambda d: loss(d, TARGET).sum())(DRAFT)).max() > 0.01
    grad = jax.grad(lambda d: loss(d, TARGET).sum())(TARGET)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_the_gradient_of_total_variation_is_a_policy_gradient():
    """Lemma 1: the estimator's mean, over every token that may be drawn, is what autodiff says."""
    want = jax.grad(lambda d: total_variation(d, TARGET).sum())(DRAFT)
    mean = np.zeros((N, V))
    for x in range(V):
        grad = jax.grad(lambda d, x=x: policy_gradient(d, TARGET, np.full((N,), x), normalise=False).sum())(DRAFT)
        mean += Q[:, x : x + 1] * np.asarray(grad)
    np.testing.assert_allclose(mean, want, atol=1e-6)


def test_tvd_plus_plus_is_the_gradient_over_the_rewards_deviation():
    want = jax.grad(lambda d: total_variation(d, TARGET).sum())(DRAFT)
    share = (Q * (P > Q)).sum() / N
    got = jax.grad(lambda d: tvd_plus_plus(d, TARGET).sum())(DRAFT)
    np.testing.assert_allclose(got, np.asarray(want) / np.sqrt(share * (1 - share)), rtol=1e-4, atol=1e-6)


def test_normalising_lowers_the_variance():
    """Of the gradient of a bias that all positions share, in units of its own mean."""
    n = 64
    rng = np.random.default_rng(1)
    draft, target = (rng.normal(0, 1.5, (n, V)).astype(np.float32) for _ in range(2))

    def estimates(normalise):
        def one(key):
            tokens = jax.random.categorical(key, draft)
            return jax.grad(lambda bias: policy_gradient(draft + bias, target, tokens, normalise=normalise).mean())(jnp.zeros(V))

        return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4096)))

    exact = np.asarray(jax.grad(lambda bias: total_variation(draft + bias, target).mean())(jnp.zeros(V)))
    noise = []
    for normalise in (False, True):
        draws = estimates(normalise)
        mean = draws.mean(axis=0)
        scale = np.linalg.norm(mean) / np.linalg.norm(exact)
        assert mean @ exact > 0.99 * np.linalg.norm(mean) * np.linalg.norm(exact)
        noise.append(draws.var(axis=0).sum() / scale**2)
        assert (scale > 1.5) == normalise
    assert noise[1] < 0.75 * noise[0]


@pytest.mark.parametrize("loss", [tvd_plus_plus, lambda d, t, where: policy_gradient(d, t, np.arange(N) % V, where)])
def test_positions_that_do_not_count_change_nothing(loss):
    where = np.arange(N) < 4
    other = np.where(where[:, None], TARGET, -TARGET)

    def kept(target):
        return np.asarray(jax.grad(lambda d: (loss(d, target, where) * where).sum())(DRAFT))[:4]

    np.testing.assert_allclose(kept(TARGET), kept(other), rtol=1e-6)
    everywhere = jax.grad(lambda d: loss(d, TARGET, None).sum())(DRAFT)[:4]
    assert np.abs(kept(TARGET) - everywhere).max() > 1e-4


@pytest.mark.parametrize("loss", [forward_kl, total_variation, tvd_plus_plus])
def test_tokens_without_probability_leave_gradients_finite(loss):
    target = np.where(np.arange(V) == 1, -np.inf, TARGET)
    draft = np.where(np.arange(V) == 1, -np.inf, DRAFT) if loss is tvd_plus_plus else DRAFT
    assert np.isfinite(jax.grad(lambda d: loss(d, target).sum())(draft)).all()
    same = jax.grad(lambda d: tvd_plus_plus(d, d).sum())(np.zeros((2, V), np.float32))
    np.testing.assert_allclose(same, 0, atol=1e-6)
