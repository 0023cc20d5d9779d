"""Continuous features <-> discrete codes."""

from jaxgen.quantizers.binary import (
    BinaryScales,
    bernoulli_bits,
    bits_of,
    codes_of,
    entropy_penalty,
    joined_bits,
    parted_bits,
    spherical_codes,
)
from jaxgen.quantizers.clusters import cluster_codes
from jaxgen.quantizers.frequency import FrequencyQuantizer
from jaxgen.quantizers.multi_scale import MultiScaleQuantizer, Quantized
from jaxgen.quantizers.spherical import SphericalQuantizer
from jaxgen.quantizers.vector import CodebookState, nearest, revive

__all__ = [
    "BinaryScales",
    "CodebookState",
    "FrequencyQuantizer",
    "MultiScaleQuantizer",
    "Quantized",
    "SphericalQuantizer",
    "bernoulli_bits",
    "bits_of",
    "cluster_codes",
    "codes_of",
    "entropy_penalty",
    "joined_bits",
    "nearest",
    "parted_bits",
    "revive",
    "spherical_codes",
]
