"""Models of what comes next: an order, a backbone and a head."""

from jaxgen.generators.next_scale import NextScaleTransformer
from jaxgen.generators.next_scale_sampler import NextScaleSampler, box_mask, check_labels, keep_tokens
from jaxgen.generators.next_token import NextTokenTransformer
from jaxgen.generators.next_token_sampler import NextTokenSampler

__all__ = [
    "NextScaleSampler",
    "NextScaleTransformer",
    "NextTokenSampler",
    "NextTokenTransformer",
    "box_mask",
    "check_labels",
    "keep_tokens",
]
