"""The published layout of the VQGAN-family encoder and decoder, as VAR's tokenizer and its siblings store it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxgen.interop.mapping import Layout, Rule, conv_rules, norm_rules

__all__ = ["autoencoder_rules", "autoencoder_sizes", "fuse_attention", "shape_of", "split_attention"]

# A 1x1 convolution over channels, which is a dense layer here.
_pointwise = Layout(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T[:, :, None, None])


def shape_of(state_dict: Mapping[str, np.ndarray], name: str, path, rank: int) -> tuple[int, ...]:
    """Shape of a parameter that the architecture is read from.

    Raises:
      ValueError: naming the file and the parameter, if it is missing, empty or has another number of axes.
    """
    if name not in state_dict:
        raise ValueError(f"{path}: no parameter {name!r}; not a checkpoint of this system?")
    shape = tuple(state_dict[name].shape)
    if len(shape) != rank or 0 in shape:
        raise ValueError(f"{path}: {name} has the shape {shape}; expected {rank} axes and at least one element")
    return shape


def autoencoder_sizes(state_dict: Mapping[str, np.ndarray], path) -> dict:
    """Fields of `ConvEncoder` and `ConvDecoder` read from names and shapes."""
    ch, channels = shape_of(state_dict, "encoder.conv_in.weight", path, 4)[:2]
    levels = max(1, _count(state_dict, "encoder.down.{}.block.0.conv1.weight"))
    mult = tuple(shape_of(state_dict, f"encoder.down.{i}.block.0.conv1.weight", path, 4)[0] // ch for i in range(levels))
    return dict(
        channels=channels,
        ch=ch,
        ch_mult=mult,
        res_blocks=_count(state_dict, "encoder.down.0.block.{}.conv1.weight"),
        attention=f"encoder.down.{levels - 1}.attn.0.qkv.weight" in state_dict,
    )


def fuse_attention(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The layout with one projection `qkv`, which `autoencoder_rules` know, from that with `q`, `k` and `v`."""
    out = {}
    for name, array in state_dict.items():
        base, part, kind = name.rsplit(".", 2) if name.count(".") > 1 else ("", "", "")
        parts = [f"{base}.{p}.{kind}" for p in "qkv"]
        if part not in ("q", "k", "v") or not all(p in state_dict for p in parts):
            out[name] = array
        elif part == "q":
            out[f"{base}.qkv.{kind}"] = np.concatenate([state_dict[p] for p in parts])
    return out


def split_attention(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `fuse_attention`."""
    out = {}
    for name, array in state_dict.items():
        base, found, kind = name.partition(".qkv.")
        names = [f"{base}.{p}.{kind}" for p in "qkv"] if found else [name]
        out |= dict(zip(names, np.split(np.asarray(array), len(names))))
    return out


def _count(state_dict, pattern: str) -> int:
    n = 0
    while pattern.format(n) in state_dict:
        n += 1
    return n


def _res_block(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *norm_rules(f"{theirs}.norm1", f"{ours}/norm1"),
        *conv_rules(f"{theirs}.conv1", f"{ours}/conv1"),
        *norm_rules(f"{theirs}.norm2", f"{ours}/norm2"),
        *conv_rules(f"{theirs}.conv2", f"{ours}/conv2"),
        *conv_rules(f"{theirs}.nin_shortcut", f"{ours}/shortcut", optional=True),
    )


def _attention(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        *norm_rules(f"{theirs}.norm", f"{ours}/norm", optional=True),
        *(
            rule
            for name, mine in (("qkv", "qkv"), ("proj_out", "proj"))
            for rule in (
                Rule(f"{theirs}.{name}.weight", f"{ours}/{mine}/kernel", _pointwise, optional=True),
                Rule(f"{theirs}.{name}.bias", f"{ours}/{mine}/bias", optional=True),
            )
        ),
    )


def autoencoder_rules() -> tuple[Rule, ...]:
    """Rules of `encoder.*` and `decoder.*`."""
    rules = []
    for half, levels, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        rules += [
            *conv_rules(f"{half}.conv_in", f"{half}/conv_in"),
            *_res_block(f"{half}.{levels}.{{i}}.block.{{j}}", f"{half}/{levels}_{{i}}_block_{{j}}"),
            *_attention(f"{half}.{levels}.{{i}}.attn.{{j}}", f"{half}/{levels}_{{i}}_attention_{{j}}"),
            *conv_rules(f"{half}.{levels}.{{i}}.{sampler}.conv", f"{half}/{levels}_{{i}}_{sampler}/conv", optional=True),
            *_res_block(f"{half}.mid.block_1", f"{half}/mid/block_0"),
            *_attention(f"{half}.mid.attn_1", f"{half}/mid/attention"),
            *_res_block(f"{half}.mid.block_2", f"{half}/mid/block_1"),
            *norm_rules(f"{half}.norm_out", f"{half}/norm_out"),
            *conv_rules(f"{half}.conv_out", f"{half}/conv_out"),
        ]
    return (*rules, *conv_rules("quant_conv", "quant_conv"), *conv_rules("post_quant_conv", "post_quant_conv"))
