"""What is added to a trained generator, or made of it, without changing its code."""

from jaxgen.adapters.gptq import gptq
from jaxgen.adapters.int4 import (
    Int4Module,
    Linear,
    apply_int4,
    dequantise,
    get_kernel,
    int4_layers,
    kernel_bytes,
    linear_layers,
    quantise,
    replace_kernel,
    unstack_layers,
    with_hessians,
)

__all__ = [
    "Int4Module",
    "Linear",
    "apply_int4",
    "dequantise",
    "get_kernel",
    "gptq",
    "int4_layers",
    "kernel_bytes",
    "linear_layers",
    "quantise",
    "replace_kernel",
    "unstack_layers",
    "with_hessians",
]
