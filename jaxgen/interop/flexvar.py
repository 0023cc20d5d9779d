"""Official FlexVAR checkpoints (S064): the tokenizer and the transformer of jiaosiyu1999/FlexVAR, at any list of scales.

model = load(generator="FlexVARd24-epo349.pth", tokenizer="FlexVAE.pth")
images, tokens = model.sample(jax.random.key(0), [207, 980], cfg=2.5, top_k=900, top_p=0.95)
wide, _ = model.sample(jax.random.key(0), [207], patch_nums=(1, 2, 4, (5, 7), (8, 12), (12, 18)), cfg=2.5)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxgen.decoding import Settings
from jaxgen.generators import FlexibleSampler, FlexibleTransformer, check_labels
from jaxgen.interop import var
from jaxgen.interop.calls import check_tokens, decode, encode, next_scale_logits, read_params
from jaxgen.interop.files import read_checkpoint, read_state_dict, write_safetensors
from jaxgen.interop.mapping import Layout, Rule, to_torch
from jaxgen.interop.vqgan import autoencoder_rules, autoencoder_sizes, fuse_attention, shape_of, split_attention
from jaxgen.tokenizers import FlexibleTokenizer

__all__ = ["PATCH_NUMS", "FlexVAR", "load", "load_generator", "load_tokenizer", "save_tokenizer"]

# The list of the published models; sides that the authors' sampler draws, where it takes all others greedily.
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
DRAWN = (*PATCH_NUMS, 23, 24, 32)

# Buffers that the files carry beside the parameters.
GENERATOR_BUFFERS = ("attn_bias_for_masking", r"blocks\.\d+\.attn\.zero_k_bias")
TOKENIZER_BUFFERS = ("quantize.codebook_used",)
USED_CODES = 65536

# Where a checkpoint of a training run, instead of a published one, holds the parameters.
NESTED = (("trainer", "var_wo_ddp"), ("model",))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FlexVAR:
    """A tokenizer and a generator with their parameters. Every method takes any list of scales, and compiles once for each.

    Attributes:
      generator: the Flax module.
      tokenizer: the Flax module.
      params: `{"generator": variables, "tokenizer": variables}`.
    """

    generator: FlexibleTransformer
    tokenizer: FlexibleTokenizer
    params: Mapping[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes; this number as a label means unconditional."""
        return self.generator.num_classes

    @property
    def patch_nums(self) -> tuple[Any, ...]:
        """The usual list."""
        return self.generator.patch_nums

    def encode(self, images: Float[Array, "b H W 3"], patch_nums: Sequence[Any] | None = None) -> Int[Array, "b l"]:
        """Tokens of images in [-1, 1], scales concatenated coarse to fine.

        Raises:
          ValueError: a list that does not increase or does not end at the images' latent size.
        """
        return encode(self._at(patch_nums).tokenizer, self.params["tokenizer"], jnp.asarray(images))

    def decode(self, tokens: Int[Array, "b l"], patch_nums: Sequence[Any] | None = None) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1] of the last scale's tokens.

        Raises:
          ValueError: another number of tokens than the list has, or ids outside the vocabulary.
        """
        at = self._at(patch_nums)
        tokens = check_tokens(tokens, at.generator.order.length, self.tokenizer.vocab)
        return decode(at.tokenizer, self.params["tokenizer"], tokens)

    def logits(
        self, labels: Int[Array, "b"], tokens: Int[Array, "b l"], patch_nums: Sequence[Any] | None = None
    ) -> Float[Array, "b l v"]:
        """Teacher-forced float32 logits; a label of `num_classes` means unconditional."""
        at, labels = self._at(patch_nums), check_labels(labels, self.num_classes)
        tokens = check_tokens(tokens, at.generator.order.length, self.tokenizer.vocab)
        return next_scale_logits(at.generator, at.tokenizer, self.params, labels, tokens)

    def sample(
        self,
        key: Key[Array, ""],
        labels: Int[Array, "b"],
        *,
        patch_nums: Sequence[Any] | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        temperature: float = 1.0,
        guidance: str = "ramp",
        trained: int = 16,
    ) -> tuple[Float[Array, "b H W 3"], Int[Array, "b l"]]:
        """Samples one image a label; one compiled function from key and labels to (images in [-1, 1], tokens).

        Args:
          key: image i depends on the key, i and its label, not on the rest of the batch.
          labels: class ids.
          patch_nums: the list of scales; the image is `tokenizer.factor` times its last.
          cfg: guidance scale.
          top_k: 0 is off, 1 is greedy.
          top_p: 0 is off.
          temperature: > 0.
          guidance: "ramp", or "constant" for the authors' `used_llamagen_cfg`; see `FlexibleSampler`.
          trained: the authors' `max_pn`, see `FlexibleSampler`.
        """
        sampler = dataclasses.replace(self._at(patch_nums), guidance=guidance, trained=trained)
        return sampler(self.params, key, labels, Settings(cfg, temperature, top_k, top_p))

    def save(self, *, generator: str, tokenizer: str) -> None:
        """Writes safetensors with the authors' names and layout, buffers included, for their `load_state_dict`."""
        tensors = to_torch(self.params["generator"]["params"], generator_rules(self.generator))
        write_safetensors(generator, tensors | _generator_buffers(self.generator))
        save_tokenizer(tokenizer, self.tokenizer, self.params["tokenizer"])

    def _at(self, patch_nums) -> FlexibleSampler:
        sampler = FlexibleSampler(generator=self.generator, tokenizer=self.tokenizer, drawn=DRAWN)
        return sampler if patch_nums is None else sampler.at(patch_nums)


