"""Models of what comes next: an order, a backbone and a head."""

from jaxgen.generators.next_scale import NextScaleTransformer
from jaxgen.generators.next_scale_sampler import NextScaleSampler, box_mask, check_labels, keep_tokens
from jaxgen.generators.next_token import NextTokenTransformer

__all__ = ["NextScaleSampler", "NextScaleTransformer", "NextTokenTransformer", "box_mask", "check_labels", "keep_tokens"]
