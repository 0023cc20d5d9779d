"""Losses as functions of outputs. Nothing here imports Flax."""

from jaxgen.objectives.adversarial import adaptive_weight, hinge_discriminator, hinge_generator, warm
from jaxgen.objectives.alignment import cosine_distance, info_nce
from jaxgen.objectives.likelihood import cross_entropy, drop_labels

__all__ = [
    "adaptive_weight",
    "cosine_distance",
    "cross_entropy",
    "drop_labels",
    "hinge_discriminator",
    "hinge_generator",
    "info_nce",
    "warm",
]
