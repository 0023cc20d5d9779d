"""Products with 4-bit weights (S137 MARLIN): packing, and a matmul that unpacks inside the kernel."""

from kernels_pallas.int4.api import IMPLEMENTATIONS, int4_matmul
from kernels_pallas.int4.pack import (
    LAYOUTS,
    PackedInt4,
    group_scales,
    nearest,
    pack_int4,
    pack_values,
    relayout,
    unpack_int4,
)
from kernels_pallas.int4.problem import Problem

__all__ = [
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "PackedInt4",
    "Problem",
    "group_scales",
    "int4_matmul",
    "nearest",
    "pack_int4",
    "pack_values",
    "relayout",
    "unpack_int4",
]
