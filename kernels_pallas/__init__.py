"""Attention masks that kernels can plan for, and the kernels that use them.

`BlockMask` describes who may attend to whom by a predicate over per-token metadata, so that an implementation can skip
empty blocks, drop the mask in full ones, and never needs a dense [sq, sk] array.
"""

from kernels_pallas.block_mask import BlockMask
from kernels_pallas.device import Device, current_device, partitioned, target
from kernels_pallas.dispatch import Choice, explain

__all__ = ["BlockMask", "Choice", "Device", "current_device", "explain", "partitioned", "target"]
