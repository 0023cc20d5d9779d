"""Data <-> tokens or latents."""

from jaxgen.tokenizers.conv import ConvDecoder, ConvEncoder
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer, Reconstruction

__all__ = ["ConvDecoder", "ConvEncoder", "MultiScaleTokenizer", "Reconstruction"]
