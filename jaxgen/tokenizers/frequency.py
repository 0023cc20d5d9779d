"""The tokenizer of S007 NFIG: VAR's autoencoder, whose scales are frequency bands of its features."""

from __future__ import annotations

from jaxgen.config import fields_of
from jaxgen.quantizers.frequency import FrequencyQuantizer
from jaxgen.tokenizers.multi_scale import MultiScaleTokenizer

__all__ = ["FrequencyTokenizer"]


class FrequencyTokenizer(MultiScaleTokenizer):
    """Images in [-1, 1] <-> tokens of all frequency bands, low to high (Huang et al. 2025, section 3.1).

    All else is `MultiScaleTokenizer`. The authors start the encoder from DINOv2-base; here it starts from nothing.

    Attributes:
      division, transform: see `jaxgen.quantizers.frequency.band_masks`.

    Example:
      >>> tokenizer = FrequencyTokenizer(ch=32, ch_mult=(1, 2), patch_nums=(1, 2, 4), vocab=64, width=8, division="grid")
    """

    division: str = "tokens"
    transform: str = "fft"

    def _quantizer(self) -> FrequencyQuantizer:
        return FrequencyQuantizer(**fields_of(self, FrequencyQuantizer))
