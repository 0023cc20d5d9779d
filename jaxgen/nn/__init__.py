"""Flax (Linen) blocks that models are made of."""

from jaxgen.nn.adaln import AdaLNHead, Modulation, SharedModulation, layer_norm, rms_norm
from jaxgen.nn.attention import SelfAttention, attend, attend_cached
from jaxgen.nn.cross_attention import AttentionPool, Context, CrossAttention
from jaxgen.nn.feature_vit import FeatureViT
from jaxgen.nn.linear_attention import GatedDeltaNet, GatedLinearAttention, LinearAttention, Retention
from jaxgen.nn.llama import LlamaBlock, LlamaTransformer, RotaryAttention, SwiGLU
from jaxgen.nn.mlp import GEGLU, MLP
from jaxgen.nn.moe import MixtureOfExperts
from jaxgen.nn.recurrent import RecurrentState, ShortConv
from jaxgen.nn.rope import rotate
from jaxgen.nn.ssm import Mamba2
from jaxgen.nn.text_encoder import TextEncoder
from jaxgen.nn.token_shuffle import TokenShuffle, TokenUnshuffle, window_order
from jaxgen.nn.transformer import AdaLNBlock, AdaLNTransformer

__all__ = [
    "FeatureViT",
    "AttentionPool",
    "Context",
    "CrossAttention",
    "rotate",
    "rms_norm",
    "GEGLU",
    "SwiGLU",
    "RotaryAttention",
    "MixtureOfExperts",
    "LlamaTransformer",
    "LlamaBlock",
    "AdaLNBlock",
    "AdaLNHead",
    "AdaLNTransformer",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "LinearAttention",
    "MLP",
    "Mamba2",
    "Modulation",
    "RecurrentState",
    "Retention",
    "SelfAttention",
    "SharedModulation",
    "ShortConv",
    "TextEncoder",
    "TokenShuffle",
    "TokenUnshuffle",
    "attend",
    "attend_cached",
    "layer_norm",
    "window_order",
]
