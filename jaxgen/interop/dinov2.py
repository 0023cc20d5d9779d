"""Official DINOv2 encoders (facebookresearch/dinov2), in its own names or in those of Hugging Face's transformers.

    model = load(encoder="dinov2_vitb14_pretrain.pth")
    whole, patches = model.features(images)                     # images [b, 224, 224, 3] in [-1, 1]; [b, d], [b, 256, d]

ViT-S, -B, -L and -g at 14 pixels a patch, with registers or without; and DINO's ViTs of the same names, which have no layer
scales.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgen.interop.calls import read_params
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Rule, conv_rules, linear_rules, norm_rules, reshape, to_torch
from jaxgen.interop.vit import join_biases, split_biases, vit_block_rules
from jaxgen.interop.vqgan import shape_of
from jaxgen.nn.feature_vit import IMAGENET, FeatureViT

__all__ = ["DINOv2", "load"]

HEAD_SIZE = 64  # of all published models; the files do not say

# Names of transformers, as regular expressions, and the authors' own.
PREFIX = r"(?:dinov2(?:_with_registers)?\.)?"
RENAMED = (
    (PREFIX + r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (PREFIX + r"embeddings\.position_embeddings", "pos_embed"),
    (PREFIX + r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (PREFIX + r"layernorm\.(.*)", r"norm.\1"),
    (PREFIX + r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(.*)", r"blocks.\1.attn.\2.\3"),
    (PREFIX + r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"blocks.\1.attn.proj.\2"),
    (PREFIX + r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
    (PREFIX + r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(.*)", r"blocks.\1.mlp.w12.\2"),
    (PREFIX + r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(.*)", r"blocks.\1.mlp.w3.\2"),
    (PREFIX + r"encoder\.layer\.(\d+)\.(.*)", r"blocks.\1.\2"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DINOv2:
    """An encoder with its parameters.

    Attributes:
      encoder: the Flax module.
      params: `{"encoder": variables}`: unless blocks are scanned, what the stage "encoder" of a recipe takes, see
        `jaxgen.recipes.features`.
    """

    encoder: FeatureViT
    params: Mapping[str, Any]

    def features(self, images: Float[Array, "b H W C"]) -> tuple[Float[Array, "b d"], Float[Array, "b n d"]]:
        """Normed features of the whole images, and of their patches row by row.

        Args:
          images: in [-1, 1], with sides that patches fill.

        Raises:
          ValueError: other sides, or other channels than the model's.
        """
        images = jnp.asarray(images, jnp.float32)
        if images.ndim != 4 or images.shape[-1] != self.encoder.channels:
            raise ValueError(f"images {images.shape}: expected [b, H, W, {self.encoder.channels}]")
        tokens = _features(self.encoder, self.params["encoder"], images)
        return tokens[:, 0], tokens[:, 1:]

    def save(self, *, encoder: str) -> None:
        """Writes safetensors with the authors' names; keys' biases, which have no effect, as 0."""
        tensors = join_biases(to_torch(self.params["encoder"]["params"], rules(self.encoder)))
        write_safetensors(encoder, _halves(tensors, join=True))


@functools.partial(jax.jit, static_argnums=0)
def _features(encoder, variables, images):
    return encoder.apply(variables, images)


def load(*, encoder: str, num_heads: int | None = None, scan_layers: bool = False, dtype: Any = jnp.float32) -> DINOv2:
    """Reads a published checkpoint; all sizes come from the file. Pixels of 3 channels are standardised as ImageNet's.

    Args:
      encoder: such as `dinov2_vitb14_pretrain.pth`, a safetensors file, or a folder of Hugging Face's.
      num_heads: of other models than the published, which have one for each 64 numbers of the width.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit.
    """
    state = _authors(read_state_dict(encoder))
    width, channels, patch, _ = shape_of(state, "patch_embed.proj.weight", encoder, 4)
    places = shape_of(state, "pos_embed", encoder, 3)[1] - 1
    heads = width // HEAD_SIZE if num_heads is None else num_heads
    if heads < 1 or width % heads or round(places**0.5) ** 2 != places:
        raise ValueError(f"{encoder}: {heads} heads of width {width} and {places} positions make no model; num_heads={num_heads}")
    gated = "blocks.0.mlp.w12.weight" in state
    # Gated ones have two thirds of the ratio, rounded up to whole eights: 4 in all that are published.
    ratio = 4.0 if gated else shape_of(state, "blocks.0.mlp.fc1.weight", encoder, 2)[0] / width
    module = FeatureViT(
        width=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        heads=heads,
        patch=patch,
        positions=round(places**0.5),
        registers=shape_of(state, "register_tokens", encoder, 3)[1] if "register_tokens" in state else 0,
        channels=channels,
        mlp_ratio=ratio,
        gated_mlp=gated,
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in state else 0.0,
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
        **(IMAGENET if channels == 3 else {}),
    )
    state.setdefault("mask_token", np.zeros((1, width), np.float32))  # DINO's have none
    expected = module.param_shapes()["params"]
    variables = {"params": read_params(encoder, _halves(split_biases(state), join=False), rules(module), (), expected)}
    # A copy, since the arrays may be views of the file.
    return DINOv2(encoder=module, params=jax.device_put({"encoder": variables}, may_alias=False))


def _authors(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' names, with one projection in attention, from those of transformers, or from the authors'."""
    out = {}
    for name, array in state.items():
        for pattern, theirs in RENAMED:
            if re.fullmatch(pattern, name):
                name = re.sub(pattern, theirs, name)
                break
        out[name] = array
    for name in [name for name in out if ".attn.query." in name]:
        parts = [out.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        if all(part is not None for part in parts):
            for part in ("query", "key", "value"):
                out.pop(name.replace(".query.", f".{part}."))
            out[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    return out


def _halves(tensors: Mapping[str, np.ndarray], *, join: bool) -> dict[str, np.ndarray]:
    """A gated perceptron's first layer, `w12`, cut into gate and value; or joined again."""
    out = {}
    for name, array in tensors.items():
        stem, found, kind = name.partition(".mlp.w1." if join else ".mlp.w12.")
        if found and join:
            out[f"{stem}.mlp.w12.{kind}"] = np.concatenate([array, tensors[f"{stem}.mlp.w2.{kind}"]])
        elif found:
            out[f"{stem}.mlp.w1.{kind}"], out[f"{stem}.mlp.w2.{kind}"] = np.split(array, 2)
        elif not (join and ".mlp.w2." in name):
            out[name] = array
    return out


def rules(module: FeatureViT) -> tuple[Rule, ...]:
    """Published names of the parameters, as `split_biases` and `_halves` leave them."""
    theirs, ours, d = "blocks.{i}", "transformer/blocks" if module.scan_layers else "transformer/blocks_{i}", module.width
    blocks = vit_block_rules(theirs, ours, d, module.heads)
    if module.gated_mlp:
        mlp = {"w1": "gate_fc1", "w2": "fc1", "w3": "fc2"}
        blocks = [rule for rule in blocks if ".mlp." not in rule.theirs]
        blocks += [rule for name, our in mlp.items() for rule in linear_rules(f"{theirs}.mlp.{name}", f"{ours}/mlp/{our}")]
    return (
        Rule("cls_token", "cls_token", reshape((1, 1, d), (d,))),
        Rule("mask_token", "mask_token", reshape((1, d), (d,))),
        *([Rule("register_tokens", "register_tokens", reshape((1, -1, d), (-1, d)))] if module.registers else []),
        Rule("pos_embed", "position", reshape((1, -1, d), (-1, d))),
        *conv_rules("patch_embed.proj", "patch_embed"),
        *blocks,
        *(Rule(f"{theirs}.ls{i}.gamma", f"{ours}/gamma{i}") for i in (1, 2)),
        *norm_rules("norm", "transformer/norm"),
    )
