"""Official HMAR checkpoints (S080): the transformer of NVlabs/HMAR, on VAR's tokenizer.

model = load(generator="hmar-d16.pth", tokenizer="vae_ch160v4096z32.pth")
images, tokens = model.sample(jax.random.key(0), [207, 980], cfg=1.7, top_k=1000, top_p=0.99)
images, tokens = model.sample(jax.random.key(0), [207, 980], passes=model.even(4), cfg=1.7)
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxgen.decoding import Settings
from jaxgen.decoding.masked_scale import check_passes, even_passes
from jaxgen.generators import MarkovScaleTransformer, RefinedScaleSampler, ScaleRefiner, check_labels
from jaxgen.generators.scale_refiner import masked_logits
from jaxgen.interop import var
from jaxgen.interop.calls import read_params
from jaxgen.interop.files import read_state_dict, write_safetensors
from jaxgen.interop.mapping import Rule, reshape, to_torch
from jaxgen.orders import Order

__all__ = ["HMAR", "PASSES", "load", "load_generator"]

# Tokens that become certain at each pass, for the first scales of the published 256-pixel models; the others have one pass.
PASSES = ((1,), (1, 3), (1, 1, 2, 5))
# What the refiner's parameters are called, beside its blocks.
MASKED = ("mask_embed.", "mask_blocks.", "mask_head.", "mask_head_nm.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HMAR(var.VAR):
    """`VAR` whose generator is scale-Markov, and a refiner.

    Attributes:
      refiner: the Flax module.
      params: `{"generator": variables, "refiner": variables, "tokenizer": variables}`.
      passes: the schedule that `sample` has by default.
      confidence: see `RefinedScaleSampler`.
    """

    generator: MarkovScaleTransformer
    refiner: ScaleRefiner
    passes: tuple[tuple[int, ...], ...]
    confidence: str = "drawn"

    def masked_logits(
        self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], masked: Bool[Array, "b l-first"]
    ) -> Float[Array, "b l v"]:
        """Float32 logits of the refiner, given the tokens that are not masked; the first scale is not (see `masked_logits`)."""
        labels, masked = check_labels(labels, self.num_classes), jnp.asarray(masked, bool)
        want = (len(labels), self.generator.order.length - self.generator.order.sizes[0])
        if masked.shape != want:
            raise ValueError(f"masked {masked.shape}: expected {want}, all scales but the first")
        return _masked_logits(self.generator, self.refiner, self.tokenizer, self.params, labels, self._checked(tokens), masked)

    def sample(
        self,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        *,
        passes: Sequence[Sequence[int]] | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        confidence: str = "drawn",
    ) -> tuple[Float[Array, "b H W 3"], Int[Array, "b l"]]:
        """Samples one image a label; one compiled function from key and labels to (images in [-1, 1], tokens).

        Args:
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: class ids.
          passes: the schedule, see `RefinedScaleSampler`; None is the model's own. Each is one program.
          cfg: guidance scale at the last scale (the weight grows from 0 at the first).
          top_k: 0 is off, 1 is greedy.
          top_p: 0 is off.
          temperature: > 0.
          confidence: see `redraw`; with `top_k` of 1 take "full".
        """
        passes = self.passes if passes is None else tuple(tuple(int(n) for n in counts) for counts in passes)
        sampler = dataclasses.replace(self, passes=passes, confidence=confidence).sampler
        return sampler(self.params, key, labels, Settings(cfg, temperature, top_k, top_p))

    def even(self, count: int) -> tuple[tuple[int, ...], ...]:
        """The schedule of `count` passes of even size at each scale, see `even_passes`."""
        return even_passes(self.generator.order, count)

    def save(self, *, generator: str, tokenizer: str) -> None:
        """Writes safetensors with the authors' names and layout, buffers included, for their `load_state_dict`."""
        base = self.generator.depth - self.refiner.depth
        tensors = to_torch(self.params["generator"]["params"], var.generator_rules(self.generator))
        tensors |= var.generator_buffers(self.generator)
        masked = to_torch(self.params["refiner"]["params"], refiner_rules(self.refiner))
        zeros = {f"mask_blocks.{i}.attn.zero_k_bias": np.zeros(self.refiner.width, np.float32) for i in range(self.refiner.depth)}
        write_safetensors(generator, {_theirs(name, base): array for name, array in tensors.items()} | masked | zeros)
        self.save_tokenizer(tokenizer)

    @property
    def sampler(self) -> RefinedScaleSampler:
        """From key and labels to images, with the model's own schedule."""
        return self._sampler(False)

    def _sampler(self, smooth: bool) -> RefinedScaleSampler:
        return RefinedScaleSampler(
            generator=self.generator,
            tokenizer=self.tokenizer,
            refiner=self.refiner,
            passes=self.passes,
            confidence=self.confidence,
            smooth=smooth,
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _masked_logits(generator, refiner, tokenizer, params, labels, tokens, masked):
    def read(method, *args):
        return tokenizer.apply(params["tokenizer"], *args, method=method)

    features = read("inputs", tokens)
    own = jnp.concatenate([read("own", scale, ids) for scale, ids in enumerate(generator.order.split(tokens)) if scale], axis=1)
    return masked_logits(generator, refiner, params, labels, features, own, masked)


def load(
    *,
    generator: str,
    tokenizer: str,
    patch_nums: Sequence[int] | None = None,
    num_heads: int | None = None,
    passes: Sequence[Sequence[int]] | None = None,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
) -> HMAR:
    """Reads a published checkpoint and VAR's tokenizer; sizes, heads, scales and how many blocks are split come from the files.

    Args:
      generator: `hmar-d*.pth` or its safetensors.
      tokenizer: `vae_ch160v4096z32.pth` or its safetensors.
      patch_nums, num_heads, scan_layers, dtype: see `jaxgen.interop.var.load`.
      passes: the schedule, see `RefinedScaleSampler`; None is the authors', where the scales have it.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit; scales that cannot be
        told; a schedule that does not fit the scales.
    """
    options = dict(patch_nums=patch_nums, num_heads=num_heads, scan_layers=scan_layers, dtype=dtype)
    module, refiner, variables = load_generator(generator, **options)
    parts = var.with_tokenizer(module, variables, generator, tokenizer, dtype)
    passes = _published(module.order) if passes is None else tuple(tuple(counts) for counts in passes)
    check_passes(module.order, passes)
    return HMAR(**parts, refiner=refiner, passes=passes)


def load_generator(path: str, **options):
    """(The generator's module, the refiner's, their variables by name); see `load`."""
    state = read_state_dict(path)
    base = len({name.split(".")[1] for name in state if name.startswith("base_blocks.")})
    own = {_ours(name, base): array for name, array in state.items() if not name.startswith(MASKED)}
    try:
        module, variables = var.generator_of(own, path, kind=MarkovScaleTransformer, **options)
    except ValueError as error:
        names = r"\b(?:blocks\.\d+|word_embed\.bias|head_nm(?=\.)|head(?=\.))"
        raise ValueError(re.sub(names, lambda match: _theirs(match[0], base), str(error))) from error
    if module.shared_adaln:
        raise ValueError(f"{path}: shared AdaLN (shared_ada_lin) is not supported in HMAR checkpoints")
    masked = {name: array for name, array in state.items() if name.startswith(MASKED)}
    depth = len({name.split(".")[1] for name in masked if name.startswith("mask_blocks.")})
    if not 0 < depth == module.depth - base:
        raise ValueError(f"{path}: {depth} mask_blocks do not belong to {module.depth - base} ns_blocks")
    fields = ("vocab", "width", "heads", "mlp_ratio", "l2_norm", "scan_layers", "dtype")
    refiner = ScaleRefiner(depth=depth, **{name: getattr(module, name) for name in fields})
    expected = refiner.param_shapes()["params"]
    ignore = (r"mask_blocks\.\d+\.attn\.zero_k_bias",)
    params = read_params(path, masked, refiner_rules(refiner), ignore, expected)
    return module, refiner, {"generator": variables, "refiner": {"params": params}}


def refiner_rules(module: ScaleRefiner) -> tuple[Rule, ...]:
    """Published names of a refiner's parameters: VAR's blocks and head under other names."""
    fields = {name: getattr(module, name) for name in ("vocab", "width", "heads", "depth", "l2_norm", "scan_layers")}
    like = MarkovScaleTransformer(patch_nums=(1,), num_classes=1, **fields)
    rules = [rule for rule in var.generator_rules(like) if rule.ours.startswith(("transformer/", "head/"))]
    renamed = [dataclasses.replace(rule, theirs=f"mask_{rule.theirs}") for rule in rules]
    return (*renamed, Rule("mask_embed.weight", "mask_embed", reshape((1, -1), (-1,))))


def _published(order: Order) -> tuple[tuple[int, ...], ...]:
    """The authors' schedule where the first scales have their sizes, and one pass a scale."""
    return tuple(
        PASSES[scale] if scale < len(PASSES) and sum(PASSES[scale]) == size else (size,) for scale, size in enumerate(order.sizes)
    )


def _ours(name: str, base: int) -> str:
    """VAR's name of a parameter of the next-scale half."""
    if name == "word_embed_bias":
        return "word_embed.bias"
    kind, *rest = name.split(".")
    if kind == "ns_blocks" and rest and rest[0].isdigit():
        rest[0] = str(int(rest[0]) + base)
    renames = {"base_blocks": "blocks", "ns_blocks": "blocks", "ns_head": "head", "ns_head_nm": "head_nm"}
    return ".".join([renames.get(kind, kind), *rest])


def _theirs(name: str, base: int) -> str:
    """The inverse of `_ours`."""
    if name == "word_embed.bias":
        return "word_embed_bias"
    kind, *rest = name.split(".")
    if kind == "blocks":
        index = int(rest[0])
        kind, rest[0] = ("base_blocks", str(index)) if index < base else ("ns_blocks", str(index - base))
    return ".".join([f"ns_{kind}" if kind in ("head", "head_nm") else kind, *rest])
