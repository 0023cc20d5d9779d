"""Attention of new tokens to a cache: one token a sequence (decode), or the nodes of a tree of candidates."""

from kernels_pallas.decode.api import decode_attention, tree_attention

__all__ = ["decode_attention", "tree_attention"]