def load(
    *,
    generator: str,
    tokenizer: str,
    patch_nums: Sequence[Any] = PATCH_NUMS,
    num_heads: int | None = None,
    scan_layers: bool = True,
    dtype: Any = jnp.float32,
) -> FlexVAR:
    """Reads a published pair of checkpoints; sizes, heads and the kind of AdaLN come from the files.

    Args:
      generator: `FlexVARd*.pth`, a checkpoint of the authors' training, or its safetensors.
      tokenizer: `FlexVAE.pth` or its safetensors.
      patch_nums: the list that methods take unless told otherwise.
      num_heads: where attention is not l2-normalised and the file therefore does not reveal it; the authors use width / 64.
      scan_layers: stack the blocks' parameters and scan over them.
      dtype: of the computation.

    Raises:
      ValueError: a missing, truncated or unsafe file; unknown or missing names; shapes that do not fit.
    """
    module, variables = load_generator(
        generator, patch_nums=patch_nums, num_heads=num_heads, scan_layers=scan_layers, dtype=dtype
    )
    tokenizer_module, tokenizer_variables = load_tokenizer(tokenizer, patch_nums=patch_nums, dtype=dtype)
    width = variables["params"]["word_embed"]["kernel"].shape[0]
    if module.vocab != tokenizer_module.vocab or width != tokenizer_module.width:
        raise ValueError(
            f"{generator} (vocabulary {module.vocab}, code width {width}) does not belong to "
            f"{tokenizer} (vocabulary {tokenizer_module.vocab}, code width {tokenizer_module.width})"
        )
    # A copy, since the arrays may be views of the files; `jnp.asarray` would compile a program for every shape.
    params = jax.device_put({"generator": variables, "tokenizer": tokenizer_variables}, may_alias=False)
    return FlexVAR(generator=module, tokenizer=tokenizer_module, params=params)


