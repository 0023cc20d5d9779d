"""Attention over block-sparse masks: one op, one file a backend."""

from kernels_pallas.attention.api import block_sparse_attention
from kernels_pallas.attention.merge import merge, merge_parts

__all__ = ["block_sparse_attention", "merge", "merge_parts"]
