"""What published vision transformers call the parameters of a block of `jaxgen.nn.vit.ViT`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxgen.interop.mapping import Layout, Rule, linear_rules, norm_rules, reshape

__all__ = ["join_biases", "split_biases", "vit_block_rules"]


def split_biases(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The biases of queries and values apart, which `vit_block_rules` know; those of keys have no effect and are left out."""
    out = {}
    for name, array in state.items():
        if name.endswith(".qkv.bias") and array.ndim == 1 and len(array) % 3 == 0:
            base = name.removesuffix("qkv.bias")
            out[f"{base}q_bias"], _, out[f"{base}v_bias"] = np.split(array, 3)
        else:
            out[name] = array
    return out


def join_biases(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `split_biases`, with keys' biases of 0."""
    out = {}
    for name, array in tensors.items():
        if name.endswith(".q_bias"):
            base = name.removesuffix("q_bias")
            out[f"{base}qkv.bias"] = np.concatenate([array, np.zeros_like(array), tensors[f"{base}v_bias"]])
        elif not name.endswith(".v_bias"):
            out[name] = array
    return out


def vit_block_rules(theirs: str, ours: str, d: int, h: int) -> tuple[Rule, ...]:
    """Names as in timm, of blocks of width d with h heads, once `split_biases` has seen them."""
    k = d // h
    qkv = Layout(lambda x: x.T.reshape(d, 3, h, k), lambda x: x.reshape(d, 3 * d).T)
    proj = Layout(lambda x: x.T.reshape(h, k, d), lambda x: x.reshape(d, d).T)
    return (
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        Rule(f"{theirs}.attn.qkv.weight", f"{ours}/attention/qkv/kernel", qkv),
        Rule(f"{theirs}.attn.q_bias", f"{ours}/attention/q_bias", reshape((d,), (h, k))),
        Rule(f"{theirs}.attn.v_bias", f"{ours}/attention/v_bias", reshape((d,), (h, k))),
        Rule(f"{theirs}.attn.proj.weight", f"{ours}/attention/proj/kernel", proj),
        Rule(f"{theirs}.attn.proj.bias", f"{ours}/attention/proj/bias"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *linear_rules(f"{theirs}.mlp.fc1", f"{ours}/mlp/fc1"),
        *linear_rules(f"{theirs}.mlp.fc2", f"{ours}/mlp/fc2"),
    )
