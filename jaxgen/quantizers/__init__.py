"""Continuous features <-> discrete codes."""

from jaxgen.quantizers.binary import BinaryScales, bits_of, codes_of, entropy_penalty, spherical_codes
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
    "bits_of",
    "cluster_codes",
    "codes_of",
    "entropy_penalty",
    "nearest",
    "revive",
    "spherical_codes",
]
