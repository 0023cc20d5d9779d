"""Official Infinity checkpoints: the text-to-image transformer of FoundationVision/Infinity, which S065, S086 and S165 build on.

    model = load("infinity_2b_reg.pth", pixels="1M", half_cross=True)
    features, bits = model.sample(jax.random.key(0), text, mask, cfg=4.0, temperature=0.5)

Texts come as features of a text encoder (flan-t5-xl), pictures leave as sums of codes for a decoder: neither is read here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding import Settings
from jaxgen.generators import BitwiseScaleSampler, BitwiseScaleTransformer
from jaxgen.interop.calls import read_params
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, linear_rules, norm_rules, reshape, to_torch
from jaxgen.interop.vqgan import shape_of
from jaxgen.nn.cross_attention import Context
from jaxgen.quantizers.binary import BinaryScales

__all__ = ["Infinity", "load", "load_generator", "schedule"]

# Height over width: the scales of a megapixel; smaller pictures take the first of them (the authors' dynamic_resolution.py).
_SIDES = {
    1.0: (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64),
    1.25: ((1, 1), (2, 2), (3, 3), *((5 * n, 4 * n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 11, 14))),
    1.333: ((1, 1), (2, 2), *((4 * n, 3 * n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 12, 15, 18))),
    1.5: ((1, 1), (2, 2), *((3 * n, 2 * n) for n in (1, 2, 3, 5, 7, 9, 11, 13, 16, 21, 26))),
    1.75: ((1, 1), (2, 2), (3, 3), (7, 4), (11, 6), *((7 * n, 4 * n) for n in (2, 3, 4, 5, 6, 8, 10, 12))),
    2.0: ((1, 1), (2, 2), *((2 * n, n) for n in (2, 3, 5, 8, 11, 15, 19, 23, 30, 37, 45))),
    2.5: ((1, 1), (2, 2), *((5 * n, 2 * n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20))),
    3.0: ((1, 1), (2, 2), *((3 * n, n) for n in (2, 3, 5, 7, 9, 12, 15, 18, 24, 30, 37))),
}
_COUNTS = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

# Buffers that the files carry beside the parameters.
BUFFERS = (r".*\.zero_k_bias", "lvl_1L", "attn_bias_for_masking", "Infinity_(in)?visible_(kv|q)len")


def schedule(pixels: str = "1M", ratio: float = 1.0) -> tuple[tuple[int, int], ...]:
    """The published grids (h, w) of tokens for a number of pixels and a height over width.

    Raises:
      ValueError: naming the argument, if it is none of the published ones (a ratio, or one over it, to two digits).
    """
    if pixels not in _COUNTS:
        raise ValueError(f"pixels={pixels!r}: expected one of {', '.join(_COUNTS)}")
    near = [r for r in _SIDES if abs(max(ratio, 1 / ratio if ratio > 0 else 0) - r) < 0.01]
    if not near:
        raise ValueError(f"ratio={ratio}: expected one of {', '.join(map(str, _SIDES))}, or one over it")
    grids = [(n, n) if isinstance(n, int) else n for n in _SIDES[near[0]][: _COUNTS[pixels]]]
    return tuple(grids if ratio >= 1 else [(w, h) for h, w in grids])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Infinity:
    """A generator with its parameters.

    Attributes:
      generator: the Flax module.
      quantizer: how its bits add up.
      params: `{"generator": variables}`.
      flash: whether the file keeps the scales of the heads as (1, 1, h, 1), for the authors' flash attention, or as (1, h, 1, 1).
      file_chunks: groups of blocks in the names of the file; 0 is plain `blocks`.
    """

    generator: BitwiseScaleTransformer
    quantizer: BinaryScales
    params: Mapping[str, Any]
    flash: bool = False
    file_chunks: int = 0

    def logits(self, text: Float[Array, "b n c"], mask: Bool[Array, "b n"], bits: Int[Array, "b l d"], *, drop: bool = False):
        """Teacher-forced float32 logits of every bit, [b, l, d, 2], with the text or, with `drop`, without any.

        Raises:
          ValueError: texts or bits of another shape, or bits that are not 0 or 1.
        """
        bits, want = np.asarray(bits), (len(text), self.generator.order.length, self.generator.bits)
        if bits.shape != want or not np.isin(bits, (0, 1)).all():
            raise ValueError(f"bits {bits.dtype} {bits.shape}: expected zeros and ones {want}")
        drop = jnp.full(len(text), drop)
        text = Context(jnp.asarray(text), jnp.asarray(mask, bool))
        return _logits(self.generator, self.quantizer, self.params["generator"], text, jnp.asarray(bits), drop)

    def decode(self, bits: Int[Array, "b l d"]) -> Float[Array, "b h w c"]:
        """The sum of the codes of all scales, which the authors' decoder turns into a picture."""
        return _decode(self.quantizer, jnp.asarray(bits))

    def sample(
        self,
        key: Key[Array, ""],
        text: Float[Array, "b n c"],
        mask: Bool[Array, "b n"],
        *,
        cfg: float = 3.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        guide_logits: bool = True,
        guide_layers: Sequence[int] = (),
        negative: Context | None = None,
    ) -> tuple[Float[Array, "b h w c"], Int[Array, "b l d"]]:
        """Samples one picture a text: (the sum of the codes, bits). See `BitwiseScaleSampler`.

        Args:
          guide_logits: the authors' `cfg_insertion_layer` 0.
          guide_layers: their negative ones.
          key, text, mask, cfg, temperature, top_k, top_p, negative: see `BitwiseScaleSampler`.
        """
        sampler = BitwiseScaleSampler(
            generator=self.generator, quantizer=self.quantizer, guide_logits=guide_logits, guide_layers=tuple(guide_layers)
        )
        return sampler(self.params, key, text, mask, Settings(cfg, temperature, top_k, top_p), negative=negative)

    def save(self, path: str) -> None:
        """Writes safetensors with the authors' names and layout, buffers included, for their `load_state_dict`."""
        state = to_torch(self.params["generator"]["params"], generator_rules(self.generator, flash=self.flash))
        blocks = [f"blocks.{i}.{part}" for i in range(self.generator.depth) for part in ("sa", "ca")]
        zeros = {f"{name}.zero_k_bias": np.zeros(self.generator.width, np.float32) for name in (*blocks, "text_proj_for_sos.ca")}
        write_safetensors(path, _chunked(state | zeros, self.generator.depth, self.file_chunks))


