"""Models of what comes next: an order, a backbone and a head; and samplers that put them to use."""

from jaxgen.generators.aligned_llama import AlignedLlama
from jaxgen.generators.any_subset import AnySubsetModel, AnySubsetSampler
from jaxgen.generators.axial import AxialSampler, AxialTransformer
from jaxgen.generators.batched_sampler import BatchedSampler
from jaxgen.generators.bitwise_scale import BitwiseScaleTransformer, TextCondition
from jaxgen.generators.bitwise_scale_sampler import BitwiseScaleSampler
from jaxgen.generators.block_diffusion import BlockDiffusionTransformer
from jaxgen.generators.coarse_to_fine import CoarseToFineLlama
from jaxgen.generators.coarse_to_fine_sampler import CoarseToFineSampler
from jaxgen.generators.diffusion_sampler import DiffusionSampler
from jaxgen.generators.feature_drafter import FeatureDrafter
from jaxgen.generators.flexible import FlexibleSampler, FlexibleTransformer
from jaxgen.generators.flow_scale import FlowScaleTransformer
from jaxgen.generators.flow_scale_sampler import FlowScaleSampler
from jaxgen.generators.head_aware import HeadAware
from jaxgen.generators.image_llama import ImageLlama
from jaxgen.generators.language import LanguageModel
from jaxgen.generators.long_context import Exposing, TriForce
from jaxgen.generators.markov_scale import MarkovScaleTransformer
from jaxgen.generators.masked import MaskedTransformer
from jaxgen.generators.masked_latent import MaskedLatentTransformer
from jaxgen.generators.masked_latent_sampler import MaskedLatentSampler
from jaxgen.generators.multi_rate import MultiRateModel
from jaxgen.generators.multi_token import MultiTokenModel
from jaxgen.generators.neighbour_llama import NeighbourLlama
from jaxgen.generators.next_scale import NextScaleTransformer
from jaxgen.generators.next_scale_sampler import NextScaleSampler, box_mask, check_labels, keep_tokens
from jaxgen.generators.next_token import NextTokenTransformer
from jaxgen.generators.next_token_sampler import NextTokenSampler, check_condition
from jaxgen.generators.next_x import NextXTransformer
from jaxgen.generators.next_x_sampler import NextXSampler
from jaxgen.generators.pivoted_latent import PivotedLatentTransformer
from jaxgen.generators.pivoted_latent_sampler import PivotedLatentSampler
from jaxgen.generators.prompted_llama import ClassCodes, PromptedLlama, PromptedSampler
from jaxgen.generators.random_order import RandomOrderTransformer
from jaxgen.generators.refined_scale_sampler import RefinedScaleSampler
from jaxgen.generators.retrieval_llama import RetrievalLlama, RetrievalSampler
from jaxgen.generators.scale_recurrent import ScaleRecurrentTransformer
from jaxgen.generators.scale_refiner import ScaleRefiner
from jaxgen.generators.searched_sampler import SearchedSampler
from jaxgen.generators.semantic_patches import SemanticPatchModel, SemanticPatchSampler
from jaxgen.generators.sequence_sampler import Draft, Lookup, Plain, SequenceSampler
from jaxgen.generators.shuffled import ShuffledSampler, ShuffledTransformer
from jaxgen.generators.speculative_image_sampler import SpeculativeImageSampler
from jaxgen.generators.staged_flow import StagedFlowTransformer
from jaxgen.generators.state_space import StateSpaceModel
from jaxgen.generators.sub_vocabulary import (
    MaskedSubVocabularyLlama,
    MaskedSubVocabularySampler,
    SubVocabularyLlama,
    SubVocabularySampler,
)
from jaxgen.generators.supernet import SupernetTransformer, equidistant
from jaxgen.generators.vision_language import VisionLanguageModel, VisionLanguageSampler

__all__ = [
    "AlignedLlama",
    "RandomOrderTransformer",
    "RetrievalLlama",
    "RetrievalSampler",
    "SemanticPatchModel",
    "SemanticPatchSampler",
    "ShuffledSampler",
    "ShuffledTransformer",
    "PivotedLatentSampler",
    "PivotedLatentTransformer",
    "StagedFlowTransformer",
    "FlowScaleSampler",
    "FlowScaleTransformer",
    "NextXSampler",
    "NextXTransformer",
    "HeadAware",
    "BitwiseScaleSampler",
    "BitwiseScaleTransformer",
    "TextCondition",
    "VisionLanguageSampler",
    "VisionLanguageModel",
    "MaskedLatentSampler",
    "MaskedLatentTransformer",
    "TriForce",
    "Exposing",
    "FeatureDrafter",
    "FlexibleSampler",
    "FlexibleTransformer",
    "AnySubsetSampler",
    "AnySubsetModel",
    "AxialSampler",
    "AxialTransformer",
    "BatchedSampler",
    "BlockDiffusionTransformer",
    "ClassCodes",
    "CoarseToFineLlama",
    "CoarseToFineSampler",
    "DiffusionSampler",
    "Draft",
    "ImageLlama",
    "LanguageModel",
    "Lookup",
    "MarkovScaleTransformer",
    "MaskedSubVocabularyLlama",
    "MaskedSubVocabularySampler",
    "MaskedTransformer",
    "MultiRateModel",
    "MultiTokenModel",
    "NeighbourLlama",
    "NextScaleSampler",
    "NextScaleTransformer",
    "NextTokenSampler",
    "NextTokenTransformer",
    "Plain",
    "PromptedLlama",
    "PromptedSampler",
    "RefinedScaleSampler",
    "ScaleRefiner",
    "SearchedSampler",
    "SequenceSampler",
    "SpeculativeImageSampler",
    "ScaleRecurrentTransformer",
    "StateSpaceModel",
    "SubVocabularyLlama",
    "SubVocabularySampler",
    "SupernetTransformer",
    "box_mask",
    "check_condition",
    "check_labels",
    "equidistant",
    "keep_tokens",
]
