"""The diffusion head: its losses against double precision, its chain against its own density."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.heads import DiffusionHead
from jaxgen.nn.timestep import sinusoids
from jaxgen.paths_vp import VPPath

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

C, D, PATH = 3, 5, VPPath("cosine", 20)


class Jitted:
    """A module whose `apply` is one compile a method."""

    def __init__(self, module):
        self.clone, self.apply = module.clone, jax.jit(module.apply, static_argnames=("path", "method"))


@pytest.fixture(scope="module")
def head(randomize):
    module = DiffusionHead(channels=C, width=16, depth=2, path=PATH, prediction="velocity")
    inputs = jnp.zeros((1, D)), jnp.zeros((1, C)), jnp.zeros((1,), jnp.int32)
    return Jitted(module), jax.tree.map(jnp.asarray, randomize(jax.eval_shape(module.init, jax.random.key(0), *inputs)))


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(6, n)), jnp.float32) for n in (D, C))


def reference(module, variables, z, x0, i, noise):
    """(squared error, the bound's part in nats) in double precision, with the posterior by regression."""
    a, before = PATH.alpha_bar[i][:, None], PATH.alpha_bar[i - 1][:, None]
    x0, noise = np.asarray(x0, np.float64), np.asarray(noise, np.float64)
    x = np.sqrt(a) * x0 + np.sqrt(1 - a) * noise
    out = module.apply(variables, z, jnp.asarray(x, jnp.float32), jnp.asarray(PATH.times)[i - 1])
    velocity, share = (np.asarray(y, np.float64) for y in out)
    error = np.square(velocity - (np.sqrt(a) * noise - np.sqrt(1 - a) * x0)).mean(1)
    covariance = np.sqrt(a / before) * (1 - before)

    def given(x0):
        return np.sqrt(before) * x0 + covariance / (1 - a) * (x - np.sqrt(a) * x0)

    variance = (1 - before) - covariance**2 / (1 - a)
    a2, a1 = PATH.alpha_bar[2], PATH.alpha_bar[1]
    least = np.where(i[:, None] == 1, (1 - a2 / a1) * (1 - a1) / (1 - a2), variance)
    p_variance = np.exp((1 - share) * np.log(least) + share * np.log(1 - a / before))
    p_mean = given(np.sqrt(a) * x - np.sqrt(1 - a) * velocity)
    kl = 0.5 * (variance / p_variance + (given(x0) - p_mean) ** 2 / p_variance - 1)
    kl += 0.5 * (np.log(p_variance) - np.log(np.maximum(variance, 1e-300)))
    nll = 0.5 * (x0 - p_mean) ** 2 / p_variance + 0.5 * np.log(2 * np.pi * p_variance)
    return x, error, np.where(i[:, None] == 1, nll, kl).sum(1)


def test_the_loss_and_the_bound(head, tokens):
    module, variables = head
    z, x0 = tokens
    noise = jax.random.normal(jax.random.key(1), x0.shape)
    i = np.array([1, 2, 3, 10, 19, 20])
    x, _, bound = reference(module, variables, z, x0, i, noise)
    got = module.apply(variables, z, x0, jnp.asarray(x, jnp.float32), jnp.asarray(i), method="bound")
    np.testing.assert_allclose(got, bound, rtol=2e-3, atol=1e-3)
    key_i, key_noise = jax.random.split(jax.random.key(2))
    drawn = np.asarray(jax.random.randint(key_i, (6,), 1, 21))
    _, error, bound = reference(module, variables, z, x0, drawn, jax.random.normal(key_noise, x0.shape))
    got = module.apply(variables, z, x0, jax.random.key(2), method="loss")
    np.testing.assert_allclose(got, error + bound / np.log(2) / C, rtol=2e-3)


def test_the_bound_does_not_move_the_mean(head, tokens):
    """The last layer's gradient towards predictions is that of the squared error alone."""
    module, variables = head
    z, x0 = tokens
    key_i, key_noise = jax.random.split(jax.random.key(2))
    i, noise = jax.random.randint(key_i, (6,), 1, 21), jax.random.normal(key_noise, x0.shape)

    def error(variables):
        prediction, _ = module.apply(variables, z, PATH.q_sample(x0, i, noise), jnp.asarray(PATH.times)[i - 1])
        return jnp.square(prediction - PATH.target("velocity", x0, i, noise)).mean(-1).sum()

    def loss(variables):
        return module.apply(variables, z, x0, jax.random.key(2), method="loss").sum()

    want, got = (jax.grad(f)(variables)["params"]["outputs"]["kernel"] for f in (error, loss))
    np.testing.assert_allclose(got[:, :C], want[:, :C], rtol=1e-4, atol=1e-6)
    assert np.abs(want[:, C:]).max() == 0 < np.abs(got[:, C:]).min()


def test_samples_and_their_density(head, tokens):
    module, variables = head
    z, _ = tokens
    for path in (None, VPPath("cosine", 20, 5)):
        steps = 20 if path is None else 5
        noise = 0.1 * jax.random.normal(jax.random.key(3), (6, steps + 1, C))
        points, density = module.apply(variables, z, noise, path=path, method="sample")
        assert points.shape == noise.shape
        again = module.apply(variables, z, points, path=path, method="log_prob")
        np.testing.assert_allclose(again, density, rtol=1e-3, atol=5e-2)
        np.testing.assert_array_equal(points[:, -1], noise[:, -1])
        last, log_std = module.apply(variables, z, points[:, 1], jnp.ones((6,), jnp.int32), path=path, method="moments")
        np.testing.assert_allclose(points[:, 0], last + jnp.exp(log_std) * noise[:, 0], rtol=1e-5, atol=1e-5)


def test_what_it_starts_from():
    """Zero predictions, variances in the middle, whatever the features: as published, the last layer starts at 0."""
    module = DiffusionHead(channels=C, width=8, depth=1, path=PATH)
    z, x, times = jnp.ones((2, D)), jnp.ones((2, C)), jnp.array([3, 9])
    prediction, share = module.init_with_output(jax.random.key(0), z, x, times)[0]
    assert not prediction.any() and (share == 0.5).all()


def test_features_levels_and_kinds_matter(head, tokens):
    module, variables = head
    z, x = tokens
    times = jnp.arange(6)
    want = module.apply(variables, z, x, times)[0]
    for other in ((z + 0.1, x, times), (z, x + 0.1, times), (z, x, times + 1)):
        assert np.abs(np.asarray(module.apply(variables, *other)[0] - want)).min() > 1e-6
    i = jnp.full((6,), 10)
    means = [module.clone(prediction=kind).apply(variables, z, x, i, method="moments")[0] for kind in ("noise", "velocity")]
    assert np.abs(np.asarray(means[0] - means[1])).max() > 1e-3
    with pytest.raises(ValueError, match="prediction='x0': expected one of noise, velocity"):
        module.clone(prediction="x0").apply(variables, z, x, times)


def test_sinusoids():
    t = np.array([0.0, 3.0, 999.0])
    got = np.asarray(sinusoids(jnp.asarray(t), 8))
    w = 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(got, np.concatenate([np.cos(t[:, None] * w), np.sin(t[:, None] * w)], 1), atol=1e-4)