def load_generator(
    path: str, *, patch_nums=PATCH_NUMS, num_heads: int | None = None, scan_layers: bool = True, dtype: Any = jnp.float32
):
    """The generator's module and variables (numpy); see `load`."""
    state = _read(path)
    vocab, width = shape_of(state, "head.weight", path, 2)
    head_scale = "blocks.0.attn.scale_mul_1H11"
    l2_norm = head_scale in state
    module = FlexibleTransformer(
        vocab=vocab,
        num_classes=shape_of(state, "class_emb.weight", path, 2)[0] - 1,
        patch_nums=tuple(patch_nums),
        width=width,
        heads=num_heads or (shape_of(state, head_scale, path, 4)[1] if l2_norm else max(width // 64, 1)),
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        mlp_ratio=shape_of(state, "blocks.0.ffn.fc1.weight", path, 2)[0] / width,
        l2_norm=l2_norm,
        shared_adaln="shared_ada_lin.1.weight" in state,
        map_size=shape_of(state, "pos_1LC", path, 4)[2],
        scan_layers=scan_layers,
        dtype=jnp.dtype(dtype),
    )
    expected = module.param_shapes(shape_of(state, "word_embed.weight", path, 2)[1])["params"]
    return module, {"params": read_params(path, state, generator_rules(module), GENERATOR_BUFFERS, expected)}


def load_tokenizer(path: str, *, patch_nums=PATCH_NUMS, dtype: Any = jnp.float32):
    """The tokenizer's module and variables (numpy)."""
    state = _read(path)
    vocab, width = shape_of(state, "quantize.embedding.weight", path, 2)
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.conv_blocks.")})
    state = fuse_attention(llamagen_names(state, levels, inverse=True))
    module = FlexibleTokenizer(
        **autoencoder_sizes(state, path),
        z_channels=shape_of(state, "encoder.conv_out.weight", path, 4)[0],
        vocab=vocab,
        width=width,
        patch_nums=tuple(patch_nums),
        dtype=jnp.dtype(dtype),
    )
    image = jax.ShapeDtypeStruct((1, *module.image_size, module.channels), jnp.float32)
    expected = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
    return module, {"params": read_params(path, state, TOKENIZER_RULES, TOKENIZER_BUFFERS, expected)}


def save_tokenizer(path: str, module: FlexibleTokenizer, variables: Mapping[str, Any]) -> None:
    """Writes a tokenizer as safetensors with the authors' names, buffers included."""
    tensors = llamagen_names(split_attention(to_torch(variables["params"], TOKENIZER_RULES)), len(module.ch_mult))
    write_safetensors(path, tensors | {"quantize.codebook_used": np.zeros(USED_CODES, np.float32)})


def _read(path: str) -> dict[str, np.ndarray]:
    """The parameters of a file, which may lie below others of a training run."""
    outer = read_checkpoint(path)
    return read_state_dict(path, next((keys for keys in NESTED if keys[0] in outer), None))


def generator_rules(module: FlexibleTransformer) -> tuple[Rule, ...]:
    """Published names of a generator's parameters: VAR's, but for the map of positions."""
    rules = [rule for rule in var.generator_rules(module) if rule.theirs not in ("pos_1LC", "lvl_embed.weight")]
    channels_first = Layout(lambda x: np.moveaxis(x.reshape(x.shape[1:]), 0, -1), lambda x: np.moveaxis(x, -1, 0)[None])
    return (*rules, Rule("pos_1LC", "position", channels_first))


TOKENIZER_RULES = (*autoencoder_rules(), Rule("quantize.embedding.weight", "quantizer/codebook"))


def llamagen_names(state: Mapping[str, np.ndarray], levels: int, *, inverse: bool = False) -> dict[str, np.ndarray]:
    """LlamaGen's names of the convolutional autoencoder from VQGAN's, which `autoencoder_rules` know; or the inverse.

    LlamaGen counts the decoder's levels in the order they run, VQGAN from the highest resolution.
    """
    pairs = [
        (f"{half}.mid.{theirs}.", f"{half}.mid.{ours}.")
        for half in ("encoder", "decoder")
        for theirs, ours in ((0, "block_1"), (1, "attn_1"), (2, "block_2"))
    ]
    for i in range(levels):
        for half, place in (("encoder", f"down.{i}"), ("decoder", f"up.{levels - 1 - i}")):
            pairs += [(f"{half}.conv_blocks.{i}.res.", f"{half}.{place}.block.")]
            pairs += [(f"{half}.conv_blocks.{i}.", f"{half}.{place}.")]
    pairs = [pair if inverse else pair[::-1] for pair in pairs]
    table = dict(pairs)
    known = re.compile("|".join(map(re.escape, table)))
    return {known.sub(lambda m: table[m[0]], name, count=1): array for name, array in state.items()}


def _generator_buffers(module: FlexibleTransformer) -> dict[str, np.ndarray]:
    buffers = var.generator_buffers(module)
    return {name: array for name, array in buffers.items() if name != "lvl_1L"}
