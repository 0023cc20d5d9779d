"""Data <-> tokens or latents."""

from jaxgen.tokenizers.binary import BinaryTokenizer
from jaxgen.tokenizers.bytes import ByteTokenizer, PixelCodec
from jaxgen.tokenizers.conv import ConvAutoencoder, ConvDecoder, ConvEncoder
from jaxgen.tokenizers.diffusion import DiffusionTokenizer
from jaxgen.tokenizers.flexible import FlexibleTokenizer
from jaxgen.tokenizers.frames import FrameTokenizer
from jaxgen.tokenizers.frequency import FrequencyTokenizer
from jaxgen.tokenizers.jpeg import JpegCodec
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer, Reconstruction
from jaxgen.tokenizers.pairs import Pairs, learn_pairs
from jaxgen.tokenizers.pixels import PixelTokenizer

__all__ = [
    "BinaryTokenizer",
    "ByteTokenizer",
    "ConvAutoencoder",
    "ConvDecoder",
    "ConvEncoder",
    "DiffusionTokenizer",
    "FlexibleTokenizer",
    "FrameTokenizer",
    "FrequencyTokenizer",
    "JpegCodec",
    "MultiScaleTokenizer",
    "Pairs",
    "PixelCodec",
    "PixelTokenizer",
    "Reconstruction",
    "learn_pairs",
]
