"""Linear attention: a matrix of constant size instead of a cache, with decay a token or a channel, or over blocks."""

from kernels_pallas.linear.api import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
