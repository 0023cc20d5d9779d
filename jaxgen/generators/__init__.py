"""Models of what comes next: an order, a backbone and a head; and samplers that put them to use."""

from jaxgen.generators.any_subset import AnySubsetModel, AnySubsetSampler
from jaxgen.generators.batched_sampler import BatchedSampler
from jaxgen.generators.block_diffusion import BlockDiffusionTransformer
from jaxgen.generators.feature_drafter import FeatureDrafter
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.long_context import Exposing, TriForce
from jaxgen.generators.masked import MaskedTransformer
from jaxgen.generators.masked_latent import MaskedLatentTransformer
from jaxgen.generators.masked_latent_sampler import MaskedLatentSampler
from jaxgen.generators.multi_rate import MultiRateModel
from jaxgen.generators.multi_token import MultiTokenModel
from jaxgen.generators.next_scale import NextScaleTransformer
from jaxgen.generators.next_scale_sampler import NextScaleSampler, box_mask, check_labels, keep_tokens
from jaxgen.generators.next_token import NextTokenTransformer
from jaxgen.generators.next_token_sampler import NextTokenSampler
from jaxgen.generators.sequence_sampler import Draft, Lookup, Plain, SequenceSampler
from jaxgen.generators.speculative_image_sampler import SpeculativeImageSampler
from jaxgen.generators.state_space import StateSpaceModel
from jaxgen.generators.vision_language import VisionLanguageModel, VisionLanguageSampler

__all__ = [
    "VisionLanguageSampler",
    "VisionLanguageModel",
    "MaskedLatentSampler",
    "MaskedLatentTransformer",
    "TriForce",
    "Exposing",
    "FeatureDrafter",
    "AnySubsetSampler",
    "AnySubsetModel",
    "BatchedSampler",
    "BlockDiffusionTransformer",
    "Draft",
    "LanguageModel",
    "Lookup",
    "MaskedTransformer",
    "MultiRateModel",
    "MultiTokenModel",
    "NextScaleSampler",
    "NextScaleTransformer",
    "NextTokenSampler",
    "NextTokenTransformer",
    "Plain",
    "SequenceSampler",
    "SpeculativeImageSampler",
    "StateSpaceModel",
    "box_mask",
    "check_labels",
    "keep_tokens",
]
