"""Attention and matrix kernels that know where the zeros are, for TPUs, Hopper GPUs and, through XLA, everything else.

`BlockMask` describes who may attend to whom by a predicate over per-token metadata, so that an implementation can skip
empty blocks, drop the mask in full ones, and never needs a dense [sq, sk] array. Every op picks an implementation for its
problem and device (`implementation=None`) or takes one by name; `explain` says what was picked and why.
"""

from kernels_pallas.attention import block_sparse_attention, merge
from kernels_pallas.block_mask import BlockMask
from kernels_pallas.decode import decode_attention, tree_attention
from kernels_pallas.delta import gated_delta, gated_delta_step
from kernels_pallas.device import Device, current_device, partitioned, target
from kernels_pallas.dispatch import Choice, explain
from kernels_pallas.int4 import PackedInt4, int4_matmul, pack_int4, unpack_int4
from kernels_pallas.linear import linear_attention, linear_attention_step

__all__ = [
    "BlockMask",
    "Choice",
    "Device",
    "PackedInt4",
    "block_sparse_attention",
    "current_device",
    "decode_attention",
    "explain",
    "gated_delta",
    "gated_delta_step",
    "int4_matmul",
    "linear_attention",
    "linear_attention_step",
    "merge",
    "pack_int4",
    "partitioned",
    "target",
    "tree_attention",
    "unpack_int4",
]
