"""Samplers: functions of a step function and pytrees, for anybody's model. Nothing here imports Flax."""

from jaxgen.decoding.any_subset import Bigrams, ParallelDrafts, Queries, in_order, infill, reading_order
from jaxgen.decoding.batcher import Batcher, Request
from jaxgen.decoding.block_cache import Blocks, DualCache, FreeCache, Whole
from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.check import check_step
from jaxgen.decoding.conformance import check_exact
from jaxgen.decoding.counterfactual import Factual, Hindsight, hindsight, intervene
from jaxgen.decoding.density import PathDensity
from jaxgen.decoding.economy import SkipDecode, SkipFeedForward
from jaxgen.decoding.feature_drafts import BeamDrafts, BlockDrafts, designed_tree
from jaxgen.decoding.file_tokens import FileGrammar, FileTokens
from jaxgen.decoding.grammar import Automaton, constrain
from jaxgen.decoding.groups import Groups, sample_groups
from jaxgen.decoding.guidance import Guided, GuidedCache, cosine_ramp, guide, scale_ramp
from jaxgen.decoding.h264 import H264Grammar
from jaxgen.decoding.head_aware import HeadPlan, attention_variance, classify_heads, replay, split_budget
from jaxgen.decoding.head_aware_cache import HeadAwareCache
from jaxgen.decoding.hierarchical import Hierarchical, Reread, Retrieved
from jaxgen.decoding.jacobi import Jacobi
from jaxgen.decoding.jpeg import JpegGrammar
from jaxgen.decoding.kernels import GuidedUnmask, Unmask, UnmaskCells, UnmaskVectors
from jaxgen.decoding.mask_drafts import MaskDrafts
from jaxgen.decoding.masked_latents import sample_latents
from jaxgen.decoding.masked_scale import check_passes, redraw
from jaxgen.decoding.next_scale import Draft, Kept, Known, Settings, ramped, sample_scales
from jaxgen.decoding.next_token import Drawn, begin_tokens, draw_tokens, sample_tokens
from jaxgen.decoding.next_x import sample_entities
from jaxgen.decoding.noise import gumbel, uniform
from jaxgen.decoding.proposers import DraftModel, NGram
from jaxgen.decoding.recurrent_cache import HybridCache, Nodes, RecurrentCache, StateCache
from jaxgen.decoding.refine import Refined, refine
from jaxgen.decoding.relaxed import Grouped, Lantern, chain_law, nearest_codes, step_law
from jaxgen.decoding.reveal import (
    Agreement,
    Ancestral,
    ByConfidence,
    Each,
    EntropyBound,
    Even,
    FirstHitting,
    LeftToRight,
    RandomOrder,
    Scheduled,
    Threshold,
)
from jaxgen.decoding.rows import sample_rows
from jaxgen.decoding.search import Found, Reward, SearchPlan, check_reward, search_scales
from jaxgen.decoding.search_clusters import k_means, representatives
from jaxgen.decoding.server import Outcome, QueueFull, Server
from jaxgen.decoding.sparse_cache import RetrievalCache, SinkCache, exposing
from jaxgen.decoding.speculate import Context, Proposal, Proposer, Result, Sequences, Sequential, speculate
from jaxgen.decoding.speculate_latents import LatentModel, LatentResult, speculate_latents
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.decoding.topology import RuntimeTree, Topology, branches, chain, chains
from jaxgen.decoding.transforms import Sampling, apply_sampling, check_settings, compose, penalise, truncate
from jaxgen.decoding.verify import Coupled, KSeq, Rejection, Rule, Verdict, verify
from jaxgen.decoding.watermark import Detection, decoy_p_value, detect
from jaxgen.decoding.watermark_bias import LexicalBias, green_lists
from jaxgen.decoding.watermark_index import green_of_pairs, pair_codes, replace_red

__all__ = [
    "Groups",
    "sample_groups",
    "sample_latents",
    "H264Grammar",
    "HeadAwareCache",
    "HeadPlan",
    "attention_variance",
    "classify_heads",
    "replay",
    "split_budget",
    "reading_order",
    "infill",
    "in_order",
    "Queries",
    "ParallelDrafts",
    "Bigrams",
    "Agreement",
    "Ancestral",
    "Automaton",
    "Batcher",
    "BeamDrafts",
    "BlockDrafts",
    "Blocks",
    "ByConfidence",
    "Context",
    "Coupled",
    "Detection",
    "Draft",
    "DraftModel",
    "Drawn",
    "DualCache",
    "Each",
    "EntropyBound",
    "Even",
    "Factual",
    "FirstHitting",
    "FileGrammar",
    "FileTokens",
    "Found",
    "FreeCache",
    "Grouped",
    "Guided",
    "GuidedCache",
    "GuidedUnmask",
    "Hierarchical",
    "Hindsight",
    "HybridCache",
    "Jacobi",
    "JpegGrammar",
    "KSeq",
    "KVCache",
    "Kept",
    "Known",
    "Lantern",
    "LatentModel",
    "LatentResult",
    "LeftToRight",
    "LexicalBias",
    "MaskDrafts",
    "NGram",
    "Nodes",
    "Out",
    "Outcome",
    "PathDensity",
    "Proposal",
    "Proposer",
    "QueueFull",
    "RandomOrder",
    "RecurrentCache",
    "Refined",
    "Rejection",
    "Request",
    "Reread",
    "Result",
    "RetrievalCache",
    "Reward",
    "Retrieved",
    "Rule",
    "RuntimeTree",
    "Sampling",
    "Scheduled",
    "SearchPlan",
    "Sequences",
    "Sequential",
    "Server",
    "Settings",
    "SinkCache",
    "SkipDecode",
    "SkipFeedForward",
    "StateCache",
    "StepFn",
    "Threshold",
    "Topology",
    "Unmask",
    "UnmaskCells",
    "UnmaskVectors",
    "Verdict",
    "View",
    "Whole",
    "apply_sampling",
    "begin_tokens",
    "branches",
    "chain",
    "chain_law",
    "chains",
    "check_exact",
    "check_passes",
    "check_reward",
    "check_settings",
    "check_step",
    "compose",
    "constrain",
    "decoy_p_value",
    "designed_tree",
    "detect",
    "draw_tokens",
    "exposing",
    "green_lists",
    "green_of_pairs",
    "guide",
    "gumbel",
    "hindsight",
    "intervene",
    "k_means",
    "nearest_codes",
    "pair_codes",
    "penalise",
    "ramped",
    "redraw",
    "refine",
    "replace_red",
    "representatives",
    "sample_entities",
    "sample_rows",
    "sample_scales",
    "sample_tokens",
    "search_scales",
    "cosine_ramp",
    "scale_ramp",
    "speculate",
    "speculate_latents",
    "step_law",
    "truncate",
    "uniform",
    "verify",
]
