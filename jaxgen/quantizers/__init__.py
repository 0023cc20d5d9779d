"""Continuous features <-> discrete codes."""

from jaxgen.quantizers.multi_scale import MultiScaleQuantizer, Quantized
from jaxgen.quantizers.vector import CodebookState, nearest, revive

__all__ = ["CodebookState", "MultiScaleQuantizer", "Quantized", "nearest", "revive"]
