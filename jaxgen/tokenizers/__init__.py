"""Data <-> tokens or latents."""

from jaxgen.tokenizers.binary import BinaryTokenizer
from jaxgen.tokenizers.conv import ConvDecoder, ConvEncoder
from jaxgen.tokenizers.flexible import FlexibleTokenizer
from jaxgen.tokenizers.frequency import FrequencyTokenizer
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer, Reconstruction
from jaxgen.tokenizers.pixels import PixelTokenizer

__all__ = [
    "BinaryTokenizer",
    "ConvDecoder",
    "ConvEncoder",
    "FlexibleTokenizer",
    "FrequencyTokenizer",
    "MultiScaleTokenizer",
    "PixelTokenizer",
    "Reconstruction",
]
