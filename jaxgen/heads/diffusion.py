"""A head for continuous tokens: a small diffusion model of one token given the features of its position (Li et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxgen.nn.placement import place_rows
from jaxgen.nn.timestep import TimestepEmbedding
from jaxgen.paths_vp import PREDICTIONS, VPPath, chain_log_prob, sample_chain

__all__ = ["DiffusionHead"]


class _ResBlock(nn.Module):
    """x + gate mlp(norm(x) (1 + scale) + shift), where the condition gives shift, scale and gate."""

    dtype: Any

    @nn.compact
    def __call__(self, x, cond):
        width, zeros, init = x.shape[-1], nn.initializers.zeros, nn.initializers.xavier_uniform()
        ada = nn.Dense(3 * width, kernel_init=zeros, dtype=self.dtype, name="ada")(nn.silu(cond))
        shift, scale, gate = jnp.split(ada, 3, axis=-1)
        h = nn.LayerNorm(epsilon=1e-6, name="norm")(x) * (1 + scale) + shift
        h = nn.silu(nn.Dense(width, kernel_init=init, dtype=self.dtype, name="fc1")(h))
        return place_rows(x + gate * nn.Dense(width, kernel_init=init, dtype=self.dtype, name="fc2")(h))


class DiffusionHead(nn.Module):
    """p(token | features) as a chain of Gaussians, whose means and variances an MLP with adaptive norms gives.

    Li et al. 2024 (*Autoregressive image generation without vector quantization*, arXiv:2406.11838), section 3.2 and appendix B.

    Attributes:
      channels: c, numbers a token.
      width: of the MLP.
      depth: residual blocks.
      path: of training; sampling takes some of its steps.
      prediction: "noise", as published, or "velocity", which learns the first steps of sampling more easily.
      dtype: of the MLP; what comes out is float32.
    """

    channels: int
    width: int
    depth: int
    path: VPPath = VPPath()
    prediction: str = "noise"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "*b d"], x: Float[Array, "*b c"], times: Int[Array, "*b"]
    ) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """(prediction, share) at noisy tokens `x`; 0 and 1 of the share are the smallest and the largest log-variance.

        Leading axes broadcast; on a mesh the first is the batch's.
        """
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: expected one of {', '.join(PREDICTIONS)}")
        init, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        time = TimestepEmbedding(self.width, name="time")(times)
        cond = place_rows(time + nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="cond")(z))
        h = place_rows(nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="inputs")(x))
        for i in range(self.depth):
            h = _ResBlock(self.dtype, name=f"blocks_{i}")(h, cond)
        ada = nn.Dense(2 * self.width, kernel_init=zeros, dtype=self.dtype, name="ada")(nn.silu(cond))
        shift, scale = jnp.split(ada, 2, axis=-1)
        h = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, name="norm")(h) * (1 + scale) + shift
        out = nn.Dense(2 * self.channels, kernel_init=zeros, name="outputs")(h.astype(jnp.float32))
        prediction, share = jnp.split(out, 2, axis=-1)
        return prediction, (share + 1) / 2

    def moments(
        self, z: Float[Array, "*b d"], x: Float[Array, "*b c"], i: Int[Array, "*b"], path: VPPath | None = None
    ) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
        """(mean, log standard deviation) of x_{i-1} given x_i = x: a `Kernel` of `path`, or of training's."""
        path = self.path if path is None else path
        prediction, share = self(z, x, jnp.asarray(path.times)[i - 1])
        return path.moments(self.prediction, prediction, share, x, i)

    def loss(self, z: Float[Array, "*b d"], x0: Float[Array, "*b c"], key: Key[Array, ""]) -> Float[Array, "*b"]:
        """Squared error of the prediction at one random level, plus the bound for the variance (`bound`) in bits a number.

        The bound does not move the mean, as in Nichol & Dhariwal 2021, section 3.1; the sum is Li et al.'s loss.
        """
        key_i, key_noise = jax.random.split(key)
        i = jax.random.randint(key_i, x0.shape[:-1], 1, self.path.length + 1)
        return sum(self.losses(z, x0, i, jax.random.normal(key_noise, x0.shape)))

    def losses(
        self, z: Float[Array, "*b d"], x0: Float[Array, "*b c"], i: Int[Array, "*b"], noise: Float[Array, "*b c"]
    ) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """The two parts of `loss`, at given levels and noise."""
        x = self.path.q_sample(x0, i, noise)
        prediction, share = self(z, x, jnp.asarray(self.path.times)[i - 1])
        error = jnp.square(prediction - self.path.target(self.prediction, x0, i, noise)).mean(-1)
        moments = self.path.moments(self.prediction, jax.lax.stop_gradient(prediction), share, x, i)
        return error, _step_bound(self.path, *moments, x0, x, i) / (math.log(2) * self.channels)

    def bound(self, z: Float[Array, "*b d"], x0: Float[Array, "*b c"], x: Float[Array, "*b c"], i: Int[Array, "*b"]):
        """The part of step i in the bound on -log p(x_0 | z), in nats: at i = 1 -log p(x_0 | x_1), then
        KL(q(x_{i-1} | x_i, x_0) || p(x_{i-1} | x_i)) (Ho et al. 2020, eq. 5)."""
        return _step_bound(self.path, *self.moments(z, x, i), x0, x, i)

    def sample(
        self, z: Float[Array, "*b d"], noise: Float[Array, "*b s+1 c"], path: VPPath | None = None
    ) -> tuple[Float[Array, "*b s+1 c"], Float[Array, "*b"]]:
        """(path, log-density) from noise; see `sample_chain`. `path` has s steps."""
        return sample_chain(lambda x, i: self.moments(z, x, i, path), noise)

    def log_prob(
        self, z: Float[Array, "*b d"], points: Float[Array, "*b s+1 c"], path: VPPath | None = None
    ) -> Float[Array, "*b"]:
        """The log-density of a path; see `chain_log_prob`."""
        return chain_log_prob(lambda x, i: self.moments(z[..., None, :], x, i, path), points)


def _step_bound(path: VPPath, mean, log_std, x0, x, i):
    want, (least, _) = path.posterior_mean(x0, x, i), path.log_variances(i)
    log_ratio = log_std - 0.5 * least
    kl = log_ratio + 0.5 * (jnp.exp(least) + jnp.square(want - mean)) * jnp.exp(-2 * log_std) - 0.5
    nll = 0.5 * jnp.square(x0 - mean) * jnp.exp(-2 * log_std) + log_std + 0.5 * math.log(2 * math.pi)
    return jnp.where(jnp.asarray(i)[..., None] == 1, nll, kl).sum(-1)
