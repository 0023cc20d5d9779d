import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.objectives import adversarial as adv


def test_hinge_on_known_logits():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0])
    # real: 0, 0.5, 2 below the margin; fake: 0, 1 above it.
    assert adv.hinge_discriminator(real, fake) == pytest.approx(0.5 * (2.5 / 3 + 1 / 2))
    assert adv.hinge_discriminator(jnp.array([1.0]), jnp.array([-1.0])) == 0.0
    assert adv.hinge_generator(fake) == pytest.approx(1.5)


def test_logistic_losses_on_known_logits():
    # s(log 3) = 3/4, so -log s = log 4/3 and -log(1 - s) = log 4.
    real, fake = jnp.array([math.log(3)]), jnp.array([math.log(3)])
    assert adv.logistic_discriminator(real, fake) == pytest.approx(0.5 * (math.log(4 / 3) + math.log(4)))
    assert adv.nonsaturating_generator(fake) == pytest.approx(math.log(4 / 3))
    assert adv.logistic_discriminator(jnp.zeros(4), jnp.zeros(3)) == pytest.approx(math.log(2))
    # Finite, and with full slope, where the logistic itself is 0 in float32.
    value, slope = jax.value_and_grad(adv.nonsaturating_generator)(jnp.array([-200.0]))
    assert value == pytest.approx(200.0) and slope[0] == pytest.approx(-1.0)


@pytest.mark.parametrize("discriminator", [adv.hinge_discriminator, adv.logistic_discriminator])
def test_the_two_sides_pull_apart(discriminator):
    real, fake = jnp.array([0.1, -0.2]), jnp.array([0.3, 0.4])
    up, down = jax.grad(discriminator, argnums=(0, 1))(real, fake)
    assert (up < 0).all() and (down > 0).all()
    for generator in (adv.hinge_generator, adv.nonsaturating_generator):
        assert (jax.grad(generator)(fake) < 0).all()


def test_logistic_optimum_is_the_log_odds():
    """Of densities p and q on three points, the best discriminator is log(p / q) (Goodfellow et al. 2014, prop. 1)."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])

    def loss(logits):
        real = jnp.repeat(logits, np.round(p * 10).astype(int), total_repeat_length=10)
        fake = jnp.repeat(logits, np.round(q * 10).astype(int), total_repeat_length=10)
        return adv.logistic_discriminator(real, fake)

    np.testing.assert_allclose(jax.grad(loss)(jnp.log(p / q)), 0.0, atol=1e-6)


def test_adaptive_weight():
    rec = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}  # norm 5
    other = {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.array([0.0])}  # norm 2
    assert adv.adaptive_weight(rec, other) == pytest.approx(5 / 2.0001, rel=1e-6)
    assert adv.adaptive_weight(rec, other, eps=3.0) == pytest.approx(1.0)
    zero = jax.tree.map(jnp.zeros_like, rec)
    assert adv.adaptive_weight(rec, zero) == 1e4
    assert adv.adaptive_weight(rec, zero, maximum=7.0) == 7.0
    assert adv.adaptive_weight(zero, other) == 0.0
    # Balanced: the weighted adversarial gradient is as long as the other one.
    weight = adv.adaptive_weight(rec["kernel"], other["kernel"], eps=1e-12)
    assert jnp.linalg.norm(weight * other["kernel"]) == pytest.approx(3.0)
    assert adv.adaptive_weight(jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    slopes = jax.grad(adv.adaptive_weight, argnums=(0, 1))(rec["kernel"], other["kernel"])
    assert all((s == 0).all() for s in slopes)


def test_warm_is_traced_and_inclusive():
    gate = jax.jit(adv.warm, static_argnums=1)
    assert [float(gate(step, 3)) for step in range(6)] == [0, 0, 0, 1, 1, 1]
    assert gate(0, 0) == 1.0
    assert gate._cache_size() == 2  # one per start


def test_r1_of_a_linear_and_a_quadratic_discriminator():
    w = jnp.array([1.0, -2.0, 3.0, 0.5])
    x = jnp.arange(12.0).reshape(3, 1, 4, 1)
    # D = w.x has the gradient w everywhere; repeating it over patches changes nothing.
    linear = adv.r1_penalty(lambda im: im.reshape(3, 4) @ w, x)
    assert linear == pytest.approx(0.5 * float(w @ w))
    patches = adv.r1_penalty(lambda im: jnp.broadcast_to((im.reshape(3, 4) @ w)[:, None, None], (3, 5, 5)), x)
    assert patches == pytest.approx(float(linear))
    # D = |x|^2 / 2 has the gradient x.
    quadratic = adv.r1_penalty(lambda im: 0.5 * jnp.sum(im**2, (1, 2, 3)), x)
    assert quadratic == pytest.approx(0.5 * (np.arange(12.0) ** 2).sum() / 3)
    # It trains the discriminator: d/dw |w|^2 / 2 = w.
    np.testing.assert_allclose(jax.grad(lambda w: adv.r1_penalty(lambda im: im.reshape(3, 4) @ w, x))(w), w, rtol=1e-6)


def test_lecam():
    anchors = adv.LecamAnchors.zeros()
    for _ in range(3):
        anchors = anchors.update(jnp.array([1.0, 3.0]), jnp.array([-1.0]), decay=0.5)
    assert anchors.real == pytest.approx(2 * (1 - 0.5**3)) and anchors.fake == pytest.approx(-(1 - 0.5**3))
    penalty = adv.lecam_penalty(jnp.array([1.0, 2.0]), jnp.array([0.0]), adv.LecamAnchors(jnp.array(3.0), jnp.array(-1.0)))
    assert penalty == pytest.approx((4 + 9) / 2 + 9)
    # The anchors are history: no gradient flows into them.
    slope = jax.grad(lambda logits: adv.LecamAnchors.zeros().update(logits, logits).real)(jnp.ones(2))
    np.testing.assert_array_equal(slope, 0.0)
