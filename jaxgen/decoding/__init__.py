"""Samplers: functions of a step function and pytrees, for anybody's model. Nothing here imports Flax."""

from jaxgen.decoding.cache import KVCache
from jaxgen.decoding.guidance import Guided, guide, scale_ramp
from jaxgen.decoding.next_scale import Known, Settings, sample_scales
from jaxgen.decoding.next_token import sample_tokens
from jaxgen.decoding.noise import gumbel
from jaxgen.decoding.step import Out, StepFn, View
from jaxgen.decoding.transforms import check_settings, truncate

__all__ = [
    "Guided",
    "KVCache",
    "Known",
    "Out",
    "Settings",
    "StepFn",
    "View",
    "check_settings",
    "guide",
    "gumbel",
    "sample_scales",
    "sample_tokens",
    "scale_ramp",
    "truncate",
]
