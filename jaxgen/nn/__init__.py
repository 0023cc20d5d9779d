"""Flax (Linen) blocks that models are made of."""

from jaxgen.nn.adaln import AdaLNHead, Modulation, SharedModulation, layer_norm
from jaxgen.nn.attention import SelfAttention, attend
from jaxgen.nn.mlp import MLP
from jaxgen.nn.transformer import AdaLNBlock, AdaLNTransformer

__all__ = [
    "AdaLNBlock",
    "AdaLNHead",
    "AdaLNTransformer",
    "MLP",
    "Modulation",
    "SelfAttention",
    "SharedModulation",
    "attend",
    "layer_norm",
]
