"""Samplers: functions of a step function and pytrees, for anybody's model. Nothing here imports Flax."""

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.check import check_step
from jaxgen.decoding.guidance import Guided, guide, scale_ramp
from jaxgen.decoding.jacobi import Jacobi
from jaxgen.decoding.next_scale import Known, Settings, sample_scales
from jaxgen.decoding.next_token import sample_tokens
from jaxgen.decoding.noise import gumbel, uniform
from jaxgen.decoding.proposers import DraftModel, NGram
from jaxgen.decoding.recurrent_cache import HybridCache, Nodes, RecurrentCache
from jaxgen.decoding.speculate import Context, Proposal, Proposer, Result, Sequences, Sequential, speculate
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.decoding.topology import Topology, branches, chain, chains
from jaxgen.decoding.transforms import check_settings, truncate
from jaxgen.decoding.verify import Coupled, KSeq, Rejection, Rule, Verdict, verify

__all__ = [
    "Context",
    "Coupled",
    "DraftModel",
    "Guided",
    "HybridCache",
    "Jacobi",
    "KSeq",
    "KVCache",
    "Known",
    "NGram",
    "Nodes",
    "Out",
    "Proposal",
    "Proposer",
    "RecurrentCache",
    "Rejection",
    "Result",
    "Rule",
    "Sequences",
    "Sequential",
    "Settings",
    "StepFn",
    "Topology",
    "Verdict",
    "View",
    "branches",
    "chain",
    "chains",
    "check_settings",
    "check_step",
    "guide",
    "gumbel",
    "sample_scales",
    "sample_tokens",
    "scale_ramp",
    "speculate",
    "truncate",
    "uniform",
    "verify",
]
