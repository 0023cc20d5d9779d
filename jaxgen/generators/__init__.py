"""Models of what comes next: an order, a backbone and a head."""

from jaxgen.generators.next_scale import NextScaleTransformer
from jaxgen.generators.next_scale_sampler import NextScaleSampler, check_labels, keep_tokens

__all__ = ["NextScaleSampler", "NextScaleTransformer", "check_labels", "keep_tokens"]
