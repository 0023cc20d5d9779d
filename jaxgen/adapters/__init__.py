"""What is added to a trained generator, or made of it, without changing its code."""

from jaxgen.adapters.gptq import gptq
from jaxgen.adapters.int4 import (
    Int4Module,
    apply_int4,
    dequantise,
    int4_layers,
    kernel_bytes,
    quantise,
    unstack_layers,
    with_hessians,
)
from jaxgen.adapters.linear import Linear, get_kernel, linear_layers, replace_kernel
from jaxgen.adapters.low_rank import init_low_rank, low_rank_layers

__all__ = [
    "Int4Module",
    "Linear",
    "apply_int4",
    "dequantise",
    "get_kernel",
    "gptq",
    "init_low_rank",
    "int4_layers",
    "kernel_bytes",
    "linear_layers",
    "low_rank_layers",
    "quantise",
    "replace_kernel",
    "unstack_layers",
    "with_hessians",
]
