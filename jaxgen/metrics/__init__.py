"""Scores of images, features, classes, codebooks and scaling curves. Nothing here imports Flax."""

from jaxgen.metrics.codebook import count_tokens, perplexity, usage
from jaxgen.metrics.frechet import FeatureStats, class_accuracy, frechet_distance, inception_score, precision_recall
from jaxgen.metrics.image import detail, psnr, ssim
from jaxgen.metrics.scaling import PowerLaw, fit_power_law

__all__ = [
    "FeatureStats",
    "PowerLaw",
    "class_accuracy",
    "count_tokens",
    "detail",
    "fit_power_law",
    "frechet_distance",
    "inception_score",
    "perplexity",
    "precision_recall",
    "psnr",
    "ssim",
    "usage",
]
