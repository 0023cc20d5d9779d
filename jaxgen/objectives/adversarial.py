"""Losses of a discriminator and of what it judges, as functions of its logits (high for real)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = [
    "hinge_discriminator",
    "hinge_generator",
    "logistic_discriminator",
    "nonsaturating_generator",
    "adaptive_weight",
    "warm",
    "r1_penalty",
    "LecamAnchors",
    "lecam_penalty",
]

PyTree = Any
Logits = Float[Array, "b *patches"]
Scalar = Float[Array, ""]


def hinge_discriminator(real: Logits, fake: Logits) -> Scalar:
    """(E max(0, 1 - real) + E max(0, 1 + fake)) / 2 (Lim & Ye 2017; halved as in VQGAN's code)."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def hinge_generator(fake: Logits) -> Scalar:
    """-E fake, the generator's side of the hinge loss."""
    return -jnp.mean(fake)


def logistic_discriminator(real: Logits, fake: Logits) -> Scalar:
    """-(E log s(real) + E log(1 - s(fake))) / 2, s the logistic (Goodfellow et al. 2014, eq. 1; halved as above)."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


def nonsaturating_generator(fake: Logits) -> Scalar:
    """-E log s(fake), which has slope where the discriminator wins (Goodfellow et al. 2014, section 3)."""
    return jnp.mean(jax.nn.softplus(-fake))


def adaptive_weight(grad_rec: PyTree, grad_adv: PyTree, eps: float = 1e-4, maximum: float = 1e4) -> Scalar:
    r"""Weight that gives the adversarial loss the same pull as the reconstruction loss.

    .. math:: \lambda = \min(\|\nabla L_{rec}\| / (\|\nabla L_{adv}\| + \epsilon), \lambda_{max})

    (Esser et al. 2021, https://arxiv.org/abs/2012.09841, eq. 7; the limit is from their code.)

    Args:
      grad_rec: gradient of the reconstruction (and perceptual) loss with respect to the decoder's last layer.
      grad_adv: gradient of the generator's adversarial loss with respect to the same parameters.
      eps: keeps the quotient finite.
      maximum: largest weight.

    Returns:
      A float32 scalar through which no gradient flows.
    """
    return jax.lax.stop_gradient(jnp.clip(_norm(grad_rec) / (_norm(grad_adv) + eps), 0.0, maximum))


def _norm(tree: PyTree) -> Scalar:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def warm(step: Int[Array, ""] | int, start: int) -> Scalar:
    """0 before step `start`, 1 from then on: adversarial training begins when reconstructions look like something."""
    return jnp.where(jnp.asarray(step) >= start, 1.0, 0.0)


def r1_penalty(discriminator: Callable[[Array], Logits], real: Float[Array, "b h w c"]) -> Scalar:
    """E |gradient of D at a real image|^2 / 2.

    Mescheder et al. 2018, https://arxiv.org/abs/1801.04406, eq. 9 with gamma = 1.

    Args:
      discriminator: images -> logits, each image judged on its own. D is the mean over an image's patches, so that the
        penalty does not depend on their number.
      real: images.
    """

    def total(images):
        logits = discriminator(images)
        return jnp.sum(jnp.mean(logits.reshape(logits.shape[0], -1), axis=-1))

    gradient = jax.grad(total)(real)
    return 0.5 * jnp.mean(jnp.sum(jnp.square(gradient), axis=tuple(range(1, gradient.ndim))))


class LecamAnchors(NamedTuple):
    """Moving averages of the mean logit of real and of fake images."""

    real: Scalar
    fake: Scalar

    @classmethod
    def zeros(cls) -> LecamAnchors:
        return cls(jnp.zeros(()), jnp.zeros(()))

    def update(self, real: Logits, fake: Logits, decay: float = 0.99) -> LecamAnchors:
        """The averages after one more batch."""

        def move(old, logits):
            return decay * old + (1.0 - decay) * jax.lax.stop_gradient(jnp.mean(logits))

        return LecamAnchors(move(self.real, real), move(self.fake, fake))


def lecam_penalty(real: Logits, fake: Logits, anchors: LecamAnchors) -> Scalar:
    """E (real - anchor of fake)^2 + E (fake - anchor of real)^2, which helps where images are few.

    Tseng et al. 2021, https://arxiv.org/abs/2104.03310.
    """
    return jnp.mean(jnp.square(real - anchors.fake)) + jnp.mean(jnp.square(fake - anchors.real))