@functools.partial(jax.jit, static_argnums=0)
def _decode(quantizer, bits):
    return quantizer.decode(bits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(generator, quantizer, params, text, bits, drop):
    return generator.apply(params, *text, quantizer.inputs(bits), drop=drop)


def load(path: str, **options) -> Infinity:
    """Reads a published checkpoint; sizes, heads and the kind of AdaLN come from the file, the scales do not.

    Args:
      path: `infinity_*.pth`, its shards' folder, or safetensors.
      **options: those of `load_generator`, and `patch`: cells on a side of a token, 2 where the authors set
        `apply_spatial_patchify` (8B), else 1.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit.
    """
    patch = options.pop("patch", 1)
    generator, variables, layout = load_generator(path, **options)
    if patch < 1 or generator.bits % patch**2:
        raise ValueError(f"patch={patch}: {generator.bits} bits a token are not those of {patch} x {patch} cells")
    quantizer = BinaryScales(width=generator.bits // patch**2, patch_nums=generator.patch_nums, patch=patch)
    params = jax.device_put({"generator": variables}, may_alias=False)
    return Infinity(generator=generator, quantizer=quantizer, params=params, **layout)


def load_generator(
    path: str,
    *,
    pixels: str = "1M",
    ratio: float = 1.0,
    patch_nums: Sequence | None = None,
    level_in_each_chunk: bool = False,
    num_heads: int | None = None,
    half_cross: bool = False,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
):
    """(module, variables in numpy, how the file is laid out); see `load`.

    Args:
      path: the file.
      pixels, ratio: see `schedule`.
      patch_nums: scales in place of that schedule, such as its first ones; the rotary grid stays that of the ratio's megapixel.
      level_in_each_chunk: the authors' `add_lvl_embeding_only_first_block` = 0.
      num_heads: where attention is not l2-normalised and the file therefore does not reveal it; the authors use width / 128.
      half_cross: round the cross-attention to bfloat16, as the authors' flash attention does even in float32.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.
    """
    state, chunks = _flat(read_state_dict(path), path)
    outputs, width = shape_of(state, "head.weight", path, 2)
    text_length, text_width = shape_of(state, "cfg_uncond", path, 2)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    head_scale = "blocks.0.sa.scale_mul_1H11"
    l2_norm = head_scale in state
    scale_shape = shape_of(state, head_scale, path, 4) if l2_norm else ()
    flash = l2_norm and scale_shape[2] > 1
    module = BitwiseScaleTransformer(
        bits=outputs // 2,
        patch_nums=tuple(patch_nums or schedule(pixels, ratio)),
        text_width=text_width,
        text_length=text_length,
        width=width,
        heads=num_heads or (max(scale_shape) if l2_norm else max(width // 128, 1)),
        depth=depth,
        pool_heads=shape_of(state, "text_proj_for_sos.ca.mat_q", path, 3)[1],
        rotary_grid=schedule("1M", ratio)[-1],
        levels=shape_of(state, "lvl_embed.weight", path, 2)[0],
        chunks=(chunks or depth) if level_in_each_chunk else 1,
        cross_gate=1.0 if "blocks.0.ca_gamma" in state else None,
        half_cross=half_cross,
        mlp_ratio=shape_of(state, "blocks.0.ffn.fc1.weight", path, 2)[0] / width,
        l2_norm=l2_norm,
        shared_adaln="shared_ada_lin.1.weight" in state,
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
    )
    rules, expected = generator_rules(module, flash=flash), module.param_shapes()["params"]
    params = read_params(path, state, rules, BUFFERS, expected)
    return module, {"params": params}, dict(flash=flash, file_chunks=chunks)


_CHUNK = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.(.+)")


def _flat(state: Mapping[str, np.ndarray], path) -> tuple[dict[str, np.ndarray], int]:
    """The state with blocks numbered through, and in how many chunks they were."""
    found = {name: match for name in state if (match := _CHUNK.fullmatch(name))}
    chunks = len({match[1] for match in found.values()})
    each = len({match[2] for match in found.values()})
    numbers = {(int(match[1]), int(match[2])) for match in found.values()}
    if numbers != {(n, k) for n in range(chunks) for k in range(each)}:
        raise ValueError(f"{path}: block_chunks are not {chunks} chunks of {each} blocks each")
    flat = {}
    for name, array in state.items():
        match = found.get(name)
        flat[f"blocks.{int(match[1]) * each + int(match[2])}.{match[3]}" if match else name] = array
    return flat, chunks


def _chunked(state: Mapping[str, np.ndarray], depth: int, chunks: int) -> dict[str, np.ndarray]:
    """The inverse of `_flat`."""
    if not chunks:
        return dict(state)
    each = depth // chunks

    def rename(match: re.Match) -> str:
        return f"block_chunks.{int(match[1]) // each}.module.{int(match[1]) % each}."

    return {re.sub(r"^blocks\.(\d+)\.", rename, name): array for name, array in state.items()}


def generator_rules(module: BitwiseScaleTransformer, *, flash: bool = False) -> tuple[Rule, ...]:
    """Published names of a generator's parameters, with blocks numbered through as in a file of one chunk."""
    d, h, w = module.width, module.heads, module.text_width
    k = d // h
    theirs, ours = "blocks.{i}", "blocks" if module.scan_layers else "blocks_{i}"

    def parts(theirs: str, ours: str, n: int, wide: int = d, shape: tuple[int, ...] = (d,)) -> Rule:
        """A dense layer [n d, wide] whose output is n things of a shape."""
        return Rule(theirs, ours, Layout(lambda x: x.T.reshape(wide, n, *shape), lambda x: x.reshape(wide, n * d).T))

    def modulation(theirs: str, ours: str, n: int) -> tuple[Rule, ...]:
        return parts(f"{theirs}.weight", f"{ours}/kernel", n), Rule(f"{theirs}.bias", f"{ours}/bias", reshape((n * d,), (n, d)))

    def projection(theirs: str, ours: str, heads: int) -> tuple[Rule, ...]:
        kernel = Layout(lambda x: x.T.reshape(heads, d // heads, d), lambda x: x.reshape(d, d).T)
        return Rule(f"{theirs}.weight", f"{ours}/kernel", kernel), Rule(f"{theirs}.bias", f"{ours}/bias")

    def bias(theirs: str, ours: str, heads: int = h) -> Rule:
        return Rule(theirs, ours, reshape((d,), (heads, d // heads)))

    p = module.pool_heads
    pooled = (p, d // p)
    to_heads = Layout(lambda x: x.T.reshape(d, h, k), lambda x: x.reshape(d, d).T)
    rules = [
        Rule("cfg_uncond", "no_text"),
        Rule("pos_start", "start", reshape((1, -1, d), (-1, d))),
        Rule("text_norm.weight", "text_norm"),
        Rule("text_proj_for_sos.ca.mat_q", "text_pool/query", reshape((1, *pooled), pooled)),
        parts("text_proj_for_sos.ca.mat_kv.weight", "text_pool/kv/kernel", 2, w, pooled),
        bias("text_proj_for_sos.ca.v_bias", "text_pool/v_bias", p),
        *projection("text_proj_for_sos.ca.proj", "text_pool/proj", p),
        *linear_rules("text_proj_for_ca.0", "text_in"),
        *linear_rules("text_proj_for_ca.2", "text_out"),
        Rule("lvl_embed.weight", "level"),
        *linear_rules("word_embed", "word_embed"),
        *linear_rules("head", "head/head"),
        *modulation("head_nm.ada_lin.1", "head/ada", 2),
        parts(f"{theirs}.sa.mat_qkv.weight", f"{ours}/attention/qkv/kernel", 3, d, (h, k)),
        bias(f"{theirs}.sa.q_bias", f"{ours}/attention/q_bias"),
        bias(f"{theirs}.sa.v_bias", f"{ours}/attention/v_bias"),
        *projection(f"{theirs}.sa.proj", f"{ours}/attention/proj", h),
        Rule(f"{theirs}.ca.mat_q.weight", f"{ours}/cross/q/kernel", to_heads),
        bias(f"{theirs}.ca.mat_q.bias", f"{ours}/cross/q/bias"),
        parts(f"{theirs}.ca.mat_kv.weight", f"{ours}/cross/kv/kernel", 2, d, (h, k)),
        bias(f"{theirs}.ca.v_bias", f"{ours}/cross/v_bias"),
        *projection(f"{theirs}.ca.proj", f"{ours}/cross/proj", h),
        *norm_rules(f"{theirs}.ca_norm", f"{ours}/cross_norm"),
        *linear_rules(f"{theirs}.ffn.fc1", f"{ours}/mlp/fc1"),
        *linear_rules(f"{theirs}.ffn.fc2", f"{ours}/mlp/fc2"),
    ]
    if module.l2_norm:
        layout = reshape((1, 1, h, 1) if flash else (1, h, 1, 1), (h, 1))
        rules.append(Rule(f"{theirs}.sa.scale_mul_1H11", f"{ours}/attention/log_scale", layout))
    if module.cross_gate is not None:
        rules.append(Rule(f"{theirs}.ca_gamma", f"{ours}/cross_gate"))
    if module.shared_adaln:
        rules += modulation("shared_ada_lin.1", "shared_ada", 6)
        rules.append(Rule(f"{theirs}.ada_gss", f"{ours}/ada/offset", reshape((1, 1, 6, d), (6, d))))
    else:
        rules += modulation(f"{theirs}.ada_lin.1", f"{ours}/ada/dense", 6)
    return tuple(rules)
