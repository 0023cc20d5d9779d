"""Scores of images, features, classes, codebooks and scaling curves. Nothing here imports Flax."""

from jaxgen.metrics.codebook import count_tokens, perplexity, usage
from jaxgen.metrics.frechet import FeatureStats, class_accuracy, frechet_distance, precision_recall
from jaxgen.metrics.image import detail, psnr, ssim
from jaxgen.metrics.image_stats import ImageStats, Reference, image_scores, npz_images, read_reference
from jaxgen.metrics.probe import linear_probe
from jaxgen.metrics.scaling import PowerLaw, fit_power_law
from jaxgen.metrics.score import ScoreStats, inception_score

__all__ = [
    "FeatureStats",
    "ImageStats",
    "PowerLaw",
    "Reference",
    "ScoreStats",
    "class_accuracy",
    "count_tokens",
    "detail",
    "fit_power_law",
    "frechet_distance",
    "image_scores",
    "inception_score",
    "linear_probe",
    "npz_images",
    "perplexity",
    "precision_recall",
    "psnr",
    "read_reference",
    "ssim",
    "usage",
]
